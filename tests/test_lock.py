"""tuning.lock: the file itself, builds that follow it, `doit lock` that writes it, and two machines that share it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import models
import msgspec
import pytest
from conftest import Done, WorkspaceFolder
from hypothesis import given
from hypothesis import strategies as st
from test_libraries import MINE
from test_tune import NET, fill, implementations, lanes, plain, relu, right, sigmoid, tune

from pipeline.errors import ConfigError, StageError
from pipeline.hashing import Digest
from pipeline.lock import FILE, Entry, Following, Lock, pins_of, read, write
from pipeline.store import Pins, Store
from pipeline.tuning.records import (
    Certificate,
    Outcome,
    Record,
    RetestRecord,
    TrialRecord,
    WithdrawnRecord,
    decoded,
    encoded,
)
from pipeline.types import Workload

RELU, SIGMOID = "fused_matmul_relu", "fused_matmul_sigmoid"


def digest(text: str) -> str:
    return Digest.of(text.encode()).hash


def entry(name: str = "conv", **more: object) -> Entry:
    made = Entry("tuned", digest(name + "f"), digest(name), digest(name + "c"), 211e-6, 1.42)
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def workload(name: str = "conv", calls: int = 1) -> Workload:
    return Workload(name, Digest(digest(name), 1), "h", (), calls, False)


# the file


def test_the_text_is_this() -> None:
    lock = Lock({"native": {"conv-1": entry(), "add-2": Entry("rules", digest("g"), digest("add"))}, "empty": {}})
    lines = lock.text().splitlines()
    assert (
        'use = "onednn", version = "2023.2", function'
        in Lock({"native": {"conv-1": Entry("onednn", digest("f"), digest("w"), version="2023.2")}}).text()
    )
    body = [line for line in lines if line and not line.startswith("#")]
    assert all(line.startswith("#") for line in lines[:2])
    assert "doit lock" in "".join(lines[:2])
    assert body == [
        "format = 1",
        "[native]",
        f'"add-2" = {{ use = "rules", function = "{digest("g")}", workload = "{digest("add")}" }}',
        f'"conv-1" = {{ use = "tuned", us = 211.0, gain = 1.42, function = "{digest("convf")}", '
        f'candidate = "{digest("convc")}", workload = "{digest("conv")}" }}',
    ]


NAMES = st.text(min_size=1, max_size=12).filter(lambda text: text != "format")
HEX = st.text(alphabet="0123456789abcdef", min_size=64, max_size=64)
TIMES = st.none() | st.floats(min_value=1e-9, max_value=1e3)
GAINS = st.none() | st.floats(0.01, 1e6)
ENTRIES = st.builds(Entry, NAMES, HEX, HEX, st.just("") | HEX, TIMES, GAINS, st.just("") | NAMES)
LOCKS = st.builds(Lock, st.dictionaries(NAMES, st.dictionaries(NAMES, ENTRIES, min_size=1, max_size=3), max_size=3))


@given(LOCKS)
def test_what_was_written_is_read_and_written_the_same(lock: Lock) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        assert write(path, lock)
        found = read(path)
        assert found is not None
        assert found.text() == lock.text()
        assert {t: set(of) for t, of in found.targets.items()} == {t: set(of) for t, of in lock.targets.items()}
        for target, entries in lock.targets.items():
            assert all(each.same(found.targets[target][label]) for label, each in entries.items())
        assert not write(path, found), "it says so already"
        assert os.listdir(folder) == [FILE]


def test_one_decision_is_one_line() -> None:
    before = Lock({"native": {f"conv-{i}": entry(str(i)) for i in range(9)}})
    after = Lock({"native": {**before.targets["native"], "conv-4": entry("4", candidate=digest("other"))}})
    changed = set(before.text().splitlines()) ^ set(after.text().splitlines())
    assert [line.partition(" ")[0] for line in changed] == ['"conv-4"'] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "does not say its format"),
        ("format = 0\n", "does not say its format"),
        ('format = "1"\n', "does not say its format"),
        ("format = 2\n[native]\n", "reads format 1"),
        ("format = 1\n[native\n", "is broken"),
        ("format = 1\nnative = 3\n", "is broken"),
        ('format = 1\n[native]\n"a" = { use = "rules" }\n', "is broken"),
        ('format = 1\n[native]\n"a" = { use = "rules", function = "12", workload = "34" }\n', "64 digits"),
        (
            f'format = 1\n[n]\na = {{ use = "r", us = -1.0, function = "{"0" * 64}", workload = "{"0" * 64}" }}\n',
            "broken",
        ),
        ("format = 1\n<<<<<<< HEAD\n[native]\n=======\n[other]\n>>>>>>> branch\n", "merge"),
        (b"\xff\xfe", "no text"),
        (None, "Is a directory"),
    ],
)
def test_what_is_no_lock_is_told_in_one_sentence_and_stays(tmp_path: Path, text: str | bytes | None, said: str) -> None:
    path = tmp_path / FILE
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as failed:
        read(path)
    assert said in str(failed.value)
    assert failed.value.hint
    assert path.is_dir() if text is None else path.read_bytes() == (text.encode() if isinstance(text, str) else text)


def test_a_target_of_a_name_that_the_file_needs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a target called format"):
        write(tmp_path / FILE, Lock({"format": {"conv-1": entry()}}))
    assert not list(tmp_path.iterdir())


def test_there_may_be_none(tmp_path: Path) -> None:
    assert read(tmp_path / FILE) is None
    assert not Following.of(tmp_path).is_followed
    with pytest.raises(ConfigError, match=r"no tuning\.lock"):
        Following.of(tmp_path, strict=True)


# following it


def test_what_it_has_is_followed_and_what_it_has_not_is_told() -> None:
    lock = Lock({"native": {"conv-1": entry()}})
    following = Following(lock)
    assert following.entry("native", workload()) == entry()
    assert following.entry("other", workload()) is None, "each target has its own"
    assert following.is_whole("native", [digest("conv")])
    assert following.entry("native", workload("add")) is None
    assert following.entry("native", workload("layout", calls=0)) is None
    assert not following.is_whole("native", [digest("conv"), digest("add")])
    known = {digest(name): workload(name) for name in ("conv", "add", "layout")}
    assert following.problems("native", known) == [f"{workload('add').label} is not in tuning.lock: doit lock"]
    assert following.problems("native", {}) == []
    with pytest.raises(StageError, match=r"dispatch of native:add-\w+ failed: it is not in tuning\.lock"):
        Following(lock, strict=True).entry("native", workload("add"))


def test_what_cannot_be_followed_is_grouped_by_why() -> None:
    known = {digest(str(i)): workload(str(i)) for i in range(9)}
    following = Following(Lock())
    for each in known.values():
        following.cannot("native", each, ConfigError("the library is not installed", hint="install it"))
    (said,) = following.problems("native", known)
    assert "and 4 more" in said
    assert "the library is not installed" in said
    assert said.endswith("doit lock")
    strict = Following(Lock(), strict=True)
    with pytest.raises(StageError, match="not installed") as failed:
        strict.cannot("native", workload(), ConfigError("the library is not installed"))
    assert "doit lock 'conv-" in failed.value.hint


def test_while_a_lock_is_written_what_is_meant_is_free() -> None:
    following = Following(Lock({"native": {"a": entry("a"), "b": entry("b")}}), anew=lambda each: each.name == "a")
    assert following.entry("native", workload("a")) is None
    assert following.entry("native", workload("b")) == entry("b")
    assert following.entry("native", workload("c")) is None
    assert following.problems("native", {digest(name): workload(name) for name in "abc"}) == []


def test_what_is_held_back_is_told_in_one_line() -> None:
    following = Following(Lock({}))
    known = {digest(name): workload(name) for name in "abc"}
    for name, ratio in (("a", 1.3), ("b", 1.1), ("c", 1.0)):
        following.better("native", known[digest(name)], ratio)
    assert following.problems("native", known) == [
        "tuning.lock holds back 2 better winners (up to 1.3 times): doit lock"
    ]


# builds


class Machine:
    """A workspace with two tuned operators, whose best candidates are as the test says."""

    def __init__(self, workspace: WorkspaceFolder, environment: dict[str, str] | None = None) -> None:
        self.workspace = workspace
        self.environment = environment or {}

    def build(self, *arguments: str, **more: str) -> Done:
        return self.workspace.build(*arguments, **{**self.environment, **more})

    def lock(self, *arguments: str, **more: str) -> Done:
        return self.workspace.doit("lock", *arguments, **{**self.environment, **more})

    @property
    def path(self) -> Path:
        return self.workspace.folder / FILE

    def entries(self) -> dict[str, Entry]:
        """By the operators' names without their digests."""
        found = read(self.path)
        assert found is not None
        return {plain(label): each for label, each in found.targets["native"].items()}

    def artifact(self) -> dict[str, bytes]:
        return self.workspace.artifact_bytes("net")

    def key(self, operator: str) -> str:
        sets = Store(self.workspace.cache).sets
        (key,) = [key for key in sets.all_keys() if sets.about(key)["operator"] == operator]
        return key

    def candidates(self, operator: str) -> list[TrialRecord]:
        """What was tried, in one order always."""
        found = [decoded(data) for _, data in Store(self.workspace.cache).sets.read(self.key(operator))]
        trials = {each.candidate: each for each in found if isinstance(each, TrialRecord)}
        return [trials[name] for name in sorted(trials)]

    def win(self, operator: str, number: int, gain: float) -> str:
        """Has a candidate be so many times as fast as the baseline; returns its digest."""
        trial = self.candidates(operator)[number]
        certificate = Certificate("default", (0, 1), 1e-3, 1e-6)
        won = RetestRecord(
            candidate=trial.candidate,
            seconds=1.0 / gain,
            baseline=1.0,
            noise=0.0,
            certificate=certificate,
            at=time.time(),
            tools=trial.tools,
        )
        sets, key = Store(self.workspace.cache).sets, self.key(operator)
        sets.add(key, [encoded(won)], sets.about(key))
        return trial.candidate

    def rewrite(self, operator: str, change: Callable[[Record], Record]) -> None:
        """Has the records of an operator be others."""
        sets, key = Store(self.workspace.cache).sets, self.key(operator)
        members, about = [encoded(change(decoded(data))) for _, data in sets.read(key)], sets.about(key)
        shutil.rmtree(self.workspace.cache / "sets" / key[:2] / key)
        sets.add(key, members, about)

    def change(self, operator: str, **more: str) -> None:
        """Edits one line of the lock."""
        text = self.path.read_text()
        (line,) = [each for each in text.splitlines() if each.startswith(f'"{operator}')]
        other = line
        for name, value in more.items():
            other = re.sub(rf'{name} = "[^"]*"', f'{name} = "{value}"', other)
        assert other != line
        self.workspace.write(FILE, text.replace(line, other))


