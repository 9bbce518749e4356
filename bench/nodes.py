"""ONNX's own backend node tests through the pipeline: right, refused in clear words, caught by the check, or wrong.

    python -m bench.nodes [--n 250] [--seed 0] [--chunk 250] [--list]

Every case is a model of a workspace, with its recorded inputs and outputs as `cases`. What was built is loaded in
another process and held against the recorded outputs as ONNX's own runner does it, independently of the check stage.
Cases that the check refused are built twice more: without their recorded cases, to see whether the seeded comparison
alone refuses them too, and without any check, to see whether they were wrong indeed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.cpu import table
from bench.node_models import NodeCase, sample
from bench.workspaces import ROOT, BenchError, Scratch, scratch

RIGHT = "right"
CLEAR = "refused, clear error that names the operator or input"
UNCLEAR = "refused, unclear error"
CAUGHT = "refused by the reference check"
WRONG = "wrong"
OUTCOMES = (RIGHT, CLEAR, CAUGHT, UNCLEAR, WRONG)

_CHECK = re.compile(r"^check of \S+( \(key \w+\))? failed: (compared with .*?, )?output ")
_RAW_STAGE = re.compile(r"^\w+ of \S+( \(key \w+\))? failed: (the process |\w*(Error|Exception)\b)")
_RAW_TEXT = re.compile(r"Check failed|InternalError|\.cc:|Traceback|0x[0-9a-f]{6,}")


@dataclass
class Verdict:
    """What became of one case."""

    name: str
    outcome: str
    message: str = ""
    compared: str = ""  # what the check compared with, in the manifest's words


@dataclass
class Findings:
    verdicts: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0
    cpu: float = 0.0
    # Of the cases that the check refused: caught without recorded cases as well; right when they are not checked.
    seeded_catches: list[str] = field(default_factory=list)
    right_after_all: dict[str, str] = field(default_factory=dict)

    def of(self, outcome: str) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.outcome == outcome]


def examine(cases: Sequence[NodeCase], chunk: int) -> Findings:
    """Builds all cases, `chunk` models to a workspace, and says what became of each."""
    findings = Findings()
    for start in range(0, len(cases), chunk):
        with scratch() as place:
            _examine_some(place, cases[start : start + chunk], findings)
    return findings


def _examine_some(place: Scratch, cases: Sequence[NodeCase], findings: Findings) -> None:
    for case in cases:
        _write_case(place.folder, case)
    by_name = {case.name: case for case in cases}
    failures, differences = _built(place, cases, findings, recorded=True)
    for case in cases:
        findings.verdicts.append(_verdict(place, case, failures.get(case.name), differences.get(case.name)))
    refused = [by_name[v.name] for v in findings.of(CAUGHT) if v.name in by_name]
    if refused:
        still, _ = _built(place, refused, None, recorded=False)
        findings.seeded_catches += [name for name, said in still.items() if _CHECK.match(said)]
        _, differences = _built(place, refused, None, recorded=False, check=False)
        messages = {verdict.name: verdict.message for verdict in findings.of(CAUGHT)}
        findings.right_after_all |= {name: messages[name] for name, said in differences.items() if not said}


def _write_case(folder: Path, case: NodeCase) -> None:
    from onnx import numpy_helper

    place = folder / case.name
    place.mkdir()
    (folder / f"{case.name}.onnx").write_bytes(case.model.SerializeToString())
    (place / "tolerance.json").write_text(json.dumps([case.rtol, case.atol]))
    for role, arrays in (("input", case.inputs), ("output", case.outputs)):
        for i, array in enumerate(arrays):
            (place / f"{role}_{i}.pb").write_bytes(numpy_helper.from_array(array).SerializeToString())


def _built(
    place: Scratch, cases: Sequence[NodeCase], findings: Findings | None, *, recorded: bool, check: bool = True
) -> tuple[dict[str, str], dict[str, str]]:
    """Builds cases; returns what the failed ones said, and how the built ones differ ("" where they do not)."""
    models = [
        f"    Model.onnx({case.name!r}, {case.name + '.onnx'!r}{f', cases=[{case.name!r}]' if recorded else ''}),"
        for case in cases
    ]
    dodo = [
        "from pipeline import DOIT_CONFIG, Model, Workspace  # noqa: F401",
        "workspace = Workspace(",
        *models,
        ")",
    ]
    place.write("\n".join(dodo) + "\n", check=check)
    place.forget()
    for case in cases:
        shutil.rmtree(_artifact(place, case.name), ignore_errors=True)
    run = place.doit("build")
    if findings is not None:
        findings.seconds += run.usage.wall
        findings.cpu += run.usage.cpu
    failures: dict[str, str] = {}
    for task, message in run.failures.items():
        failures.setdefault(task.rpartition(":")[2], message)
    _spread(place, cases, run.failures, failures)
    built = [case.name for case in cases if _artifact(place, case.name).is_dir()]
    silent = [case.name for case in cases if case.name not in failures and case.name not in built]
    if silent:
        print(f"{run.err[-4000:]}\nneither built nor failed: {silent}", file=sys.stderr)
        failures |= dict.fromkeys(silent, "neither an artifact nor a word")
    return failures, _differences(place.folder, built)


def _spread(place: Scratch, cases: Sequence[NodeCase], said: dict[str, str], failures: dict[str, str]) -> None:
    """An operator's task that failed has failed every model that waits for it: those have no words of their own."""
    stages = ("apply:", "dispatch:", "codegen:")
    operators = {task: message for task, message in said.items() if task.startswith(stages)}
    for case in cases:
        if case.name not in failures and not _artifact(place, case.name).is_dir() and operators:
            waiting = place.doit("info", f"pack:native:{case.name}").out
            found = [f"{task}: {message}" for task, message in operators.items() if task in waiting]
            if found:
                failures[case.name] = found[0].partition(": ")[2]


