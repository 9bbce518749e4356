"""`doit report`, and what a build says at its end: of each operator what it runs on, why, and where the time goes."""

from __future__ import annotations

import json

import models
import pytest
from conftest import WorkspaceFolder

from pipeline.report import Report, Row, duration, table
from pipeline.types import Operator, Trial


@pytest.fixture
def dense(workspace: WorkspaceFolder) -> WorkspaceFolder:
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo('Model.onnx("dense", "dense.onnx"),')
    return workspace


def test_what_is_not_built_is_said(dense: WorkspaceFolder) -> None:
    done = dense.doit("report", forbid_tvm=True)
    assert done.code == 1
    assert "native:dense" in done.err
    assert "doit build dense" in done.err
    assert not dense.cache.exists()


def test_a_report_needs_no_compiler_and_says_what_the_build_said(dense: WorkspaceFolder) -> None:
    built = dense.build().good()
    told = next(line for line in built.err.splitlines() if line.startswith("native:dense: "))
    assert "default 100%; 100% untuned" in told
    shown = dense.doit("report", forbid_tvm=True).good().out
    assert told in shown
    assert "fused_matmul_add_relu-" in shown
    assert "the only one in the order" in shown

    (made,) = json.loads(dense.doit("report", "--json", forbid_tvm=True).good().out)
    assert (made["model"], made["target"], made["untuned"], made["shares"]) == (
        "dense",
        "native",
        1.0,
        {"default": 1.0},
    )
    (operator,) = made["operators"]
    assert operator["implementation"] == "default"
    assert 0 < operator["seconds"] <= made["seconds"]


def test_an_unknown_model_is_refused(dense: WorkspaceFolder) -> None:
    done = dense.doit("report", "nonesuch")
    assert done.code == 2
    assert "there is no model 'nonesuch'" in done.err


def operator(name: str, implementation: str, calls: int = 1, *trials: Trial) -> Operator:
    return Operator(name, "0" * 64, "", ("1:float32",), calls, implementation, "the fastest of 2", trials, "")


ROWS = (
    Row(operator("conv-1", "onednn", 2, Trial("onednn", 0.002), Trial("rules", refused="crashed with SIGSEGV")), 0.006),
    Row(operator("relu-2", "rules"), 0.003),
    Row(operator("copy-3", "default"), 0.001),
)


def test_shares_are_of_the_operators_time() -> None:
    made = Report("net", "cpu", 0.011, ROWS)
    assert made.shares() == pytest.approx({"onednn": 0.6, "rules": 0.3, "default": 0.1})
    assert made.untuned() == pytest.approx(0.4)
    assert made.line() == "cpu:net: 11 ms an inference; onednn 60%, rules 30%, default 10%; 40% untuned"
    assert Report("net", "cpu", None, tuple(Row(row.operator, None) for row in ROWS)).line() == (
        "cpu:net: not timed; operators: onednn 1, rules 1, default 1"
    )


def test_a_table_sums_up_what_it_does_not_show() -> None:
    made = table(Report("net", "cpu", 0.011, ROWS), limit=1)
    columns = [list(column.cells) for column in made.columns]
    assert columns[0] == ["conv-1", "2 more"]
    assert columns[2] == ["6 ms", "4 ms"]
    assert columns[3] == ["60.0%", "40.0%"]
    assert columns[5][0] == "onednn 2 ms; rules put aside"
    assert len(table(Report("net", "cpu", 0.011, ROWS), limit=2).rows) == 3, "one more row is no longer than its sum"


@pytest.mark.parametrize(
    ("seconds", "said"), [(1.234, "1.23 s"), (0.0456, "45.6 ms"), (12.3e-6, "12.3 µs"), (4e-7, "0.4 µs")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