def lines_changed(before: str, after: str) -> list[str]:
    return sorted(set(after.splitlines()) - set(before.splitlines()))


@pytest.fixture(scope="module")
def tuned_once(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    """Two operators, for each of which four candidates were tried."""
    workspace = new_workspace()
    fill(workspace, "Relu", "Sigmoid")
    tune(workspace).done.good()
    machine = Machine(workspace)
    for operator in (RELU, SIGMOID):
        for number in range(4):
            machine.win(operator, number, 1000.0 if number == 0 else 500.0 + number)
    machine.build().good()
    return workspace


@pytest.fixture
def machine(tuned_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> Machine:
    return copied(tuned_once, new_workspace())


@pytest.fixture(scope="module")
def locked_once(tuned_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    machine = copied(tuned_once, new_workspace())
    machine.lock().good()
    return machine.workspace


@pytest.fixture
def locked(locked_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> Machine:
    return copied(locked_once, new_workspace())


def copied(one: WorkspaceFolder, other: WorkspaceFolder, store: bool = True) -> Machine:
    shutil.rmtree(other.folder)
    shutil.copytree(one.folder, other.folder)
    if store:
        shutil.copytree(one.cache, other.cache)
    return Machine(other)


def test_it_is_written_followed_and_nothing_is_left_to_do(machine: Machine) -> None:
    free = machine.artifact()
    done = machine.lock().good()
    assert done.last == "tuning.lock: 2 operators, 2 new"
    found = machine.entries()
    assert {name: each.candidate for name, each in found.items()} == {
        operator: machine.candidates(operator)[0].candidate for operator in (RELU, SIGMOID)
    }
    assert found[RELU].gain == 1000.0
    assert found[RELU].seconds == 0.001
    machine.workspace.idle_build()
    machine.workspace.idle_build("--locked")
    assert machine.artifact()["lib.so"] == free["lib.so"]
    (one, other) = machine.workspace.manifest("net")["operators"]
    assert one["reason"] == other["reason"] == "tuning.lock"
    assert [each["strategy"] for each in one["candidates"]] == ["tuned"]
    text = machine.path.read_text()
    assert str(machine.workspace.folder) not in text
    again = machine.lock().good()
    assert again.last == "tuning.lock: 2 operators, nothing changed"
    assert again.out == ""
    assert machine.path.read_text() == text
    machine.workspace.idle_build("--locked")


def test_a_better_record_changes_nothing_until_it_is_locked(machine: Machine) -> None:
    machine.lock().good()
    text, made = machine.path.read_text(), machine.artifact()
    better = machine.win(RELU, 2, 1300.0)

    done = machine.build().good()
    assert done.compiled == 0
    assert not done.ran["linked"]
    assert machine.artifact() == made
    assert "WARNING native: tuning.lock holds back a better winner (1.3 times): doit lock" in done.err
    machine.workspace.idle_build()
    machine.workspace.idle_build("--locked")

    shown = machine.lock("-n").good()
    assert "not written" in shown.last
    assert machine.path.read_text() == text
    assert machine.artifact() == made
    locked = machine.lock().good()
    assert shown.out == locked.out
    assert re.search(rf"native:{RELU}-\w+ +tuned \w+ → tuned {better[:8]} .* 1000\.00x → 1300\.00x", locked.out)
    (line,) = lines_changed(text, machine.path.read_text())
    assert line.startswith(f'"{RELU}')
    assert "gain = 1300.0" in line
    assert locked.last == "tuning.lock: 2 operators, 1 changed"
    assert machine.artifact() != made
    machine.workspace.idle_build("--locked")
    right(machine.workspace, relu, sigmoid)


def test_only_what_is_named_is_chosen_anew(locked: Machine) -> None:
    text = locked.path.read_text()
    for operator in (RELU, SIGMOID):
        locked.win(operator, 2, 1300.0)
    assert locked.lock("nothing*").code == 2
    assert locked.path.read_text() == text
    assert locked.lock("*sigmoid*").good().last == "tuning.lock: 2 operators, 1 changed"
    (line,) = lines_changed(text, locked.path.read_text())
    assert line.startswith(f'"{SIGMOID}')
    assert implementations(locked.workspace) == {RELU: "tuned", SIGMOID: "tuned"}


def test_what_was_thrown_away_or_is_no_longer_the_best_is_still_what_is_locked(locked: Machine) -> None:
    made = locked.artifact()
    sets, key = Store(locked.workspace.cache).sets, locked.key(RELU)
    gone = WithdrawnRecord(records=tuple(sets.names(key)), measured=True, at=time.time())
    sets.add(key, [encoded(gone)], sets.about(key))
    locked.build("--locked").good()
    assert locked.artifact() == made


def test_an_operator_without_a_line(machine: Machine) -> None:
    done = machine.lock("*sigmoid*").good()
    assert list(machine.entries()) == [SIGMOID]
    assert re.search(rf"WARNING native: {RELU}-\w+ is not in tuning\.lock: doit lock", done.err)
    machine.workspace.idle_build()
    before = machine.artifact()
    failed = machine.build("--locked")
    assert failed.code == 1
    ((task, said),) = failed.failures.items()
    assert RELU in task
    assert "is not in tuning.lock" in said
    assert f"doit lock '{RELU}-" in said
    assert machine.artifact() == before, "what was there stays"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"candidate": "0" * 64}, "is neither here nor on a remote"),
        pytest.param({"function": "0" * 64}, "another function of it than the locked one", marks=pytest.mark.slow),
        pytest.param({"use": "onednn"}, "onednn is not in the order of targets/native.toml", marks=pytest.mark.slow),
        ({"use": "default"}, "another function of it than the locked one"),
        pytest.param({"workload": "0" * 64}, "is not in tuning.lock", marks=pytest.mark.slow),
    ],
)
def test_a_line_that_cannot_be_followed(locked: Machine, change: dict[str, str], said: str) -> None:
    made = locked.artifact()
    locked.change(RELU, **change)
    failed = locked.build("--locked")
    assert failed.code == 1
    (told,) = failed.failures.values()
    assert f"dispatch of native:{RELU}-" in told
    assert said in told
    assert "→" in told
    assert locked.artifact() == made
    done = locked.build().good()
    assert said in done.err
    assert RELU in next(line for line in done.err.splitlines() if said in line)
    locked.workspace.idle_build()
    assert locked.artifact()["lib.so"] == made["lib.so"], "the free choice is the same here"
    assert locked.build("--locked").code == 1, "a build that made do is not enough"


