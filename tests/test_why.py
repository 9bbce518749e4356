"""`doit why` tells the right cause: each test changes one thing in a workspace, builds it in earnest, and reads.

All share one store and its workers, so that only what changed is made; the builds run in this process, where the
version of a tool or a stage can be another, and the command in its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
from conftest import WorkspaceFolder
from test_libraries import MINE
from test_strategies import MANUAL, RIGHT
from test_tracking import SCALED
from test_tune import lanes

from pipeline import stages
from pipeline.build import Build
from pipeline.compiler import strategies
from pipeline.hashing import Digest
from pipeline.journal import Journal
from pipeline.memoizer import Memoizer
from pipeline.models import Model
from pipeline.processor import device
from pipeline.remotes import open_remote
from pipeline.remotes.cache import RemoteCache
from pipeline.remotes.settings import Policy
from pipeline.store import Store
from pipeline.toolchain import Toolchain, detect
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import (
    NONE,
    TOOLS,
    Certificate,
    Outcome,
    PreferredRecord,
    RetestRecord,
    TrialRecord,
    WithdrawnRecord,
    encoded,
)
from pipeline.why.causes import _once
from pipeline.why.changes import ABSENT, Change, changes
from pipeline.why.words import TABLE, About, Cause, cause
from pipeline.workers import Workers

DENSE = "fused_matmul_add_relu"


@dataclasses.dataclass
class Bench:
    """A workspace whose builds run in this process."""

    place: WorkspaceFolder
    workers: Workers
    tools: dict[str, str]

    def target(self, order: list[str], **more: object) -> None:
        lines = ['target = "native"', 'layout = "as-is"', f"order = {json.dumps(order)}"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in more.items() if name != "tail"]
        lines += ["[measure]", "profile = false", "patience = 10", "seconds = 0.01", str(more.get("tail", ""))]
        self.place.write("targets/native.toml", "\n".join(lines))

    def model(self, made: Any) -> None:
        self.place.onnx("net.onnx", made)

    def build(self, cache: Path | None = None, remote: RemoteCache | None = None, **tools: str) -> Build:
        store = Store(cache or self.place.cache)
        workers = self.workers if cache is None else Workers(cache, 1)
        made = Build(self.place.folder, Memoizer(store, workers, Toolchain({**self.tools, **tools}), remote))
        try:
            made.artifact("native", Model.onnx("net", "net.onnx"))
        finally:
            if cache is not None:
                workers.stop()
        return made

    def why(self, name: str = "fused_*", *arguments: str, cache: Path | None = None, code: int = 0) -> str:
        done = self.place.doit("why", name, *arguments, TVMAKE_CACHE=str(cache or self.place.cache))
        assert done.code == code, done.out + done.err
        assert "Traceback" not in done.err
        return done.out + done.err

    def last(self, name: str = "fused_*") -> str:
        """What is told of the last build of one operator."""
        return self.why(name).partition("last build")[2].partition("comes from")[0].partition("  before  ")[0]

    def builds(self) -> list[Any]:
        return Journal(self.place.folder, "native", "net").builds()

    @property
    def key(self) -> str:
        """Of the only operator's records."""
        build = self.builds()[-1].state
        (operator,) = build.operators.values()
        return Ledger.key_of(operator.workload.hash, build.attributes, device())


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Workers]]:
    root = tmp_path_factory.mktemp("common") / "store"
    Store(root, durable=False)
    workers = Workers(root, 1, durable=False)
    yield root, workers
    workers.stop()


@pytest.fixture
def bench(tmp_path: Path, common: tuple[Path, Workers], no_tvm: Path) -> Bench:
    place = WorkspaceFolder(tmp_path / "workspace", common[0], no_tvm)
    place.dodo('Model.onnx("net", "net.onnx"),')
    made = Bench(place, common[1], dict(detect().identities))
    made.target(["default"])
    made.model(models.dense())
    return made


# what the model is


