"""What became of each operator of a built model, as a table: candidates and their times, the one chosen, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipeline.types import Manifest, Operator, Profile, Trial, symbol_of

# Strategies whose functions nobody has sought out or written for the operator.
UNTUNED = ("rules", "default")


@dataclass(frozen=True)
class Row:
    """One operator of one model. `seconds` are those of all its calls in one inference, None where nothing is known."""

    operator: Operator
    seconds: float | None


@dataclass(frozen=True)
class Report:
    """One built model: how long an inference takes and its operators, those that take longest first."""

    model: str
    target: str
    seconds: float | None
    rows: tuple[Row, ...]

    def shares(self) -> dict[str, float]:
        """Each implementation's share of the operators' time, the largest first; nothing where no time is known."""
        spent: Counter[str] = Counter()
        for row in self.rows:
            spent[row.operator.implementation] += row.seconds or 0.0  # type: ignore[assignment]
        total = sum(spent.values())
        return {name: seconds / total for name, seconds in spent.most_common()} if total else {}

    def untuned(self) -> float:
        """The share of the operators' time that runs on what was neither tuned nor written for the operator."""
        return sum(share for name, share in self.shares().items() if name in UNTUNED)

    def line(self) -> str:
        """The model in one line."""
        counts = Counter(row.operator.implementation for row in self.rows)
        if self.seconds is None:
            used = ", ".join(f"{name} {count}" for name, count in counts.most_common())
            return f"{self.target}:{self.model}: not timed; operators: {used}"
        used = ", ".join(f"{name} {share:.0%}" for name, share in self.shares().items())
        return (
            f"{self.target}:{self.model}: {duration(self.seconds)} an inference; {used}; {self.untuned():.0%} untuned"
        )


def report(manifest: Manifest, profile: Profile | None) -> Report:
    """The report of an artifact. Times are those of the operator within the model, where it was profiled."""
    times = profile.operators if profile else {}
    rows = [Row(operator, times.get(symbol_of(operator.workload))) for operator in manifest.operators]
    rows.sort(key=lambda row: -(row.seconds or 0.0))
    return Report(manifest.model, manifest.target, profile.seconds if profile else None, tuple(rows))


def duration(seconds: float) -> str:
    """0.0000123 → "12.3 µs", 0.0045 → "4.5 ms", 1.2 → "1.2 s"; three digits at most."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def table(report: Report, limit: int | None = None) -> Any:
    """The operators as a table of rich's, those that take longest first; beyond `limit` they are summed up."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=f"{report.target}:{report.model}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("operator", "left"), ("calls", "right"), ("time", "right"), ("share", "right")):
        made.add_column(name, justify=justify, no_wrap=name != "operator")  # type: ignore[arg-type]
    for name in ("implementation", "candidates", "why"):
        made.add_column(name)
    total = sum(row.seconds or 0.0 for row in report.rows)
    shown = report.rows if limit is None or len(report.rows) <= limit + 1 else report.rows[:limit]
    for row in shown:
        made.add_row(
            row.operator.name,
            str(row.operator.calls),
            duration(row.seconds) if row.seconds is not None else "",
            f"{row.seconds / total:.1%}" if row.seconds is not None and total else "",
            row.operator.implementation,
            "; ".join(_trial(trial) for trial in row.operator.candidates),
            row.operator.reason,
        )
    rest = report.rows[len(shown) :]
    if rest:
        seconds = sum(row.seconds or 0.0 for row in rest)
        calls = sum(row.operator.calls for row in rest)
        share = f"{seconds / total:.1%}" if total else ""
        made.add_row(f"{len(rest)} more", str(calls), duration(seconds) if total else "", share, "", "", "")
    return made


def _trial(trial: Trial) -> str:
    if trial.refused:
        return f"{trial.strategy} put aside"
    return f"{trial.strategy} {duration(trial.seconds)}" if trial.seconds is not None else trial.strategy
