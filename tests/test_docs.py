"""The documents' programs run, and print what the documents say that they print."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tuning_runs
from conftest import Done, WorkspaceFolder

from pipeline.compiler import libraries
from pipeline.composition import names
from pipeline.config import Measure, Policy, Stale, TargetFile, Tune, load_target
from pipeline.report import Report, Row, table
from pipeline.types import Operator
from tests import models

DOCS = Path(__file__).resolve().parents[1] / "docs"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the heading that it stands under."""

    language: str
    text: str
    heading: str


def blocks(document: str) -> list[Block]:
    text = (DOCS / document).read_text()
    found = []
    for match in _BLOCK.finditer(text):
        before = _BLOCK.sub("", text[: match.start()])  # a heading, not a comment in a program
        headings = re.findall(r"^#+ (.*)$", before, re.MULTILINE)
        found.append(Block(match[1], match[2], headings[-1] if headings else ""))
    return found


def programs(document: str) -> list[tuple[Block, Block]]:
    """Each program with the block of text that follows it, which is what it prints."""
    found = blocks(document)
    followed = zip(found, [*found[1:], Block("", "", "")], strict=True)
    return [(one, next_) for one, next_ in followed if one.language == "python" and next_.language == "text"]


STRATEGY = programs("strategy.md")


@pytest.mark.parametrize(("program", "printed"), STRATEGY, ids=[each.heading.partition(":")[0] for each, _ in STRATEGY])
def test_a_program_of_the_strategy_prints_what_is_said(program: Block, printed: Block, tmp_path: Path) -> None:
    if "openblas" in program.text and libraries.by_name("openblas").find() is None:
        pytest.skip("OpenBLAS is not installed")
    path = tmp_path / "program.py"  # TVMScript and tracebacks read a file
    path.write_text(program.text)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(path), run_name="__main__")
    assert out.getvalue() == printed.text


def test_every_program_of_the_strategy_is_run() -> None:
    assert sorted(each.heading.partition(":")[0] for each, _ in STRATEGY) == ["C0", "C1", "C2", "K0", "K1", "K2"]
    assert sum(each.language == "python" for each in blocks("strategy.md")) == len(STRATEGY)
    longest = max(len(each.text.splitlines()) for each, _ in STRATEGY)
    assert longest <= 30


# What a user writes: files of a workspace, which say in their first line where they lie.

_FILE = re.compile(r"^# (\S+/\S+)\n")
INPUT = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)


def files(heading: str) -> Iterator[tuple[str, str]]:
    """The files under a heading of strategies.md, by name."""
    for each in blocks("strategies.md"):
        named = _FILE.match(each.text)
        if named and each.heading == heading:
            yield named[1], each.text


@pytest.fixture
def dense(workspace: WorkspaceFolder) -> WorkspaceFolder:
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo('Model.onnx("dense", "dense.onnx"),')
    return workspace


def implemented(workspace: WorkspaceFolder, done: Done, by: str) -> None:
    """Requires that the one operator runs on this, and computes what it should."""
    (operator,) = workspace.manifest("dense")["operators"]
    assert operator["implementation"] == by, done.err
    assert "WARNING" not in done.err
    (output,) = workspace.run("dense", x=INPUT).values()
    np.testing.assert_allclose(output, models.dense_of(INPUT), rtol=1e-4, atol=1e-5)


def test_a_strategy_is_added_as_the_document_says(dense: WorkspaceFolder) -> None:
    written = dict(files("A strategy of your own"))
    assert sorted(written) == ["strategies/rows.py", "targets/native.toml"]
    for name, text in written.items():
        dense.write(name, text)
    implemented(dense, dense.build().good(), "rows")


def test_a_manual_function_is_added_as_the_document_says(dense: WorkspaceFolder) -> None:
    written = list(files("A manual function"))
    assert [name for name, _ in written] == ["manual/dense.py", "targets/native.toml", "manual/dense.py"]
    dense.write(*written[1])
    dense.build().good()
    (operator,) = dense.manifest("dense")["operators"]
    for name, text in (written[0], written[2]):
        (shown,) = re.findall(r'@manual\.replaces\("([0-9a-f]{8})"\)', text)
        # The digest changes with the lowering, and a reader's with the model.
        dense.write(name, text.replace(shown, operator["workload"][:8]))
        implemented(dense, dense.build().good(), "manual")


def test_a_search_space_is_added_as_the_document_says(dense: WorkspaceFolder) -> None:
    written = {named[1]: each.text for each in blocks("tuning.md") if (named := _FILE.match(each.text))}
    assert sorted(written) == ["spaces/vectors.py", "targets/native.toml"]
    for name, text in written.items():
        dense.write(name, text)
    done = dense.doit("tune").good()
    assert "2 trials" in done.err
    assert "2 timed" in done.err


def test_the_defaults_of_tuning_are_what_the_document_says(tmp_path: Path) -> None:
    first = next(each for each in blocks("tuning.md") if each.language == "toml")
    path = tmp_path / "native.toml"
    path.write_text(first.text)
    assert load_target(path).tune == Tune()
    assert set(tomllib.loads(first.text)["tune"]) == set(Tune.__struct_fields__) - {"spaces"}


def test_a_library_is_added_as_the_document_says(dense: WorkspaceFolder) -> None:
    written = dict(files("A library of your own"))
    assert sorted(written) == ["libraries/handmade.py", "targets/native.toml"]
    for name, text in written.items():
        dense.write(name, text)
    implemented(dense, dense.build().good(), "handmade")
    (called,) = dense.manifest("dense")["libraries"]
    assert (called["name"], called["version"], called["licence"]) == ("handmade", "1", "Apache-2.0")


