"""`doit report`: what each operator of the built models runs on, among which candidates, and why. Builds nothing."""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from pipeline.commands.arguments import opt_json, opt_target
from pipeline.commands.looking import NOTHING, OK, Looking, print_json, require_built, selection_of
from pipeline.errors import NotBuiltError, TvmakeError
from pipeline.workspace import Selection, the_workspace


class Report(Looking):
    """Reads the manifests of artifacts, and the times that the last build took down."""

    doc_purpose = "show what each operator of the built models runs on, and why"
    doc_usage = "[MODEL...]"
    doc_description = """\
Shows for each operator of the models as they are built: calls and time in one inference, the
implementation, all candidates with their times, and why this one was chosen. Compiles nothing.

  doit report                 every model that is built
  doit report squeezenet      one model
  doit report --json          the same for programs

Exit code: 0 shown, 1 a model is not built yet, 2 the workspace is at fault.
"""
    cmd_options = (opt_target, opt_json)
    name = "report"

    def asked(self, params: Any, args: list[str]) -> Selection:
        return selection_of(args, params["targets"])

    def _execute(self, json: bool) -> int:
        from pipeline.manifests import read_manifest
        from pipeline.report import report

        workspace = the_workspace(self.loader.namespace)
        made, missing = [], []
        for target, model in workspace.pairs(self._selection):
            try:
                manifest = read_manifest(require_built(workspace, target, model))
            except NotBuiltError as error:
                missing.append(str(error))
                continue
            except TvmakeError as error:
                missing.append(f"{target}:{model.name}: {error}")
                continue
            made.append((manifest, report(manifest, self.profile(target, model.name))))
        if json:
            print_json([_plain(*each) for each in made])
        else:
            _show([each for _, each in made])
        for text in missing:
            print(text, file=sys.stderr)
        return NOTHING if missing else OK


def _plain(manifest: Any, made: Any) -> dict[str, Any]:
    return {
        "model": made.model,
        "target": made.target,
        "seconds": made.seconds,
        "shares": made.shares(),
        "untuned": made.untuned(),
        "libraries": manifest.libraries,
        "operators": [{"seconds": row.seconds, **msgspec.to_builtins(row.operator)} for row in made.rows],
    }


def _show(reports: list[Any]) -> None:
    from rich.console import Console

    from pipeline.report import table

    console = Console(width=None if sys.stdout.isatty() else 200)
    for each in reports:
        console.print(table(each))
        console.print(each.line(), highlight=False, soft_wrap=True)