def test_a_layers_shape(bench: Bench) -> None:
    bench.build()
    bench.model(models.dense(rows=3))
    bench.build()
    said = bench.last()
    assert "the operator is new" in said
    assert "net.onnx changed" in said
    assert "shape of parameter 0: 2x4:float32 → 3x4:float32" in said
    assert "shape of parameter 3: 2x8:float32 → 3x8:float32" in said
    assert f"most likely it was {DENSE}-" in said
    assert "\n                -" in said
    assert "T.int64(3)" in said
    assert bench.why("net").count("new: ") == 1


def test_an_epilogue(bench: Bench) -> None:
    bench.model(models.chain("Relu", "Sigmoid", "Relu"))
    bench.build()
    bench.model(models.chain("Relu", "Tanh", "Relu"))
    bench.build()
    said = bench.last("fused_matmul_tanh")
    assert "operators in it: fused_matmul_sigmoid → fused_matmul_tanh" in said
    assert "+            b2[v8, v9] = T.tanh(b3[v8, v9])" in said
    assert "nothing changed since the build of" in bench.last("fused_matmul_relu")
    model = bench.why("net")
    assert "most likely fused_matmul_sigmoid-" in model
    assert "unchanged: 1 operator\n" in model


def test_a_layer_more_that_is_the_same_operator(bench: Bench) -> None:
    bench.model(models.chain("Relu"))
    bench.build()
    bench.model(models.chain("Relu", "Relu"))
    bench.build()
    assert "calls in one inference: 1 → 2" in bench.last()
    assert "calls in one inference: 1 → 2" in bench.why("net")


def test_the_difference_of_ir_without_the_blob(bench: Bench) -> None:
    bench.build()
    bench.model(models.dense(activation="Tanh"))
    bench.build()
    Journal(bench.place.folder, "native", "net")
    store = Store(bench.place.cache)
    (old,) = bench.builds()[0].state.operators.values()
    path = store.path(old.workload)
    assert path is not None
    aside = path.with_name("aside")
    path.rename(aside)
    try:
        assert f"cannot be shown: the store has no blob {old.workload} any more" in bench.last()
    finally:
        aside.rename(path)


def test_a_models_file_edited_without_effect(bench: Bench) -> None:
    bench.build()
    made = models.dense()
    made.doc_string = "for people"
    bench.model(made)
    bench.build()
    assert "net.onnx changed, but what it says is the same: nothing was made again for it" in bench.why("net")
    assert "nothing changed since" in bench.last()
    made.graph.node[0].name = "another"
    bench.model(made)
    bench.build()
    said = bench.why("net")
    assert "net.onnx changed, but its operators and weights are the same\n" in said
    assert "unchanged: 1 operator\n" in said


def test_a_file_that_a_function_of_the_users_reads(workspace: WorkspaceFolder) -> None:
    workspace.write("nets.py", SCALED)
    workspace.dodo('Model.onnx("model", nets.scaled),', "import nets")
    workspace.build().good()
    workspace.edit("SCALE = 2.0", "SCALE = 3.0", "nets.py")
    workspace.build().good()
    said = workspace.doit("why", "model", forbid_tvm=True).good().out
    assert "nets.py changed\n" in said
    assert "unchanged: 1 operator\n" in said
    workspace.edit('"Mul"', '"Div"', "nets.py")
    workspace.build().good()
    said = workspace.doit("why", "divide").good().out
    assert "the operator is new" in said
    assert "nets.py changed\n" in said
    assert "operators in it: multiply → divide" in said


def test_other_weights(bench: Bench) -> None:
    bench.build()
    bench.model(models.dense(seed=7))
    bench.build()
    said = bench.why("net")
    assert "net.onnx changed\n" in said
    assert "weight w of the model changed" in said
    assert "nothing changed since" in bench.last()


# what it is built for, and how


def test_a_targets_attribute(bench: Bench) -> None:
    def target(cores: int) -> str:
        table = f'{{kind = "llvm", mtriple = "x86_64-linux-gnu", num-cores = {cores}}}'
        return f'target = {table}\norder = ["default"]\ncheck.enabled = false\nmeasure.profile = false\n'

    bench.place.write("targets/native.toml", target(4))
    bench.build()
    bench.place.write("targets/native.toml", target(8))
    bench.build()
    assert "target attribute num-cores: 4 → 8" in bench.last()
    assert "target attribute num-cores: 4 → 8" in bench.why("net")


