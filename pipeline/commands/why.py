"""`doit why`: why an operator is what it is, and what its last builds made of it. Builds nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.commands.arguments import opt_json, opt_target
from pipeline.commands.looking import NOTHING, OK, Looking, print_json, require_built, selection_of
from pipeline.errors import ArtifactError, ConfigError, NotBuiltError
from pipeline.workspace import Selection, Workspace, the_workspace

if TYPE_CHECKING:
    from pipeline.models import Model
    from pipeline.types import Profile
    from pipeline.why.accounts import Account, Artifact, ModelAccount

opt_model = {
    "name": "models",
    "short": "m",
    "long": "model",
    "type": list,
    "default": [],
    "help": "of this model only; may be given several times",
}
opt_builds = {
    "name": "builds",
    "short": "n",
    "long": "builds",
    "type": int,
    "default": 1,
    "help": "how many of the last builds are told of [default: %(default)s]",
}


class Why(Looking):
    """Reads manifests, the workspace's journal, the store and the tuning records."""

    doc_purpose = "tell why an operator was rebuilt, chosen or not, and where it came from"
    doc_usage = "OPERATOR | MODEL"
    doc_description = """\
Tells of each operator that a name or pattern is for: what it runs on
and why, which candidates there were, what of which key changed in its
last build, where its entries came from, and its history. Of a model:
what changed between its last two builds, operator by operator. Builds
nothing; of an operator that is new it shows how its IR differs.

  doit why conv2d-4b17c507           one operator, as `doit report` names it
  doit why 'fused_conv2d*' -t native     a pattern, for one target
  doit why conv2d* -m squeezenet     of one model
  doit why squeezenet                a model: what changed, by operator
  doit why conv2d-4b17c507 -n 5      its last five builds
  doit why conv2d-4b17c507 --json    the same for programs

Exit code: 0 told, 1 nothing of that name is built, 2 the workspace is
at fault.
"""
    cmd_options = (opt_target, opt_model, opt_builds, opt_json)
    name = "why"

    def asked(self, params: Any, args: list[str]) -> Selection:
        if len(args) != 1:
            hint = "type `doit why OPERATOR`; `doit report` lists operators"
            raise ConfigError("`doit why` wants the name of one operator or model", hint=hint)
        self._asked = args[0]
        return selection_of(params["models"], params["targets"])

    def _execute(self, builds: int, json: bool) -> int:
        workspace = the_workspace(self.loader.namespace)
        accounts: list[tuple[Account | ModelAccount, bool]] = []
        missing = []
        is_model = any(model.name == self._asked for model in workspace.models)
        for target, model in workspace.pairs(self._selection):
            if is_model and model.name != self._asked:
                continue
            try:
                require_built(workspace, target, model)
                artifact = _artifact(workspace, target, model)
            except NotBuiltError as error:
                missing.append(str(error))
                continue
            except ArtifactError as error:
                missing.append(f"{target}:{model.name}: {error}")
                continue
            told = _told(artifact, self._asked if not is_model else "", builds, self.profile(target, model.name))
            is_fresh = _is_fresh(workspace, target, model) if told else True
            accounts += [(each, is_fresh) for each in told]
        _show(accounts, json)
        if accounts:
            return OK
        if not is_model:
            missing.append(
                f"there is no operator or model {self._asked!r} in what is built\n  → `doit report` lists them"
            )
        print("\n".join(missing), file=sys.stderr)
        return NOTHING


def _artifact(workspace: Workspace, target: str, model: Model) -> Artifact:
    from pipeline.config import load_target
    from pipeline.devices.identity import device_of
    from pipeline.tuning.ledger import Ledger
    from pipeline.why.accounts import Artifact

    file = load_target(workspace.target_file(target))
    ledger = Ledger.here(workspace.store, file.measure.noise)
    return Artifact.of(workspace.folder, target, model.name, workspace.store, ledger, device_of(file))


def _told(artifact: Artifact, pattern: str, builds: int, profile: Profile | None) -> list[Account | ModelAccount]:
    """The accounts of the operators that a pattern is for; of the model where it is ""."""
    from pipeline.types import symbol_of

    if not pattern:
        return [artifact.model_account(builds)]
    times = profile.operators if profile is not None else {}
    found = artifact.matching(pattern)
    return [artifact.account(each, builds, times.get(symbol_of(each.workload))) for each in found]


def _is_fresh(workspace: Workspace, target: str, model: Model) -> bool:
    from pipeline.tasks import is_fresh

    return is_fresh(workspace, target, model)


def _show(accounts: list[tuple[Account | ModelAccount, bool]], json: bool) -> None:
    from pipeline.why.accounts import Account
    from pipeline.why.shown import model_text, operator_text

    if json:
        plain = [{"fresh": fresh, **msgspec.to_builtins(each, str_keys=True)} for each, fresh in accounts]
        print_json(plain)
        return
    texts = [
        operator_text(each, fresh) if isinstance(each, Account) else model_text(each, fresh) for each, fresh in accounts
    ]
    if texts and sys.stdout.isatty():
        _print_styled("\n\n".join(texts))
    elif texts:
        print("\n\n".join(texts))


def _print_styled(text: str) -> None:
    """For a terminal: names bold, what a difference took away red, what it brought green."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in text.split("\n"):
        told = line.strip()
        style = "bold" if line and not line.startswith(" ") else ""
        style = "red" if told.startswith("-") else "green" if told.startswith("+") else style
        console.print(Text(line, style=style), soft_wrap=True)