def test_the_defaults_are_what_the_document_says(tmp_path: Path) -> None:
    first = next(each for each in blocks("strategies.md") if each.language == "toml")
    path = tmp_path / "native.toml"
    path.write_text(first.text)
    assert load_target(path) == TargetFile(target="native")
    assert set(tomllib.loads(first.text)["measure"]) == set(Measure.__struct_fields__)


def test_rules_for_operators_are_written_as_the_document_says(tmp_path: Path) -> None:
    (rules,) = [each for each in blocks("strategies.md") if each.heading.startswith("`[[operators]]`")]
    path = tmp_path / "native.toml"
    path.write_text('target = "native"\n' + rules.text)
    assert len(load_target(path, names(tmp_path)).operators) == 2


def test_the_table_is_what_the_document_says() -> None:
    (shown,) = [each for each in blocks("strategies.md") if each.heading == "What became of it"]
    operator = Operator("relu", "", "", (), 1, "default", "", (), "")
    made = Report("dense", "native", 1.46e-6, (Row(operator, 0.651e-6),))
    columns, _, line = shown.text.splitlines()
    assert columns.split() == [str(column.header) for column in table(made).columns]
    assert line == made.line()


def test_documents_name_files_that_are_there() -> None:
    root = DOCS.parent
    for document in ("strategy.md", "strategies.md", "tuning.md"):
        text = (DOCS / document).read_text()
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert (DOCS / link).is_file(), link
        for named in re.findall(r"`(pipeline/[\w/.]+)`", text):
            assert (root / named).exists(), named


# The commands of one session, in its order, and what each prints.

# What differs from run to run: spans of time, ratios, counts of what was retested, digests, moments, who.
_DIFFERS = (
    (r"\d{4}-\d\d-\d\d \d\d:\d\d", "MOMENT"),
    (r"\S+@\S+", "SOMEBODY"),
    (r"[0-9a-f]{8,64}", "DIGEST"),
    (r"\d+(\.\d+)? ?(µs|ms|s|min|h)\b", "TIME"),
    (r"\d+(\.\d+)?(%|x)", "RATIO"),
    (r"\d+\.\d+", "NUMBER"),
    (r"\(\d+ times\)", "(N times)"),
    (r"\d+ (records|times as fast)", r"N \1"),
    (r"[\s─]+", " "),
)
_GOING_ON = re.compile(r"\[\d+/\d+\]|read |extracted |compiled |packed |linked |checked |timed ")
# How many candidates were near enough to be timed again does so too, and with it what is applied anew.
_WHENCE = re.compile(r"^ +apply .*\n|^ +comes from(.*\n)+?(?= +history)", re.MULTILINE)
_REST = "…"


def lines(text: str) -> list[str]:
    """What is said, without what differs from run to run, in no order: two streams have none."""
    found = []
    for line in _WHENCE.sub("", text).splitlines():
        for pattern, word in _DIFFERS:
            line = re.sub(pattern, word, line)
        if line.strip() and not _GOING_ON.match(line):
            found.append(line.strip())
    return sorted(found)


def session() -> list[tuple[str, str]]:
    """Each command of operators.md with what it prints there."""
    text = "".join(each.text for each in blocks("operators.md") if each.language == "console")
    return [
        (command, said)
        for command, _, said in (each.partition("\n") for each in re.split(r"^\$ ", text, flags=re.M)[1:])
    ]


# One candidate is far ahead of the others, which do as the default does, so that the same wins each time, whatever else
# the machine does.
TILES = ((16, 1), (1, 1), (1, 2), (1, 4))
OPERATORS = {"gate": ("Relu", "Sigmoid"), "head": ("Tanh",), "mixer": ("Relu", "Tanh", "Sigmoid")}


def test_the_life_of_an_operator_is_as_the_document_tells(workspace: WorkspaceFolder) -> None:
    for name, activations in OPERATORS.items():
        workspace.onnx(f"{name}.onnx", tuning_runs.products(*activations))
    workspace.dodo("\n".join(f'Model.onnx("{name}", "{name}.onnx"),' for name in OPERATORS))
    workspace.write("spaces/lanes.py", tuning_runs.lanes([[*tile] for tile in TILES]))
    policy = next(each.text for each in blocks("operators.md") if each.text.startswith("[policy]"))
    workspace.write(
        "targets/native.toml", tuning_runs.target("lanes").replace("profile = false", "profile = true") + policy
    )
    commands = session()
    verbs = {shlex.split(command)[1] for command, _ in commands}
    assert verbs == {"build", "tune", "status", "why", "invalidate", "rollback", "lock", "check"}
    for command, said in commands:
        done = workspace.doit(*shlex.split(command)[1:], COLUMNS="200")
        told = lines(said)
        found = lines(f"{done.out}\n{done.err}\n{f'[exit code {done.code}]' if done.code else ''}")
        if _REST in told:
            told.remove(_REST)
            found = [line for line in found if line in told]
        assert found == told, f"{command}\n{done.out}\n{done.err}"


def test_what_is_stale_by_default_is_what_the_document_says(tmp_path: Path) -> None:
    told = next(each.text for each in blocks("operators.md") if "[stale]" in each.text)
    path = tmp_path / "native.toml"
    path.write_text(told)
    assert load_target(path).stale == Stale()
    shown = set(re.findall(r"^(?:# )?(\w+) = ", told.partition("[stale]")[2], re.MULTILINE))
    assert shown == set(Stale.__struct_fields__)
    policy = next(each.text for each in blocks("operators.md") if each.text.startswith("[policy]"))
    assert set(re.findall(r"^(?:# )?(\w+) = ", policy, re.MULTILINE)) == set(Policy.__struct_fields__)