def test_the_order_of_strategies(bench: Bench) -> None:
    bench.build()
    bench.target(["rules", "default"])
    bench.build()
    said = bench.last()
    assert "the order of strategies changed: default → rules, default" in said
    assert "compiled from another function" in said
    assert "runs on     rules: the first in the order that applies" in bench.why()
    bench.target(["rules"])
    bench.build()
    assert "compiled from another" not in bench.last()


def test_a_rule_for_operators(bench: Bench) -> None:
    bench.target(["rules", "default"])
    bench.build()
    bench.target(["rules", "default"], tail='[[operators]]\nmatch = "fused_matmul*"\nforbid = ["rules"]')
    bench.build()
    assert "the [[operators]] of the target's file that match it changed" in bench.last()
    bench.target(["rules", "default"])
    bench.build()
    bench.target(["rules", "default"], tail='[[operators]]\nmatch = "conv2d*"\nforbid = ["rules"]')
    bench.build()
    assert "[[operators]]" not in bench.last()
    assert "the [[operators]] of the target's file changed" in bench.why("net")


def test_fastest_instead_of_first(bench: Bench) -> None:
    bench.target(["rules", "default"])
    bench.build()
    bench.target(["rules", "default"], select="fastest")
    bench.build()
    said = bench.why()
    assert "select of the target's file: first → fastest" in said
    assert "rules: " in said
    assert "not timed" not in said


def test_a_librarys_version(bench: Bench) -> None:
    bench.target(["mine", "default"])
    bench.place.write("libraries/mine.py", MINE)
    bench.build()
    assert "runs on     mine" in bench.why()
    bench.place.write("libraries/mine.py", MINE.replace('Installed("1"', 'Installed("2"'))
    bench.build()
    assert "library mine: 1 → 2" in bench.last()
    bench.place.write("libraries/mine.py", MINE.replace('Installed("1"', 'Installed("2"') + "# a\n# b\n")
    bench.build()
    assert "libraries/mine.py changed: 2 lines" in bench.last()


