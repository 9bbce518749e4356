"""Ways to run a model, each in a process of its own that stays, loaded and idle, until it is asked for a turn.

Owns how onnxruntime, OpenVINO, our artifacts and TVM's own libraries are loaded and timed; knows nothing of tables. A
turn is some runs one after the other, so that what is timed is warm; between turns a pause lets the threads of one
engine go to sleep before the next one works. All inference is in float32, on the inputs of one file, in the order of
the model's inputs.

    with started("onnxruntime", model, inputs, 2) as engine:
        engine.first(), engine.turn(0.3), engine.outputs()

The process: python -m bench.engines KIND FILE INPUTS.npz THREADS, a JSON request a line in, an answer a line out.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bench.workspaces import ROOT, BenchError

if TYPE_CHECKING:
    import numpy as np

Arrays = list["np.ndarray"]

PAUSE = 0.05  # seconds between two turns
SLOW = 20  # times onnxruntime's time: such an engine gets few runs
_PATIENCE = 900.0  # seconds for one answer
_MOST = 1000  # runs in a turn
_AT_ONCE = 50


# --- in the engine's process ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A model that is ready: `compute` gives its outputs in order, `times` the seconds of some runs."""

    compute: Callable[[], Arrays]
    times: Callable[[int], list[float]]
    operators: Callable[[int], dict[str, float]] | None = None  # seconds of each workload by its symbol