def test_what_another_compiler_made_is_compared_before_it_is_used(locked: Machine) -> None:
    made = locked.artifact()

    def older(record: Record) -> Record:
        is_made = isinstance(record, TrialRecord | RetestRecord)
        return msgspec.structs.replace(record, tools={"tvm": "0.1"}) if is_made else record

    locked.rewrite(RELU, older)
    done = locked.build("--locked").good()
    assert "timed the candidates" in done.err, done.err
    assert {plain(name) for name in re.findall(r"timed the candidates of native:(\S+)", done.err)} == {RELU}
    assert locked.artifact() == made


def test_what_is_wrong_is_not_built(locked: Machine) -> None:
    sets, key = Store(locked.workspace.cache).sets, locked.key(RELU)
    wrong = msgspec.structs.replace(locked.candidates(RELU)[0], outcome=Outcome.WRONG, seconds=None, at=time.time())
    sets.add(key, [encoded(wrong)], sets.about(key))
    assert "was found to be wrong" in locked.build("--locked").err
    assert "was found to be wrong" in locked.build().good().err


def test_a_space_that_makes_another_function(locked: Machine) -> None:
    locked.workspace.write("spaces/lanes.py", lanes().replace("schedule.split(loops[0], [None, rows])", "pass"))
    assert "makes another function" in locked.build("--locked").err
    locked.workspace.write("spaces/lanes.py", lanes())
    locked.build("--locked").good()