def _artifact(place: Scratch, name: str) -> Path:
    return place.folder / "artifacts" / "native" / name


def _verdict(place: Scratch, case: NodeCase, refused: str | None, difference: str | None) -> Verdict:
    if refused is not None:
        return Verdict(case.name, _kind_of_refusal(case, refused), refused)
    if difference:
        return Verdict(case.name, WRONG, difference)
    reference = json.loads((_artifact(place, case.name) / "manifest.json").read_text())["reference"]
    compared = f"{reference['reference'] or reference['state']}, {reference['cases']} recorded"
    return Verdict(case.name, RIGHT, "", compared)


def _kind_of_refusal(case: NodeCase, message: str) -> str:
    if _CHECK.match(message):
        return CAUGHT
    operators = {node.op_type for node in case.model.graph.node}
    operators |= {node.op_type for function in case.model.functions for node in function.node}
    named = any(re.search(rf"\b{operator}\b", message) for operator in operators) or "the operator relax." in message
    named = named or any(repr(value.name) in message for value in case.model.graph.input)
    return CLEAR if named and not _RAW_STAGE.match(message) else UNCLEAR


def _differences(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """How artifacts differ from what was recorded, each loaded in a process that may die of it."""
    left, found = list(names), {}
    while left:
        argv = [sys.executable, "-m", "bench.nodes", "--compare", str(folder)]
        done = subprocess.run(argv, cwd=ROOT, input="\n".join(left), capture_output=True, text=True, check=False)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        found |= dict(answers)
        left = left[len(answers) :]
        if left:
            found[left.pop(0)] = f"the process that loaded it ended with {done.returncode}: {done.stderr[-300:]}"
    return found


def _compare(folder: Path, names: Iterable[str]) -> None:
    """In a process of its own: prints a line of JSON for each artifact, its name and how it differs."""
    for name in names:
        try:
            said = _difference(folder / "artifacts" / "native" / name, folder / name)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        print(json.dumps([name, said]), flush=True)


def _difference(artifact: Path, case: Path) -> str:
    """As onnx.backend.test.runner compares; positional, so that the order of inputs and outputs is compared as well."""
    from pipeline import load

    rtol, atol = json.loads((case / "tolerance.json").read_text())
    ours = list(load(artifact)(*_recorded(case, "input")).values())
    theirs = _recorded(case, "output")
    if len(ours) != len(theirs):
        return f"{len(ours)} outputs instead of {len(theirs)}"
    for i, (array, expected) in enumerate(zip(ours, theirs, strict=True)):
        if array.shape != expected.shape or array.dtype != expected.dtype:
            return f"output {i} is {array.dtype}{list(array.shape)}, not {expected.dtype}{list(expected.shape)}"
        exactness = max(rtol, 2**-6) if array.dtype.name == "bfloat16" else rtol
        if array.dtype.name not in np.sctypeDict:
            array, expected = array.astype(np.float32), expected.astype(np.float32)
        try:
            np.testing.assert_allclose(array, expected, rtol=exactness, atol=atol)
        except AssertionError as error:
            return f"output {i}: " + " ".join(line.strip() for line in str(error).splitlines()[1:7] if line.strip())
    return ""


def _recorded(case: Path, role: str) -> list[np.ndarray]:
    import onnx
    from onnx import numpy_helper

    paths = [case / f"{role}_{i}.pb" for i in range(len(list(case.glob(f"{role}_*.pb"))))]
    return [numpy_helper.to_array(onnx.load_tensor(str(path))) for path in paths]


def _print(findings: Findings, title: str) -> None:
    total = len(findings.verdicts)
    rows: list[tuple[object, ...]] = []
    for outcome in OUTCOMES:
        count = len(findings.of(outcome))
        rows.append((outcome, count, f"{100 * count / max(total, 1):.1f} %"))
    worded = sum(bool(_RAW_TEXT.search(verdict.message)) for verdict in findings.of(CLEAR))
    caught = len(findings.of(CAUGHT))
    rows += [
        ("all", total, ""),
        ("", "", ""),
        ("of the clear errors: with words of TVM's C++ after the name", worded, ""),
        ("of those refused by the check: wrong indeed, unchecked", caught - len(findings.right_after_all), ""),
        ("of those refused by the check: right by the recorded outputs", len(findings.right_after_all), ""),
        ("of those refused by the check: the seeded comparison alone refuses", len(findings.seeded_catches), ""),
    ]
    table(f"{title}; built in {findings.seconds:.0f} s wall, {findings.cpu:.0f} s CPU", ("", "cases", ""), rows)


def _print_cases(findings: Findings, everything: bool) -> None:
    listed = OUTCOMES[1:] if everything else (WRONG, UNCLEAR)
    for outcome in listed:
        for verdict in findings.of(outcome):
            seeded = "" if outcome != CAUGHT or verdict.name in findings.seeded_catches else " [recorded case alone]"
            print(f"{outcome.upper()}{seeded} {verdict.name}: {verdict.message}")
    for name, message in findings.right_after_all.items():
        print(f"REFUSED BY THE CHECK BUT RIGHT {name}: {message}")
    if everything:
        for compared, count in Counter(verdict.compared for verdict in findings.of(RIGHT)).most_common():
            print(f"right, compared with {compared}: {count}")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.nodes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, default=250, help="how many cases (default 250)")
    parser.add_argument("--seed", type=int, default=0, help="which cases (default 0)")
    parser.add_argument("--chunk", type=int, default=250, help="models of one workspace (default 250)")
    parser.add_argument("--list", action="store_true", help="also list every refused case with what was said of it")
    parser.add_argument("--compare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compare is not None:
        _compare(options.compare, sys.stdin.read().split())
        return 0
    drawn = sample(options.n, options.seed)
    try:
        findings = examine(drawn.cases, options.chunk)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print(findings, f"{len(drawn.cases)} of {drawn.usable} node tests, seed {options.seed}")
    _print_cases(findings, options.list)
    return 1 if findings.of(WRONG) or findings.of(UNCLEAR) else 0


if __name__ == "__main__":
    sys.exit(_main())
