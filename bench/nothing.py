"""What `doit build` costs when there is nothing to do, and `doit list`, against `doit list` of an empty dodo.py.

    python -m bench.nothing [--sizes 100,1000,10000] [--repeat 10]

For each size a workspace with one Relax model of that many distinct operators, y_i = x + c_i, is really built: read,
extracted, every operator compiled, linked, published. Only the comparison with a reference is not made: there is none
for a Relax model. Then all commands are run in turn, `repeat` times, each in a fresh process. In the same run it is
proved that nothing is done: importing TVM is made an error, Python lists what it imports, and the store is compared.
"""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass

from bench.cpu import Usage, table
from bench.workspaces import BenchError, Run, Scratch, scratch

_DODO = '''\
from pipeline import DOIT_CONFIG, Model, Workspace  # noqa: F401


def many():
    """{count} operators that no pass joins: each adds a constant of its own to the one input."""
    from tvm import relax, te

    def plus(x, constant):
        return te.compute(x.shape, lambda i: x[i] + constant, name="plus")

    x = relax.Var("x", relax.TensorType((4,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            sums = [builder.emit_te(plus, x, float(i + 1), primfunc_name_hint="plus") for i in range({count})]
            result = builder.emit_output(relax.Tuple(sums))
        builder.emit_func_output(result)
    return builder.get()


workspace = Workspace(Model.relax("many", many))
'''

COMMANDS = (("build",), ("list",), ("list", "--all"))

# Python as it is, but an attempt to import TVM or its FFI ends in ImportError.
_WITHOUT_TVM = "import sys; sys.modules['tvm'] = sys.modules['tvm_ffi'] = None; from doit.__main__ import main; main()"
_IMPORTED = re.compile(r"^import time:.*\| +(\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """A command in a workspace, and what its runs used."""

    operators: int  # 0: the empty dodo.py
    place: Scratch
    command: tuple[str, ...]
    runs: list[Usage]

    @property
    def cpu(self) -> float:
        return min(run.cpu for run in self.runs)

    @property
    def wall(self) -> float:
        return min(run.wall for run in self.runs)


def build(place: Scratch, count: int) -> Run:
    """Builds a workspace of `count` operators, and makes sure that it has as many and that nothing is left to do."""
    place.write(_DODO.format(count=count))
    run = place.doit("build").require_good()
    if run.compiled != count:
        raise BenchError(f"{run.compiled} operators were compiled, not {count}: {run.last_line}")
    return run


def proof(place: Scratch) -> list[object]:
    """TVM modules imported; what a build without TVM says; files of the store that it changed."""
    before = _stamps(place)
    traced = place.run(sys.executable, "-X", "importtime", "-m", "doit", "build").require_good()
    imported = [name for name in _IMPORTED.findall(traced.err) if name.partition(".")[0] in ("tvm", "tvm_ffi")]
    without = place.run(sys.executable, "-c", _WITHOUT_TVM, "build").require_good()
    changed = len(set(_stamps(place).items()) ^ set(before.items()))
    return [len(imported), without.stages_run, changed, without.last_line]


def _stamps(place: Scratch) -> dict[str, tuple[int, int]]:
    files = [path for path in place.store.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def compare(sizes: list[int], repeat: int) -> None:
    """Builds the workspaces, proves, measures in turn, prints."""
    proofs, cases = [], []
    with ExitStack() as stack:
        empty = stack.enter_context(scratch())
        empty.folder.joinpath("dodo.py").write_text("")
        cases.append(Case(0, empty, ("list",), []))
        for size in sizes:
            place = stack.enter_context(scratch())
            used = build(place, size).usage
            built = f"{used.wall:.0f} s wall, {used.cpu:.0f} s CPU"
            proofs.append((f"{size:,}", built, *proof(place)))
            cases += [Case(size, place, command, []) for command in COMMANDS]
        for _ in range(repeat):
            for case in cases:
                case.runs.append(case.place.doit(*case.command).require_good().usage)
    columns = ("operators", "built for real in", "TVM imports", "stages run", "store files changed", "the build says")
    table("nothing to do, proved: importing TVM is an error", columns, proofs)
    table(f"minima of {repeat} runs in turn", _COLUMNS, [_row(case, cases[0]) for case in cases])


_COLUMNS = ("workspace", "command", "cpu s", "wall s", "cpu ratio", "wall ratio", "cpu µs per operator")


def _row(case: Case, base: Case) -> tuple[object, ...]:
    per_operator = f"{1e6 * (case.cpu - base.cpu) / case.operators:.1f}" if case.operators else ""
    name = f"{case.operators:,} operators" if case.operators else "empty dodo.py"
    ratios = (case.cpu / base.cpu, case.wall / base.wall)
    figures = [f"{figure:.3f}" for figure in (case.cpu, case.wall)] + [f"{ratio:.2f}" for ratio in ratios]
    return (name, f"doit {' '.join(case.command)}", *figures, per_operator)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.nothing", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="100,1000,10000", help="operators of each workspace, with commas between")
    parser.add_argument("--repeat", type=int, default=10, help="runs of each command (default 10)")
    options = parser.parse_args()
    try:
        compare([int(size) for size in options.sizes.split(",")], options.repeat)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
