"""How many orders it takes to compile a batch: few, and one for each candidate that fails or takes others along."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline import stages
from pipeline.config import TargetFile
from pipeline.errors import StageError, WorkerDiedError
from pipeline.hashing import Digest
from pipeline.store import ActionEntry
from pipeline.tuning.candidates import Candidates, Prepared, Proposal
from pipeline.tuning.lessons import Lessons
from pipeline.tuning.records import Outcome
from pipeline.tuning.states import Operator
from pipeline.tuning.workshop import Workshop
from pipeline.types import Packed, TensorSpec

LLVM = {"kind": "llvm", "mcpu": "znver4"}


class Orders:
    """A workshop that compiles nothing, and remembers what it was asked for. Names say what becomes of a function."""

    def __init__(self, stopped: bool = False, here: bool = False) -> None:
        self.here = here
        self.workers = SimpleNamespace(stopped=stopped)
        self.given: list[tuple[str, int, float]] = []  # stage, functions, seconds that it may take
        self.options: list[Mapping[str, Any]] = []

    def target(self, operator: Operator) -> Any:
        return SimpleNamespace(attributes=LLVM, file=TargetFile(target="native"))

    def runs_here(self, stage: stages.Stage, operator: Operator) -> bool:
        return self.here

    def run(
        self,
        stage: stages.Stage,
        operator: Operator,
        inputs: Mapping[str, Digest],
        options: Mapping[str, Any],
        limit: float = 0.0,
    ) -> ActionEntry:
        self.given.append((stage.name, len(inputs), limit))
        self.options.append(options)
        found = {name: FATES[digest.hash] for name, digest in inputs.items()}
        if "deadly" in found.values():
            raise WorkerDiedError("the process was killed by SIGSEGV", stage=stage.name, subject=operator.name)
        if stage is stages.COMPILE:
            good = {name for name, fate in found.items() if fate == "good"}
            return ActionEntry(stage.name, {}, {f"o{name[1:]}": inputs[name] for name in good}, 0.1)
        if found["function"] == "bad":
            raise StageError("it is not bound", stage=stage.name, subject=operator.name)
        return ActionEntry(stage.name, {}, {"object": inputs["function"]}, 0.1)


FATES: dict[str, str] = {}


def proposals(*fates: str, packed: tuple[Packed, ...] = ()) -> list[Proposal]:
    found: list[Proposal] = []
    for i, fate in enumerate(fates):
        function = Digest.of(f"{fate} {i}".encode())
        FATES[function.hash] = fate
        found.append((Prepared(f"{i:032x}", "space", 1, i, packed=packed), {"function": function}))
    return found


def compiled(orders: Orders, given: list[Proposal], at_once: int = 2) -> list[Prepared]:
    candidates = Candidates(cast(Workshop, orders), cast(Lessons, None), at_once)
    try:
        return candidates.compiled(cast(Operator, SimpleNamespace(name="native:conv")), given)
    finally:
        candidates.close()


def outcomes(made: list[Prepared]) -> list[Outcome | None]:
    return [each.outcome for each in made]


@pytest.mark.parametrize(("at_once", "orders"), [(1, [16]), (2, [8, 8]), (3, [4, 6, 6]), (16, []), (100, [])])
def test_a_batch_is_as_many_orders_as_may_be_under_way(at_once: int, orders: list[int]) -> None:
    workshop = Orders()
    made = compiled(workshop, proposals(*["good"] * 16), at_once)
    assert sorted(count for stage, count, _ in workshop.given if stage == "compile") == orders
    assert sum(stage == "codegen" for stage, _, _ in workshop.given) == (0 if orders else 16)
    assert outcomes(made) == [None] * 16
    assert [each.candidate for each in made] == [f"{i:032x}" for i in range(16)]
    assert all(set(each.objects) == {f"{each.symbol}.o"} for each in made)


def test_on_this_machine_each_is_an_order() -> None:
    workshop = Orders(here=True)
    made = compiled(workshop, proposals("good", "bad", "good"), at_once=1)
    assert [stage for stage, _, _ in workshop.given] == ["codegen"] * 3
    assert outcomes(made) == [None, Outcome.NOT_BUILT, None]


def test_what_lays_out_a_weight_is_compiled_once_and_without_care() -> None:
    layout = Digest.of(b"layout")
    FATES[layout.hash] = "good"
    packed = (Packed(1, layout, TensorSpec("w", (4, 4), "float32")),)
    workshop = Orders()
    made = compiled(workshop, proposals("good", "good", "good", packed=packed), at_once=1)
    assert [count for _, count, _ in workshop.given] == [4]
    (options,) = workshop.options
    assert [which for _, which in options["functions"]].count(1) == 1
    assert options["targets"] == [LLVM, {**LLVM, "opt-level": 0}]
    assert all(len(each.objects) == 2 for each in made)


def test_one_that_fails_is_asked_for_by_itself_and_says_why() -> None:
    workshop = Orders()
    made = compiled(workshop, proposals("good", "bad", "good"), at_once=1)
    assert [stage for stage, _, _ in workshop.given] == ["compile", "codegen"]
    assert outcomes(made) == [None, Outcome.NOT_BUILT, None]
    assert "it is not bound" in made[1].said


def test_one_that_kills_the_compiler_takes_no_other_with_it() -> None:
    workshop = Orders()
    made = compiled(workshop, proposals("good", "deadly", "good"), at_once=1)
    assert sorted(stage for stage, _, _ in workshop.given) == ["codegen"] * 3 + ["compile"]
    assert outcomes(made) == [None, Outcome.CRASHED, None]


def test_what_may_be_compiled_alone_has_the_time_for_it_among_others() -> None:
    workshop = Orders()
    compiled(workshop, proposals("good", "bad"), at_once=1)
    (_, _, together), (_, _, alone) = workshop.given
    assert together - workshop.options[0]["seconds"] == alone


def test_where_the_night_is_being_stopped_nothing_is_said_of_a_candidate() -> None:
    with pytest.raises(StageError):
        compiled(Orders(stopped=True), proposals("deadly", "good"), at_once=1)