def test_a_library_of_another_version_or_none(workspace: WorkspaceFolder) -> None:
    workspace.onnx("net.onnx", models.dense())
    workspace.dodo(NET)
    workspace.write("libraries/mine.py", MINE)
    workspace.write("targets/native.toml", 'target = "native"\norder = ["library", "default"]\nlibraries = ["mine"]\n')
    machine = Machine(workspace)
    assert re.search(r"not locked → mine 1", machine.lock().good().out)
    (found,) = machine.entries().values()
    assert (found.use, found.version) == ("mine", "1")
    assert 'use = "mine", version = "1"' in machine.path.read_text()
    workspace.idle_build("--locked")
    workspace.write("libraries/mine.py", MINE.replace('Installed("1"', 'Installed("2"'))
    assert "mine 1 is locked, and 2 is what is installed here" in machine.build("--locked").err
    workspace.write("libraries/mine.py", MINE.replace('return Installed("1", (), {})', "return None"))
    assert "mine offers nothing for it here" in machine.build("--locked").err
    assert "mine offers nothing for it here" in machine.build().good().err
    assert set(implementations(workspace).values()) == {"default"}


def test_rules_that_forbid_what_is_locked(locked: Machine) -> None:
    path = locked.workspace.folder / "targets/native.toml"
    rule = '[[operators]]\nmatch = "*relu*"\nforbid = ["tuned"]\n'
    locked.workspace.write("targets/native.toml", path.read_text() + rule)
    assert "forbids tuned" in locked.build("--locked").err
    done = locked.build().good()
    assert "forbids tuned" in done.err
    assert implementations(locked.workspace)[RELU] == "default"


