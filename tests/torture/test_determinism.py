"""The same workspace built elsewhere, by someone else, with another hash seed: the same bytes, no trace of where."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from .workspaces import ROOT, Place, finish

pytest.importorskip("onnx")
from . import networks

TARGETS = {"native": 'target = "native"\n', "inside": 'target = "native"\nweights = "inside"\n'}
SMALL = """\
from pipeline import DOIT_CONFIG, Model, Workspace


def mlp():
    import numpy as np
    from tvm.relax.frontend import nn

    class Mlp(nn.Module):
        def __init__(self):
            self.hidden = nn.Linear(16, 32)
            self.out = nn.Linear(32, 10)

        def forward(self, x: nn.Tensor):
            return nn.op.softmax(self.out(nn.op.relu(self.hidden(x))))

    net = Mlp()
    net.to("float32")
    random = np.random.default_rng(0)
    for _, parameter in net.named_parameters():
        parameter.data = random.standard_normal(parameter.shape).astype("float32") * 0.1
    return net, {"forward": {"x": nn.spec.Tensor([1, 16], "float32")}}


workspace = Workspace(Model.relax("mlp", mlp), Model.onnx("net", "net.onnx"))
"""
ZOO = f"""\
import sys
sys.path.append({str(ROOT)!r})
from bench import zoo
from pipeline import DOIT_CONFIG, Model, Workspace

workspace = Workspace(
    Model.onnx("squeezenet", lambda: zoo.load("squeezenet")),
    Model.onnx("shufflenet", lambda: zoo.load("shufflenet")),
    Model.onnx("cls", lambda: zoo.load("cls")),
)
"""


def two_builds(tmp_path: Path, dodo: str) -> list[Place]:
    """The same workspace in two places that have nothing in common but the machine, at the same time."""
    places, running = [], []
    for i, (user, deep, jobs, seed, zone) in enumerate(
        [("zebulon", "one", "1", "1", "UTC"), ("querida", "another/and/deeper", "3", "4242", "Asia/Tokyo")]
    ):
        home = tmp_path / f"home-{user}"
        home.mkdir()
        place = Place(home / deep / "workspace", home / f"cache-{user}", dodo, TARGETS)
        networks.convolutional(place.folder / "net.onnx", 8)
        people = dict.fromkeys(("USER", "LOGNAME", "USERNAME", "HOSTNAME"), user)
        said = {"TVMAKE_JOBS": jobs, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": ("C", "C.UTF-8")[i]}
        running.append(place.start(HOME=str(home), **said, **people))
        places.append(place)
    for place, outcome in zip(places, map(finish, running), strict=True):
        assert outcome.code == 0, outcome.output
        place.require_nobody_left()
    return places


def require_same_artifacts(places: list[Place]) -> dict[str, bytes]:
    one, other = (place.artifacts() for place in places)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    return one


def traces(tmp_path: Path) -> dict[str, re.Pattern[bytes]]:
    """What must not occur: paths, names of people and machines, and moments of today."""
    day = f"{int(time.time()):010d}"[:5]  # seconds since 1970: these five digits stay for more than a day
    words = {"folder": str(tmp_path), "home": os.path.expanduser("~"), "repository": str(ROOT)}
    words |= {f"user {name}": name for name in ("zebulon", "querida")}
    if len(name := getpass.getuser()) > 4:  # "root" is a word of TVM's too
        words["user"] = name
    if len(socket.gethostname()) > 4:
        words["machine"] = socket.gethostname()
    patterns = {what: re.escape(word.encode()) for what, word in words.items() if len(word) > 1}
    patterns["date"] = rb"\b20[2-9]\d-[01]\d-[0-3]\d\b"
    patterns["time"] = rb"\b[0-2]\d:[0-5]\d:[0-5]\d\b"
    patterns["seconds since 1970"] = rb"(?<![0-9A-Fa-f.])" + day.encode() + rb"\d{5}(?![0-9A-Fa-f])"
    return {what: re.compile(pattern) for what, pattern in patterns.items()}


def require_no_trace(tmp_path: Path, places: list[Place], artifacts: dict[str, bytes]) -> None:
    # What was made, not the libraries beside it.
    ours = {name: data for name, data in artifacts.items() if name.endswith(("lib.so", "manifest.json"))}
    files = {f"artifacts/{name}": data for name, data in ours.items()}
    for place in places:
        files |= {str(name): (place.store / name).read_bytes() for name in place.stored() if name.parts[0] == "ac"}
    for what, pattern in traces(tmp_path).items():
        for name, data in files.items():
            found = pattern.search(data)
            assert found is None, f"{name} holds a {what}: {data[max(0, found.start() - 60) : found.end() + 60]!r}"


def require_same_actions(places: list[Place]) -> int:
    """The same keys, components and outputs in both stores; only how long something ran may differ."""
    found = []
    for place in places:
        entries = {}
        for name in place.stored():
            if name.parts[0] == "ac":
                entry = json.loads((place.store / name).read_bytes().partition(b"\n")[2])
                del entry["seconds"]
                if entry["stage"] != "profile":
                    entries[name.name] = entry
        found.append(entries)
    assert found[0] == found[1]
    return len(found[0])


def test_the_default_models_are_the_same_bytes_everywhere(tmp_path: Path) -> None:
    places = two_builds(tmp_path, SMALL)
    artifacts = require_same_artifacts(places)
    assert {Path(name).name for name in artifacts} >= {"lib.so", "manifest.json", "weights.safetensors"}
    assert len({str(Path(name).parent) for name in artifacts}) == 4
    require_no_trace(tmp_path, places, artifacts)
    require_same_actions(places)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("rapidocr_onnxruntime") is None, reason="the zoo extra is not installed")
def test_real_networks_are_the_same_bytes_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = two_builds(tmp_path, ZOO)
    artifacts = require_same_artifacts(places)
    require_no_trace(tmp_path, places, artifacts)
    actions = require_same_actions(places)
    with capsys.disabled():
        size = sum(map(len, artifacts.values()))
        print(f"\n{len(artifacts)} files of artifacts, {size:,} bytes, and {actions} action entries are the same")