def test_a_stages_version(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.build()
    monkeypatch.setattr(stages, "CODEGEN", dataclasses.replace(stages.CODEGEN, version=99))
    bench.build()
    assert f"stage codegen: version {_version('CODEGEN', monkeypatch)} → 99" in bench.last()
    bench.build()
    monkeypatch.setattr(stages, "APPLY", dataclasses.replace(stages.APPLY, version=98))
    bench.build()
    said = bench.last()
    assert "stage apply: version" in said
    assert "→ 98" in said
    assert "codegen: version" not in said


def _version(name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.undo()
    return int(getattr(stages, name).version)


def test_a_strategys_version(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.target(["rules", "default"])
    bench.build()
    rules = strategies.by_name("rules")
    was = rules.version
    monkeypatch.setattr(rules, "version", 99, raising=False)
    bench.build()
    said = bench.last()
    assert f"strategy rules: version {was} → 99" in said
    assert "looked at again, and the same came of it" in said
    assert "codegen rules: found in this machine's store" in said


def test_tvms_version(bench: Bench) -> None:
    bench.build(tvm="0.26.0", libtvm="another")
    bench.build()
    said = bench.last()
    assert f"TVM 0.26.0 → {bench.tools['tvm']}" in said
    assert "another build of the same version" not in said
    assert "TVM 0.26.0 →" in bench.why("net")
    bench.build(libtvm="yet another")
    assert "TVM's compiler library is another build of the same version" in bench.last()


def test_a_manual_function(bench: Bench) -> None:
    bench.target(["manual", "default"])
    bench.build()
    (operator,) = bench.builds()[-1].state.operators.values()
    source = MANUAL.replace("{digest}", operator.workload.hash)
    bench.place.write("manual/dense.py", source)
    bench.build()
    assert "manual/dense.py came" in bench.last()
    edited = source.replace("x[vi, 0] * w[0, vj] + x[vi, 1] * w[1, vj]", "x[vi, 1] * w[1, vj] + x[vi, 0] * w[0, vj]")
    assert edited != source
    bench.place.write("manual/dense.py", edited)
    bench.build()
    said = bench.last()
    assert "manual/dense.py changed: 1 line\n" in said
    assert "compiled from another function" in said
    bench.place.write("manual/dense.py", edited.replace(operator.workload.hash, "f" * 64))
    bench.build()
    assert "manual/dense.py changed: 1 line\n" in bench.last()
    assert "runs on     default" in bench.why()


def test_a_strategy_of_the_workspace(bench: Bench) -> None:
    bench.target(["mine", "default"])
    bench.place.write("strategies/mine.py", RIGHT)
    bench.build()
    bench.place.write("strategies/mine.py", RIGHT + "# a comment\n")
    bench.build()
    said = bench.last()
    assert "strategies/mine.py changed: 1 line" in said
    assert "the same came of it" in said


# tuning records


def found(bench: Bench, tile: list[int], seconds: float, at: float) -> list[str]:
    """Has the operator's records hold a winner that really can be made again. Returns the digests of its records."""
    from pipeline.compiler import ir
    from pipeline.compiler.records import digest_of
    from pipeline.sources import object_of

    (operator,) = bench.builds()[-1].state.operators.values()
    store = Store(bench.place.cache)
    space: Any = object_of(lanes().encode(), "spaces/lanes.py", "space")
    function = store.get(operator.workload)
    assert function is not None
    candidate = digest_of(space.make(ir.load(function), None, tile))
    tools = {name: bench.tools[name] for name in TOOLS}
    said = {"baseline": 211e-6, "noise": 0.0, "at": at, "tools": tools}
    certificate = Certificate("default", (0, 1), 1e-3, 1e-6)
    records = [
        TrialRecord(
            candidate=candidate,
            space="lanes",
            space_version=1,
            decisions=tile,
            outcome=Outcome.TIMED,
            seconds=seconds,
            certificate=certificate,
            **said,
        ),
        RetestRecord(candidate=candidate, seconds=seconds, certificate=certificate, **said),
    ]
    Ledger.here(store, 0.03).add(bench.key, {"operator": operator.name}, records)
    return [Digest.of(encoded(record)).hash for record in records]


@pytest.fixture
def tuned(bench: Bench) -> Iterator[Bench]:
    """A workspace whose operator may be tuned, built without a record."""
    bench.place.write("spaces/lanes.py", lanes())
    bench.target(["tuned", "default"])
    bench.build()
    yield bench
    shutil.rmtree(Store(bench.place.cache).root / "sets", ignore_errors=True)


def test_a_record_won(tuned: Bench) -> None:
    found(tuned, [4, 1], 187e-6, time.time())
    tuned.build()
    assert "a tuning record won: 211 µs → 187 µs" in tuned.last()
    found(tuned, [2, 1], 150e-6, time.time())
    tuned.build()
    said = tuned.why()
    assert "another tuning record won: 187 µs → 150 µs" in said
    assert "behind the best" not in said
    history = said.partition("history")[2]
    assert history.count("found by tuning") == 2
    assert "1.41 times as fast as the baseline" in history
    assert "2 candidates tried" in said


def test_a_record_invalidated(tuned: Bench) -> None:
    withdrawn = found(tuned, [4, 1], 187e-6, time.time())
    tuned.build()
    ledger = Ledger.here(Store(tuned.place.cache), 0.03)
    gone = WithdrawnRecord(records=tuple(withdrawn), reason="the fan was broken", at=time.time(), by="ada")
    ledger.add(tuned.key, {}, [gone])
    tuned.build()
    said = tuned.last()
    assert "the record that it ran on was invalidated on " in said
    assert " by ada: the fan was broken" in said
    assert "nothing tuned: invalidated by ada: the fan was broken" in tuned.why()
    assert "runs on     default" in tuned.why()


def test_a_rollback(tuned: Bench) -> None:
    found(tuned, [4, 1], 187e-6, time.time())
    tuned.build()
    ledger = Ledger.here(Store(tuned.place.cache), 0.03)
    ledger.add(tuned.key, {}, [PreferredRecord(candidate=NONE, reason="too hot", at=time.time(), by="ben")])
    tuned.build()
    assert "it was rolled back to no tuned candidate on " in tuned.last()
    assert "rolled back by ben: too hot" in tuned.why()


def test_measurements_were_invalidated(bench: Bench) -> None:
    bench.target(["rules", "default"], select="fastest")
    bench.build()
    ledger = Ledger.here(Store(bench.place.cache), 0.03)
    gone = WithdrawnRecord(records=(), measured=True, reason="somebody compiled Chromium", at=time.time(), by="ada")
    ledger.add(bench.key, {}, [gone])
    bench.build()
    said = bench.last()
    assert "what had been measured of it was invalidated on " in said
    assert " by ada: somebody compiled Chromium" in said
    assert "measure all: run here" in said


def test_a_lock(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the lock decides is another's to test: here the journal says which it was."""
    from pipeline import notes

    monkeypatch.setattr(notes, "LOCK", "the.lock")
    bench.build()
    (label,) = bench.builds()[-1].state.operators
    bench.place.write("the.lock", f'"{label}" = "rules"\n"other" = "default"\n')
    bench.target(["rules", "default"])
    bench.build()
    said = bench.last()
    assert 'tuning.lock came; of this operator it says: nothing → "rules"' in said
    bench.place.write("the.lock", f'"{label}" = "rules"\n"other" = "rules"\n')
    bench.build()
    assert "tuning.lock changed" in bench.why("net")
    assert "tuning.lock" not in bench.last().partition("before")[0]


def test_the_lock_changed_and_with_it_what_an_operator_runs_on(workspace: WorkspaceFolder) -> None:
    def target(*order: str) -> None:
        more = "check.enabled = false\nmeasure.profile = false\n"
        workspace.write("targets/native.toml", f'target = "native"\norder = {json.dumps(order)}\n{more}')

    workspace.onnx("net.onnx", models.dense())
    workspace.dodo('Model.onnx("net", "net.onnx"),')
    locks = []
    for strategy in ("rules", "default"):
        target(strategy)
        workspace.doit("lock").good()
        locks.append((workspace.folder / "tuning.lock").read_text())
    target("rules", "default")
    workspace.build().good()
    assert "runs on     default: tuning.lock" in workspace.doit("why", "fused_*").good().out
    workspace.write("tuning.lock", locks[0])
    workspace.build().good()
    said = workspace.doit("why", "fused_*", forbid_tvm=True).good().out
    assert "runs on     rules: tuning.lock" in said
    assert "tuning.lock changed; of this operator it says: " in said
    assert 'use = "default"' in said.partition(" → ")[0]
    assert 'use = "rules"' in said.partition(" → ")[2]


# what befell files


def test_a_blob_was_corrupted(bench: Bench) -> None:
    bench.build()
    (operator,) = bench.builds()[-1].state.operators.values()
    store = Store(bench.place.cache)
    entry = store.lookup(operator.actions["codegen:default"])
    assert entry is not None
    blob = entry.outputs["object"]
    path = store.path(blob)
    assert path is not None
    path.chmod(0o644)
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    bench.build()
    said = bench.last()
    assert f"blob {blob} of the store was corrupted, and codegen default made again" in said
    assert "the same was made again" in said
    (store.root / "ac" / operator.actions["codegen:default"][:2] / operator.actions["codegen:default"]).unlink()
    bench.build()
    assert f"the entry {operator.actions['codegen:default'][:12]} of the store was removed" in bench.last()


def test_a_file_of_the_artifact_was_deleted(bench: Bench) -> None:
    bench.build()
    (bench.place.artifact("net") / "lib.so").unlink()
    bench.build()
    assert "lib.so of the artifact was deleted: the artifact was put there again" in bench.last()
    assert "nothing changed since" in bench.last()
    shutil.rmtree(bench.place.folder / "artifacts")
    bench.build()
    assert "the artifact was not there any more" in bench.why("net")


def test_nothing_at_all(bench: Bench) -> None:
    bench.build()
    bench.build()
    assert "nothing changed since the build of" in bench.last()
    assert "nothing changed since the build of" in bench.why("net")
    assert "the first that is noted" in bench.why("net", "-n", "2")


def test_what_the_store_has_forgotten(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.build()
    old = bench.builds()[-1].state
    monkeypatch.setattr(stages, "CODEGEN", dataclasses.replace(stages.CODEGEN, version=97))
    bench.build()
    (operator,) = old.operators.values()
    key = operator.actions["codegen:default"]
    path = Store(bench.place.cache).root / "ac" / key[:2] / key
    kept = path.read_bytes()
    path.unlink()
    try:
        assert "the store has no entry of codegen default any more" in bench.last()
    finally:
        path.write_bytes(kept)


# remotes


@contextlib.contextmanager
def remote(cache: Path, shared: Path, **more: Any) -> Iterator[RemoteCache]:
    made = RemoteCache(Store(cache), open_remote(shared.as_uri()), Policy.READ_WRITE, lambda said: None, **more)
    yield made
    made.finish()
    made.close()


def test_an_entry_was_fetched_or_refused(bench: Bench, tmp_path: Path) -> None:
    from pipeline.remotes.trust import new_key, signer, trusting

    shared, store, other = (tmp_path / name for name in ("shared", "other", "third"))
    ada, ben = new_key(tmp_path / "ada.pem"), new_key(tmp_path / "ben.pem")
    with remote(bench.place.cache, shared, signer=signer(tmp_path / "ada.pem")) as made:
        bench.model(models.dense(activation="Softplus"))
        bench.build(remote=made)
    bench.place.dodo('Model.onnx("net", "net.onnx"),')
    with remote(store, shared, trust=trusting([ada], True)) as made:
        name = made.remote.name
        bench.build(cache=store, remote=made)
    said = bench.why(cache=store)
    assert f"{name}, signed by {ada}: apply default, codegen default" in said
    Journal(bench.place.folder, "native", "net").remove()
    with remote(other, shared, trust=trusting([ben], True)) as made:
        bench.build(cache=other, remote=made)
        bench.build(cache=other, remote=made)
    first, second = bench.builds()
    assert set(first.events.refused.values()) == {"not signed by a trusted key"}
    assert second.events.refused == {}
    assert "this machine: apply default, codegen default" in bench.why(cache=other)
    assert "was refused" in bench.why("net", "-n", "2", cache=other)


# the command


def test_one_of_several_and_for_programs(bench: Bench) -> None:
    bench.model(models.chain("Relu", "Sigmoid"))
    bench.build()
    bench.model(models.chain("Relu", "Tanh"))
    bench.build()
    (told,) = json.loads(bench.why("fused_matmul_tanh", "--json"))
    (label,) = [label for label in bench.builds()[-1].state.operators if "tanh" in label]
    assert (told["operator"], told["implementation"], told["fresh"]) == (label, "default", False)
    (news,) = told["news"]
    assert news["fate"] == "new"
    assert [each["kind"] for each in news["causes"]] == ["model file"]
    assert news["was"]["label"].startswith("fused_matmul_sigmoid-")
    assert news["ir"].startswith("--- fused_matmul_sigmoid")
    assert news["ways"]["apply:default"] in ("run", "found")
    (whole,) = json.loads(bench.why("net", "--json", "--builds", "2"))
    assert [each["build"] for each in whole["news"]] == [2, 1]
    digest = bench.builds()[-1].state.operators[label].workload.hash
    for name in (label, label.rpartition("-")[2], digest, digest[:10]):
        assert label in bench.why(name)
    assert len(bench.why("fused_*").split("\n\n")) == 2


def test_what_there_is_not(bench: Bench) -> None:
    assert "is not an artifact" in bench.why(code=1)
    bench.build()
    assert "there is no operator or model 'conv2d*'" in bench.why("conv2d*", code=1)
    assert "wants the name of one operator" in bench.place.doit("why").err
    assert "there is no target 'x'" in bench.why("net", "-t", "x", code=2)
    assert "--builds is 0" in bench.why("net", "-n", "0", code=2)
    Journal(bench.place.folder, "native", "net").remove()
    said = bench.why()
    assert "no build of it is noted here yet" in said
    assert "runs on     default" in said


def test_a_real_build_is_told_of_and_costs_no_tvm(workspace: WorkspaceFolder) -> None:
    workspace.onnx("net.onnx", models.dense())
    workspace.dodo('Model.onnx("net", "net.onnx"),')
    workspace.build().good()
    done = workspace.doit("why", "fused_*", forbid_tvm=True).good()
    assert "in one inference" in done.out
    assert "something has changed since" not in done.out
    workspace.write("targets/native.toml", 'target = "native"\norder = ["rules", "default"]\n')
    assert "something has changed since" in workspace.doit("why", "fused_*", forbid_tvm=True).good().out
    workspace.build().good()
    done = workspace.doit("why", "net", forbid_tvm=True).good()
    assert "the order of strategies changed: default → rules, default" in done.out
    assert "default → rules" in done.out


# the words


def test_every_place_where_two_trees_differ() -> None:
    before = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {"f": 1}}
    after = {"a": {"b": 2, "c": [1, 3]}, "g": True, "e": 5}
    assert list(changes(before, after)) == [
        Change(("a", "b"), 1, 2),
        Change(("a", "c"), [1, 2], [1, 3]),
        Change(("d",), None, ABSENT),
        Change(("e",), {"f": 1}, 5),
        Change(("g",), ABSENT, True),
    ]
    assert list(changes(before, before)) == []


def about(bench: Bench) -> About:
    from pipeline.why.evidence import Evidence

    bench.build()
    store = Store(bench.place.cache)
    build = bench.builds()[-1]
    (operator,) = build.state.operators.values()
    return About(Evidence(store, Ledger.here(store, 0.03)), build, build, operator, "apply:mine")


SAID: list[tuple[tuple[str, ...], object, object, str]] = [
    (("embed", "options", "what nobody knew"), 1, 2, "option what nobody knew of stage embed: 1 → 2"),
    (("embed", "inputs", "d"), ABSENT, "a" * 64, "stage embed gets d"),
    (("embed", "inputs", "d"), "b" * 64, "a" * 64, "d, which stage embed gets, changed"),
    (("what", "ever"), {"a": 1}, [1, 2], 'what.ever: {"a": 1} → [1, 2]'),
    (("codegen", "tools", "cc"), "g++ 12", "g++ 13", "the C++ compiler: g++ 12 → g++ 13"),
    (("apply", "options", "library"), "2023.2.0; 1; a.so x", "2024.1; 1; a.so y", "library mine: 2023.2.0 → 2024.1"),
    (("apply", "options", "library"), "1; 1; a x", "1; 2; a x", "how library mine is called: version 1 → 2"),
    (
        ("apply", "options", "library"),
        "1; 1; a x",
        "1; 1; a y",
        "library mine 1 is another build of the same version",
    ),
    (
        ("extract", "options", "patterns"),
        [["a", "1; 1"]],
        [["a", "2; 1"], ["b", "1"]],
        "library a: 1 → 2; library b, which groups operators of its own, came",
    ),
    (("settings", "measure", "noise"), 0.03, 0.1, "measure.noise of the target's file: 0.03 → 0.1"),
    (
        ("settings", "device"),
        "one",
        "other",
        "the processor that candidates are timed on, or its threads: one → other",
    ),
    (("tvmake",), "0.1", "0.2", "tvmake 0.1 → 0.2"),
    (("measure", "inputs", "x"), ABSENT, "y", ""),
]


def test_words_for_each_kind_of_change_and_for_those_that_nobody_knew(bench: Bench) -> None:
    told = about(bench)
    for path, before, after, expected in SAID:
        said = cause(Change(path, before, after), told)
        assert (said.said if said is not None else "") == expected
    assert TABLE[-1][0] == ("**",), "the last line matches everything"


def test_a_cause_is_told_once() -> None:
    made: Callable[[str], Cause] = lambda said: Cause("", said, (), None, None)  # noqa: E731
    assert [each.said for each in _once(map(made, "abacb"))] == ["a", "b", "c"]