@pytest.mark.parametrize("text", ["format = 9\n", "<<<<<<< HEAD\n", "nonsense\n"])
def test_a_broken_lock_stops_every_command_and_stays(machine: Machine, text: str) -> None:
    machine.workspace.write(FILE, text)
    for run in (machine.build, machine.lock):
        done = run()
        assert done.code == 2
        assert done.err.count("ERROR") == 1
        assert "FAILED" not in done.err
        assert "tuning.lock" in done.err
        assert machine.path.read_text() == text
    assert machine.build("--locked").code == 2


def test_plain_doit_follows_it_as_well(locked: Machine) -> None:
    made = locked.artifact()
    locked.win(RELU, 2, 1300.0)
    locked.workspace.doit().good()
    assert locked.artifact() == made
    locked.workspace.write(FILE, "nonsense\n")
    done = locked.workspace.doit()
    assert done.code != 0
    assert "tuning.lock is broken" in done.out + done.err
    assert "Traceback" not in done.out + done.err
    assert locked.artifact() == made


def test_without_a_lock_there_is_nothing_to_be_exact_about(machine: Machine) -> None:
    machine.build().good()
    done = machine.build("--locked")
    assert done.code == 2
    assert "there is no tuning.lock to build by" in done.err
    assert "doit lock" in done.err
    machine.lock().good()
    reasons = [each["reason"] for each in machine.workspace.manifest("net")["operators"]]
    machine.path.unlink()
    machine.build().good()
    assert reasons != [each["reason"] for each in machine.workspace.manifest("net")["operators"]]


