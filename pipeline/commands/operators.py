"""What commands about operators look at: those of the models that are built, with their records and their times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.commands.looking import profile_of
from pipeline.errors import ConfigError, NotBuiltError, TvmakeError
from pipeline.tasks import remembered_plan
from pipeline.types import Profile, symbol_of
from pipeline.workspace import Selection, Workspace

if TYPE_CHECKING:
    from pipeline.models import Model
    from pipeline.tuning.standings import Operators
    from pipeline.types import Manifest, Operator, Plan, Workload


@dataclass(frozen=True)
class Built:
    """The operators of each target, and of each target and model that is built its manifest and, where it was
    profiled, its times."""

    operators: list[Operators]
    manifests: Mapping[tuple[str, str], Manifest]
    profiles: Mapping[tuple[str, str], Profile]

    def used(self, target: str) -> dict[str, Operator]:
        """What the operators of a target run on, by workload."""
        found = [manifest for (name, _), manifest in self.manifests.items() if name == target]
        return {each.workload: each for manifest in found for each in manifest.operators}

    def seconds(self, target: str) -> dict[str, float]:
        """Seconds of all calls of each operator in one inference of each model, by workload."""
        total: Counter[str] = Counter()
        for (name, model), profile in self.profiles.items():
            for each in self.manifests[name, model].operators if name == target else ():
                total[each.workload] += profile.operators.get(symbol_of(each.workload), 0.0)  # type: ignore[assignment]
        return {workload: seconds for workload, seconds in total.items() if seconds}

    def only(self, patterns: list[str]) -> tuple[Operators, Workload]:
        """The one operator that is meant. Raises ConfigError where it is none, or one of several."""
        found = [
            (operators, workload)
            for operators in self.operators
            for workload in operators.workloads.values()
            if any(workload.matches(each) or f"{operators.target}:{workload.label}" == each for each in patterns)
        ]
        if len(found) != 1:
            wanted = " ".join(patterns)
            names = ", ".join(f"{operators.target}:{workload.label}" for operators, workload in found[:5])
            said = f"{wanted!r} are several operators: {names}" if found else f"there is no operator {wanted!r}"
            raise ConfigError(said, hint="`doit status --all` lists them; -t says for which target")
        return found[0]


def look(workspace: Workspace, selection: Selection, manager: Any) -> Built:
    """What is there of a selection's models. Needs no TVM. Raises NotBuiltError where a model was never extracted."""
    from pipeline.manifests import read_manifest
    from pipeline.tuning import standings

    def plan(target: str, model: Model) -> Plan:
        if (known := remembered_plan(target, model)) is None:
            raise NotBuiltError(f"{target}:{model.name} is not built", hint=f"type `doit build {model.name}`")
        return known

    for pair in workspace.pairs(selection):
        plan(*pair)  # before anything is asked of TVM
    operators = standings.operators(workspace, selection, plan)
    manifests, profiles = {}, {}
    for target, model in workspace.pairs(selection):
        try:
            manifests[target, model.name] = read_manifest(workspace.artifact(target, model))
        except TvmakeError:
            continue
        if (profile := profile_of(manager, target, model.name)) is not None:
            profiles[target, model.name] = profile
    return Built(operators, manifests, profiles)