def _timed(run: Callable[[], object]) -> Callable[[int], list[float]]:
    def times(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        return seconds

    return times


def _onnxruntime(file: str, inputs: Arrays, threads: int) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for node, array in zip(session.get_inputs(), inputs, strict=True):
        binding.bind_ortvalue_input(node.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for node in session.get_outputs():
        binding.bind_output(node.name, "cpu")

    def run() -> None:
        session.run_with_iobinding(binding)

    def compute() -> Arrays:
        run()
        return list(binding.copy_outputs_to_cpu())

    return Loaded(compute, _timed(run))


def _openvino(file: str, inputs: Arrays, threads: int) -> Loaded:
    import openvino

    # Without the precision it would compute in bfloat16 where the processor can.
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(file, "CPU", config)
    request = compiled.create_infer_request()
    for place, array in enumerate(inputs):
        request.set_input_tensor(place, openvino.Tensor(array))

    def run() -> None:
        request.start_async()
        request.wait()

    def compute() -> Arrays:
        run()
        return [request.get_output_tensor(place).data.copy() for place in range(len(compiled.outputs))]

    return Loaded(compute, _timed(run))


def _artifact(file: str, inputs: Arrays, _threads: int) -> Loaded:
    from pipeline.runtime import load

    model = load(file)
    named = {spec.name: array for spec, array in zip(model.inputs, inputs, strict=True)}
    return Loaded(
        lambda: list(model(**named).values()),
        lambda count: model.time(named, count),
        lambda count: model.profile(named, count),
    )


def _tvm(file: str, inputs: Arrays, _threads: int) -> Loaded:
    import tvm
    from tvm import relax

    machine = relax.VirtualMachine(tvm.runtime.load_module(file), tvm.cpu())
    tensors = [tvm.runtime.tensor(array) for array in inputs]

    def compute() -> Arrays:
        results = machine["main"](*tensors)
        return [result.numpy() for result in ([results] if isinstance(results, tvm.runtime.Tensor) else results)]

    return Loaded(compute, _timed(lambda: machine["main"](*tensors)))


KINDS: dict[str, Callable[[str, Arrays, int], Loaded]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "artifact": _artifact,
    "tvm": _tvm,
}


def _first(loaded: Loaded, outputs: str) -> dict[str, Any]:
    import numpy as np

    begin = time.perf_counter()
    arrays = loaded.compute()
    seconds = time.perf_counter() - begin
    np.savez(outputs, *arrays)
    return {"seconds": [seconds]}


def _turn(loaded: Loaded, budget: float) -> dict[str, Any]:
    """Few runs at a time: the first may have been held up by something else, and says little of how many fit."""
    seconds = loaded.times(1)
    while len(seconds) < _MOST and (rest := budget - sum(seconds)) > 0:
        seconds += loaded.times(min(_AT_ONCE, max(1, int(rest / min(seconds)))))
    return {"seconds": seconds}


def _profiled(loaded: Loaded, budget: float) -> dict[str, Any]:
    if loaded.operators is None:
        raise BenchError("this engine does not tell the time of operators")
    once = min(loaded.times(3)) if loaded.times(1)[0] < budget else budget
    return {"operators": loaded.operators(min(_MOST, max(1, int(budget / once))))}


def _serve(kind: str, file: str, inputs: str, threads: str) -> None:
    import numpy as np

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever an engine prints is no answer
    with np.load(inputs) as stored:
        arrays = [np.ascontiguousarray(stored[name]) for name in stored.files]
    loaded = KINDS[kind](file, arrays, int(threads))
    requests: dict[str, Callable[..., dict[str, Any]]] = {"first": _first, "turn": _turn, "profile": _profiled}
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        name, argument = json.loads(line)
        print(json.dumps(requests[name](loaded, argument)), file=answers)


# --- in the process that asks -----------------------------------------------------------------------------------------


@dataclass
class Engine:
    """A running engine's process, and the seconds of every run that it told."""

    name: str
    _process: subprocess.Popen[str]
    _errors: IO[bytes]
    _outputs: Path
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.seconds)

    def first(self) -> float:
        """The first run, cold; its outputs are kept."""
        answer: list[float] = self._ask("first", str(self._outputs))["seconds"]
        self.seconds += answer
        return answer[0]

    def turn(self, budget: float) -> float:
        """Runs for `budget` seconds, once at least; the best of these runs."""
        time.sleep(PAUSE)
        answer: list[float] = self._ask("turn", budget)["seconds"]
        self.seconds += answer
        return min(answer)

    def profile(self, budget: float) -> dict[str, float]:
        """Least seconds of each workload in a run, by symbol: of our artifacts only."""
        time.sleep(PAUSE)
        answer: dict[str, float] = self._ask("profile", budget)["operators"]
        return answer

    def outputs(self) -> Arrays:
        import numpy as np

        with np.load(self._outputs) as stored:
            return [stored[name] for name in stored.files]

    def _ask(self, request: str, argument: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(json.dumps([request, argument]), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise BenchError(f"{self.name} ended: {self._said()}") from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """What the process says next. Raises BenchError with its last words where it ended."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _PATIENCE)[0]:
            raise BenchError(f"{self.name} said nothing for {_PATIENCE:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"{self.name} ended with {self._process.wait()}: {self._said()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()[-600:]


@contextmanager
def started(name: str, kind: str, file: Path, inputs: Path, threads: int) -> Iterator[Engine]:
    """An engine of one of KINDS, loaded, on `threads` threads; `inputs` is an .npz in the order of the model's."""
    limits = {name: str(threads) for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    argv = [sys.executable, "-m", "bench.engines", kind, str(file), str(inputs), str(threads)]
    with tempfile.TemporaryDirectory(prefix="tvmake-engine-") as folder, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **limits, "PYTHONPATH": paths},
        )
        try:
            engine = Engine(name, process, errors, Path(folder, "outputs.npz"))
            engine.answer()
            yield engine
        finally:
            process.kill()
            process.communicate()


def error_of(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest max |y - r| / max |r| over all outputs; infinite where their number or shapes differ."""
    from pipeline import references

    if len(ours) != len(theirs):
        return float("inf")
    return max((references.error_of(y, r) for y, r in zip(ours, theirs, strict=True)), default=0.0)


def seeded(model: Path, file: Path) -> None:
    """Writes inputs for an ONNX model into an .npz, in order: the same every time. Integers are bytes."""
    import numpy as np
    import onnx

    from pipeline.samples import seeded_inputs
    from pipeline.types import TensorSpec

    graph = onnx.load(model, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    specs = []
    for value in graph.input:
        if value.name not in weights:
            kind = value.type.tensor_type
            shape = tuple(axis.dim_value for axis in kind.shape.dim)
            specs.append(TensorSpec(value.name, shape, str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))))
    np.savez(file, *seeded_inputs(specs, 0, 256).values())


if __name__ == "__main__":
    _serve(*sys.argv[1:])