def test_where_a_model_fails_nothing_is_written(locked: Machine) -> None:
    text, made = locked.path.read_text(), locked.artifact()
    locked.workspace.write("bad.onnx", b"this is no model")
    locked.workspace.dodo(f'{NET},\nModel.onnx("bad", "bad.onnx")')
    locked.win(RELU, 2, 1300.0)
    done = locked.lock()
    assert done.code == 1
    assert "was left as it is" in done.err
    assert locked.path.read_text() == text
    assert locked.artifact() == made


def test_what_no_model_has_goes_and_what_is_left_out_stays(machine: Machine) -> None:
    machine.workspace.onnx("other.onnx", models.dense())
    machine.workspace.dodo(f'{NET},\nModel.onnx("other", "other.onnx")')
    machine.workspace.write("targets/second.toml", (machine.workspace.folder / "targets/native.toml").read_text())
    machine.lock().good()
    found = read(machine.path)
    assert found is not None
    assert {target: len(of) for target, of in found.targets.items()} == {"native": 3, "second": 3}
    text = machine.path.read_text()
    machine.workspace.dodo(NET)
    assert machine.lock("-t", "second").good().last == "tuning.lock: 5 operators, 1 gone"
    machine.workspace.write(FILE, text)
    (machine.workspace.folder / "targets/second.toml").unlink()
    assert machine.lock("-m", "net", "-n").good().last.startswith("tuning.lock: 3 operators, 3 gone")
    assert machine.lock().good().last == "tuning.lock: 2 operators, 4 gone"
    names = [name for name in Pins(machine.workspace.cache).names() if name.startswith("lock-")]
    assert len(names) == 1


def test_what_is_locked_stays_in_the_store(locked: Machine) -> None:
    pins = Pins(locked.workspace.cache)
    (original,) = pins.names()
    pins.remove(original)  # of the workspace that this one is a copy of
    locked.build().good()
    (name,) = pins.names()
    assert name.startswith(pins_of(locked.workspace.folder))
    for kind in ("ac", "cas"):
        for path in (locked.workspace.cache / kind).rglob("*"):
            os.utime(path, (0, 0))
    locked.workspace.doit("cache", "gc", "--size", "0")
    shutil.rmtree(locked.workspace.folder / "artifacts")
    (locked.workspace.folder / ".doit.db").unlink()
    assert not locked.build("--locked", forbid_tvm=True).good().ran
    locked.path.unlink()
    locked.build().good()
    assert pins.names() == []


def test_tuning_looks_past_it(locked: Machine) -> None:
    text = locked.path.read_text()
    locked.workspace.write(
        "spaces/lanes.py", lanes([[16, 1], [8, 1], [4, 1], [2, 1], [16, 2]]).replace("version = 1", "version = 2")
    )
    night = tune(locked.workspace, "*relu*")
    night.done.good()
    assert night.trials[RELU] >= 1
    assert locked.path.read_text() == text


# two machines


def test_two_machines_and_one_remote(
    tuned_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder], tmp_path: Path
) -> None:
    remote = {"TVMAKE_REMOTE": (tmp_path / "shared").as_uri()}
    one, other = copied(tuned_once, new_workspace()), copied(tuned_once, new_workspace(), store=False)
    one.environment = other.environment = remote
    one.lock().good()
    one.workspace.doit("cache", "push", **remote).good()
    shutil.rmtree(other.workspace.folder / "artifacts")
    other.workspace.write(FILE, one.path.read_bytes())
    one.win(RELU, 2, 1300.0)
    one.build().good()
    one.workspace.doit("cache", "push", **remote).good()
    done = other.build("--locked").good()
    assert done.compiled == 0
    assert other.artifact() == one.artifact()


def test_two_machines_that_share_nothing_but_records(
    tuned_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    one, other = copied(tuned_once, new_workspace()), copied(tuned_once, new_workspace(), store=False)
    one.lock().good()
    shutil.rmtree(other.workspace.folder / "artifacts")
    other.workspace.write(FILE, one.path.read_bytes())
    failed = other.build("--locked")
    assert failed.code == 1
    assert len(failed.failures) == 2
    # What comes by way of a database is only claimed: it counts as far as it goes, and is compared first.
    theirs, ours = Store(one.workspace.cache).sets, Store(other.workspace.cache).sets
    for operator in (RELU, SIGMOID):
        key = one.key(operator)
        locked = next(each for each in one.candidates(operator) if each.candidate == one.entries()[operator].candidate)
        claim = msgspec.structs.replace(locked, outcome=Outcome.CLAIMED, certificate=None, cost=0.0, run="else")
        ours.add(key, [encoded(claim)], theirs.about(key))
    done = other.build("--locked").good()
    assert done.compiled == 2
    assert other.artifact() == one.artifact()


def test_two_machines_and_a_database_of_metaschedules(
    workspace: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    """What is imported is only claimed, and yet is what the lock names: it is compared, and then used."""
    import tvm
    from tvm import s_tir

    from pipeline.compiler import ir
    from tests.compiler.strategies.workloads import commit

    def split(schedule: s_tir.Schedule) -> None:
        (block, *_) = schedule.get_child_blocks(schedule.get_sblock("root"))
        schedule.split(schedule.get_loops(block)[1], [None, 4])

    for each in (workspace, other := new_workspace()):
        each.onnx("net.onnx", models.dense())
        each.dodo(NET)
        each.write("targets/native.toml", 'target = "native"\norder = ["tuned", "default"]\n')
        each.build().good()
    one, (operator,) = Machine(workspace), [each["workload"] for each in workspace.manifest("net")["operators"]]
    function = ir.load((workspace.cache / "cas" / operator[:2] / operator).read_bytes())
    assert isinstance(function, tvm.tirx.PrimFunc)
    commit(workspace.folder / "first", function, split, [1e-3])
    workspace.doit("records", "import", "first").good()
    name = workspace.manifest("net")["operators"][0]["name"].rpartition("-")[0]
    sets, key = Store(workspace.cache).sets, one.key(name)
    (claim,) = one.candidates(name)
    right = Certificate("default", (0, 1), 1e-3, 1e-6)
    timed = msgspec.structs.replace(claim, outcome=Outcome.TIMED, baseline=2e-3, certificate=right, at=1.0)
    sets.add(key, [encoded(timed)], sets.about(key))
    one.win(name, 0, 1000.0)
    one.lock().good()
    assert one.entries()[name].use == "tuned"
    workspace.doit("records", "export", "second").good()

    shutil.copytree(workspace.folder / "second", other.folder / "second")
    other.doit("records", "import", "second").good()
    other.write(FILE, one.path.read_bytes())
    assert "timed the candidates" in other.build("--locked").good().err
    assert other.artifact_bytes("net") == one.artifact()


def test_what_was_tuned_on_another_device_is_found(locked: Machine) -> None:
    made = locked.artifact()
    sets = Store(locked.workspace.cache).sets
    for operator in (RELU, SIGMOID):
        key = locked.key(operator)
        members = [data for _, data in sets.read(key)]
        about = sets.about(key)
        shutil.rmtree(locked.workspace.cache / "sets" / key[:2] / key)
        sets.add(digest(key), members, about)
    locked.build("--locked").good()
    assert locked.artifact() == made


def test_what_is_timed_on_each_machine_is_not_in_what_follows_a_lock(workspace: WorkspaceFolder) -> None:
    """`fastest` may choose otherwise on every machine; by a lock nothing is timed."""
    workspace.onnx("net.onnx", models.dense())
    workspace.dodo(NET)
    workspace.write("targets/native.toml", 'target = "native"\norder = ["rules", "default"]\nselect = "fastest"\n')
    machine = Machine(workspace)
    machine.lock().good()
    made = machine.artifact()
    (found,) = machine.entries().values()
    assert found.use in ("rules", "default")
    assert found.seconds
    shutil.rmtree(workspace.cache)
    shutil.rmtree(workspace.folder / "artifacts")
    done = machine.build("--locked").good()
    assert "timed the candidates" not in done.err
    assert machine.artifact() == made
    assert b"seconds" not in machine.artifact()["manifest.json"].partition(b'"operators"')[2].replace(
        b'"seconds": null', b""
    )


def test_the_changes_as_json(machine: Machine) -> None:
    told = json.loads(machine.lock("--json", "-n").good().out)
    assert {plain(each["operator"]): each["after"]["use"] for each in told} == {RELU: "tuned", SIGMOID: "tuned"}
    assert all(each["before"] is None for each in told)
    assert not machine.path.exists()
