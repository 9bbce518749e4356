"""What of this machine would keep tvmake from working, found by trying it.

Owns: the checks, in the order in which they are told, and the child process that those with TVM share, because a wrong
pair of TVM and FFI, or code for another processor, kills the process that tries it. Must not: repair anything, print
for people, or leave anything behind but an empty store.

    examine()                    the findings, each as soon as it is known
    python -m pipeline.doctor    the child: the findings of the checks that load TVM, one JSON object a line

A finding that was written before the child died stands; the death itself is the finding of the check that was running.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import io
import json
import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from pipeline import toolchain
from pipeline.compiler.libraries import LIBRARIES, Library
from pipeline.errors import DeviceError, RemoteError, StoreError, TvmakeError
from pipeline.processor import missing_features
from pipeline.store import Store, default_root

if TYPE_CHECKING:
    from pipeline.devices.tracker import Standing

TIME_LIMIT = 60.0  # seconds for the child; it needs about two, and a cold network disk some ten more

_LOW_DISK, _NO_DISK = 5_000_000_000, 200_000_000  # bytes
_LOW_MEMORY, _NO_MEMORY = 2_000_000_000, 500_000_000  # bytes; a process with TVM loaded holds 0.2 GB and grows
_SLOW_IMPORT = 5.0  # seconds; 1 to 2 are usual

_GOOD_PAIR = 'pip install "apache-tvm==0.27.0.post1" "apache-tvm-ffi==0.1.14.post1"'
_REINSTALL = "pip install --force-reinstall tvmake"
_OTHER_STORE = "set TVMAKE_CACHE to another folder, or delete this one: it holds only what can be built again"
_COMPILER = "install one (Debian: apt-get install g++), or name one in the environment variable CXX"
_TMPDIR = "set TMPDIR to a folder that can be written and run from"
_PLAIN_TARGET = 'target = {{kind = "llvm", mcpu = "{}"}}'
_OLDER = "name an older processor in the target's file, such as " + _PLAIN_TARGET.format("x86-64-v2")
_UNRUN = "see whether the C++ compiler works by itself; where it is the code that cannot run, " + _OLDER
_AGAIN = "mend the fault above, then run `doit doctor` again"


class State(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"  # works, but slowly, or not for long, or not everything
    FAULT = "fault"  # something that tvmake needs does not work


@dataclass(frozen=True)
class Finding:
    """What one check found: a state, a sentence about it, and, where there is something to do, what to type."""

    name: str
    state: State
    said: str
    hint: str = ""


class Place(enum.Enum):
    HERE = "here"
    CHILD = "child"  # loads TVM and may die


@dataclass(frozen=True)
class Check:
    """One thing to look at. `hint` is for when `run` raises an error without one, or dies."""

    run: Callable[[], Finding]
    place: Place = Place.HERE
    hint: str = _REINSTALL
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or getattr(self.run, "__name__", "check").replace("_", " ")


def examine(child: Sequence[str] | None = None, limit: float = TIME_LIMIT) -> Generator[Finding]:
    """Every check of CHECKS in order. `child` is the command to run instead of this module's; `limit` is in seconds.

    Never raises for what a check meets. The child is gone when the last finding is taken or the iterator is closed.
    """
    with _Child(child or [sys.executable, "-m", "pipeline.doctor"], limit) as other:
        for check in CHECKS:
            yield _run(check) if check.place is Place.HERE else other.finding(check)


def _run(check: Check) -> Finding:
    try:
        finding = check.run()
    except TvmakeError as error:
        finding = Finding("", State.FAULT, error.message, error.hint or check.hint)
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "")
        finding = Finding("", State.FAULT, f"{type(error).__name__}: {said}".removesuffix(": "), check.hint)
    return replace(finding, name=check.title)


# --- checks without TVM -----------------------------------------------------------------------------------------------


def python() -> Finding:
    """A Python too old for tvmake is refused by pip and would not have come this far."""
    said = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return _warning(f"{said}; tvmake is tested on Linux only", "run it on Linux, in a container for instance")
    return _ok(said)


def doit() -> Finding:
    version = toolchain.package_version("doit")
    if not version.startswith("0.37."):
        return _warning(f"{version}; tvmake is tested with 0.37", 'pip install "doit==0.37.*"')
    return _ok(version)


def tvm_pair() -> Finding:
    toolchain.require_good_pair()
    tvm, ffi = toolchain.package_version("apache-tvm"), toolchain.package_version("apache-tvm-ffi")
    return _ok(f"apache-tvm {tvm} with apache-tvm-ffi {ffi}, a pair known to work")


def compiler() -> Finding:
    driver = toolchain.compiler()
    if driver is None:
        named = os.environ.get("CXX")
        missing = f"CXX names {named}, which is not there" if named else "none of g++, clang++, c++ is on the PATH"
        return _fault(f"there is no C++ compiler to link with: {missing}", _COMPILER)
    return _ok(f"{driver}: {toolchain.compiler_identity() or 'says nothing of itself'}")


def cores() -> Finding:
    usable, present, load = len(os.sched_getaffinity(0)), os.cpu_count() or 1, os.getloadavg()[0]
    said = f"{usable} of {present} usable, load {load:.1f}"
    if load > present:
        return _warning(f"{said}: what is timed now will be noisy", "measure again when `uptime` shows a smaller load")
    return _ok(said)


def memory() -> Finding:
    import psutil

    found = psutil.virtual_memory()
    said = f"{_gigabytes(found.available)} available of {_gigabytes(found.total)}"
    hint = "close what uses the memory (`ps aux --sort -rss | head`): a compiler that gets none is killed"
    return _by_limits(found.available, _LOW_MEMORY, _NO_MEMORY, said, hint)


def store() -> Finding:
    """Opens the store, which makes it where there is none, writes a new blob, reads it and removes it."""
    root = default_root()
    found = Store(root)
    written = b"tvmake doctor " + secrets.token_bytes(16)
    digest = found.put(written)
    if found.get(digest) != written:
        raise StoreError(f"{root} does not give back what was written to it", hint="look for a failing disk: `dmesg`")
    path = found.path(digest)
    if path is not None:
        path.unlink(missing_ok=True)
    return _ok(f"{root}, can be written")


def store_disk() -> Finding:
    root = default_root()
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    hint = "free some space, or set TVMAKE_CACHE to a folder on a larger disk"
    return _by_limits(free, _LOW_DISK, _NO_DISK, f"{_gigabytes(free)} free", hint)


def quarantine() -> Finding:
    folder = default_root() / "quarantine"
    try:
        count = len(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        count = 0
    if count:
        said = f"{count} file{'s' * (count > 1)} in {folder} did not pass the check of every reading"
        return _warning(said, f"look for a failing disk (`dmesg`); to forget them: rm -rf {shlex.quote(str(folder))}")
    return _ok("nothing in the store was found damaged")


def remote() -> Finding:
    """Asks the remote that a build here would use for an entry that nobody has."""
    from pipeline.remotes import Terms, open_remote
    from pipeline.remotes.settings import load

    settings = load(Path.cwd())
    if not settings.uses_remote or settings.url is None:
        return _ok("none is used: only this machine has what is built here")
    opened = open_remote(settings.url, Terms(settings.connect, settings.stall, settings.secrets or {}))
    begun = time.monotonic()
    try:
        opened.action(secrets.token_hex(32))
        return _ok(f"{opened.name} answers in {1e3 * (time.monotonic() - begun):.0f} ms; policy {settings.policy}")
    except RemoteError as error:
        return _warning(error.message, error.hint or "builds go on without it; see whether the server runs")
    finally:
        opened.close()


def devices() -> Finding:
    """Asks the trackers that the targets of the workspace name who is there: all at once, each for some seconds."""
    from concurrent.futures import ThreadPoolExecutor

    from pipeline.config import load_target

    found = [load_target(path).device for path in sorted(Path.cwd().glob("targets/*.toml"))]
    wanted = list(dict.fromkeys((each.tracker, each.key) for each in found if each is not None and each.tracker))
    if not wanted:
        return _ok("no target of this folder is measured on devices behind a tracker")
    trackers = list(dict.fromkeys(tracker for tracker, _ in wanted))
    with ThreadPoolExecutor(len(trackers)) as threads:
        answers = dict(zip(trackers, threads.map(_asked_tracker, trackers), strict=True))
    told = [_devices_of(answers[tracker], tracker, key) for tracker, key in wanted]
    said, hints = "; ".join(each.said for each in told), [each.hint for each in told if each.hint]
    return _warning(said, hints[0]) if hints else _ok(said)


def _asked_tracker(address: str) -> dict[str, Standing] | DeviceError:
    from pipeline.devices.tracker import Tracker

    try:
        with Tracker(address) as tracker:
            return tracker.standings()
    except DeviceError as error:
        return error


def _devices_of(answer: dict[str, Standing] | DeviceError, tracker: str, key: str) -> Finding:
    """What a tracker has of a key: how many devices, and what they are at."""
    from pipeline.devices.tracker import serve

    if isinstance(answer, DeviceError):
        return _warning(answer.message, answer.hint)
    there = answer.get(key)
    if there is None or not there.total:
        others = ", ".join(name for name, each in answer.items() if each.total) or "none at all"
        return _warning(f"the RPC tracker {tracker} has no device {key}; it has {others}", serve(tracker, key))
    waiting = f", {there.waiting} waiting for one" if there.waiting else ""
    return _ok(f"{key} at {tracker}: {there.total} there, {there.free} free, {there.busy} busy{waiting}")


def executor() -> Finding:
    """Looks at who would run the stages of a build here."""
    from pipeline.executors import VARIABLE, require_meant

    named = os.environ.get(VARIABLE, "")
    require_meant(named)
    if "://" not in named:
        return _ok(f"{named or 'processes of this machine'}")
    from pipeline.executors.dask import address_of
    from pipeline.executors.placing import unlike
    from pipeline.executors.serving import look

    seen = [each.worker for each in look(address_of(named))]
    wrong = [f"{worker.name} {why}" for worker in seen if (why := unlike(worker, {}))]
    said = f"{len(seen)} worker{'s' * (len(seen) != 1)} at {named}"
    if wrong or not seen:
        return _warning("; ".join([said, *wrong]), f"doit cluster status {address_of(named)}")
    return _ok(said)


def temporary_files() -> Finding:
    folder, wanted = tempfile.gettempdir(), os.environ.get("TMPDIR")
    with tempfile.TemporaryFile() as stream:
        stream.write(bytes(4096))
        stream.flush()
    if wanted and Path(wanted).resolve() != Path(folder).resolve():
        return _warning(f"{folder} is used, because TMPDIR ({wanted}) cannot be written", _TMPDIR)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return _warning(f"{folder} is mounted so that no library can be loaded from it", _TMPDIR)
    return _ok(f"{folder}, can be written")


def _optional(package: str, what: str, extra: str) -> Finding:
    version = toolchain.package_version(toolchain.PACKAGES[package])
    if version == toolchain.ABSENT:
        return _ok(f"not installed; only needed to {what}", f'pip install "tvmake[{extra}]"')
    return _ok(version)


def _library(library: Library) -> Finding:
    found = library.find()
    if found is None:
        return _ok("not installed; only needed for the functions that it would compute", library.install)
    return _ok(f"{found.version}, {library.licence}")


# --- checks with TVM: in the child, in this order, the first one first ------------------------------------------------
# These functions import pipeline.compiler inside, because this module is also imported where neither may be.


def tvm_import() -> Finding:
    if os.environ.get("TVM_USE_RUNTIME_LIB") == "1":
        return _fault("TVM_USE_RUNTIME_LIB is set, so TVM loads without its compiler", "unset TVM_USE_RUNTIME_LIB")
    started = time.perf_counter()
    importlib.import_module("tvm")
    seconds = time.perf_counter() - started
    said = f"{seconds:.1f} s"
    if seconds > _SLOW_IMPORT:
        return _warning(f"{said}; 1 to 2 s are usual", "try again: the first time reads the disk, and a load slows it")
    return _ok(said)


def saving_ir() -> Finding:
    """The first thing that a wrong pair of TVM and FFI dies of."""
    from pipeline.compiler import ir, trial

    written = ir.canonical(trial.addition())
    if ir.canonical(ir.load(written)) != written:
        return _fault("a function that is saved and loaded is not the same function", _GOOD_PAIR)
    return _ok(f"a function is the same after JSON ({len(written)} bytes)")


def llvm() -> Finding:
    from pipeline.compiler import targets

    native = targets.resolve(targets.NATIVE)
    cpu = native.get("mcpu")
    said = f"LLVM {targets.llvm_version()}, processor {cpu}, triple {native.get('mtriple')}"
    if cpu in (None, "", "generic", "x86-64"):
        return _warning(f"{said}: LLVM does not know this processor, so native code is slow", _by_name())
    return _ok(said)


def processor() -> Finding:
    """Features that LLVM takes for granted by the processor's name, and a virtual machine may hide."""
    from pipeline.compiler import targets, trial

    native = targets.resolve(targets.NATIVE)
    if platform.machine() not in _X86:
        return _ok(f"{native.get('mcpu')}; its features are not compared on {platform.machine()}")
    assumed = trial.assumed_features(native) - _NEVER_CHOSEN
    # Both spellings of one feature may be in the list: Linux's avx512_bf16 and LLVM's avx512bf16.
    missing = {name.replace("_", ""): name for name in missing_features({**native, "mattr": sorted(assumed)})}
    if missing:
        return _fault(
            f"LLVM takes this for a {native.get('mcpu')}, which has {', '.join(missing)}; this machine does not show "
            "them (a virtual machine may hide them), so native code can die of an illegal instruction",
            _by_name(),
        )
    return _ok(f"has the vector instructions that LLVM assumes of a {native.get('mcpu')}")


def _by_name() -> str:
    """The hint to name a processor: for x86, the highest level of its ABI that is all here."""
    if platform.machine() not in _X86:
        return "name the processor in the target's file: " + _PLAIN_TARGET.format("...")
    levels = ("x86-64-v4", "x86-64-v3", "x86-64-v2")
    level = next((level for level in levels if not missing_features({"mcpu": level})), "x86-64")
    return "in the target's file: " + _PLAIN_TARGET.format(level)


def compile_and_run() -> Finding:
    """The way of every operator: code for this processor, linked by the compiler driver, loaded and called."""
    from pipeline.compiler import objects, targets, trial
    from pipeline.linker import link

    started = time.perf_counter()
    made = objects.compile_function(trial.addition(), "tvmake_doctor", targets.resolve(targets.NATIVE))
    if toolchain.compiler() is None:
        return _warning("code is generated, but without a compiler not linked and not run", _AGAIN)
    with tempfile.TemporaryDirectory(prefix="tvmake-doctor-") as folder:
        library = Path(folder) / "doctor.so"
        library.write_bytes(link({"doctor.o": made}))
        right = trial.adds(library, "tvmake_doctor")
    if not right:
        return _fault("a compiled addition gives wrong sums on this processor", _OLDER)
    return _ok(f"a function was compiled, linked, loaded and run in {time.perf_counter() - started:.2f} s")


_X86 = ("x86_64", "i686")

# LLVM uses these only where a program asks for them by name, and a virtual machine may well hide them.
_NEVER_CHOSEN = frozenset({"avx512vp2intersect", "amx-tile", "amx-int8", "amx-bf16", "amx-fp16", "amx-complex"})

CHECKS = (
    Check(python),
    Check(doit),
    Check(tvm_pair),
    Check(tvm_import, Place.CHILD),
    Check(saving_ir, Place.CHILD, _GOOD_PAIR, name="saving IR"),
    Check(llvm, Place.CHILD),
    Check(processor, Place.CHILD, _OLDER),
    Check(compiler, hint=_COMPILER),
    Check(compile_and_run, Place.CHILD, _UNRUN),
    Check(cores),
    Check(memory),
    Check(store, hint=_OTHER_STORE),
    Check(store_disk, hint=_OTHER_STORE),
    Check(quarantine, hint=_OTHER_STORE),
    Check(remote, hint="see docs/caches.md"),
    Check(devices, hint="see docs/devices.md"),
    Check(executor, hint="see docs/cluster.md"),
    Check(temporary_files, hint=_TMPDIR),
    Check(lambda: _optional("onnx", "read ONNX models", "onnx"), name="onnx"),
    Check(lambda: _optional("onnxsim", "simplify ONNX models", "onnx"), name="onnxsim"),
    Check(lambda: _optional("onnxruntime", "compare ONNX models with a reference", "check"), name="onnxruntime"),
    Check(lambda: _optional("torch", "read PyTorch models", "torch"), name="torch"),
    *(Check(partial(_library, library), name=library.name) for library in LIBRARIES),
)


# --- the child --------------------------------------------------------------------------------------------------------


class _Child:
    """The process that runs the checks with TVM, and what it says. It is killed when the block ends."""

    def __init__(self, command: Sequence[str], limit: float) -> None:
        self._limit = limit
        self._late = False
        self._over = False
        self._answers: IO[str] = io.StringIO()
        # In memory, because the temporary folder may be what is wrong here.
        self._log: IO[bytes] = os.fdopen(os.memfd_create("tvmake-doctor"), "w+b")
        self._process: subprocess.Popen[str] | None = None
        self._refused = ""
        self._alarm = threading.Timer(limit, self._stop)
        self._alarm.daemon = True
        try:
            self._start(command)
        except OSError as error:
            self._refused = f"no process can be started: {error.strerror}"

    def _start(self, command: Sequence[str]) -> None:
        # The child finds this package where the parent found it, installed or not.
        package = str(Path(__file__).resolve().parent.parent)
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # so that a compiler that hangs is killed with it
        )
        assert self._process.stdout is not None
        self._answers = self._process.stdout
        self._alarm.start()

    def __enter__(self) -> _Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alarm.cancel()
        if self._process is not None:
            self._kill(self._process)
            self._process.wait()
        self._answers.close()
        self._log.close()

    def finding(self, check: Check) -> Finding:
        """What the child says of the next of its checks, or what its end means for it. Waits for it."""
        while not self._over:
            line = self._answers.readline()
            if not line:
                self._over = True
                if cause := self._cause_of_death():
                    return Finding(check.title, State.FAULT, cause, check.hint)
            # What a library prints is not a finding.
            with contextlib.suppress(ValueError, TypeError, KeyError):
                read = json.loads(line)
                if read["name"] == check.title:
                    return Finding(read["name"], State(read["state"]), read["said"], read["hint"])
        return Finding(check.title, State.WARNING, "not checked, because of the fault before", _AGAIN)

    def _cause_of_death(self) -> str:
        """Why the child has said its last; empty where it ended because it had nothing more to say."""
        if self._process is None:
            return self._refused
        code = self._process.wait()
        if self._late:
            return f"had not ended after {self._limit:g} s"
        if code < 0:
            return f"the process that tried it was killed by {_signal_name(-code)}"
        if code == 0:
            return ""
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        return ": ".join([f"the process that tried it ended with exit code {code}", *last])

    def _stop(self) -> None:
        self._late = True
        if self._process is not None:
            self._kill(self._process)

    @staticmethod
    def _kill(process: subprocess.Popen[str]) -> None:
        if process.returncode is None:  # one that was waited for has given its number back
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)


def _signal_name(number: int) -> str:
    try:
        found = signal.Signals(number)
    except ValueError:
        return f"signal {number}"
    meanings = {
        signal.SIGSEGV: "a segmentation fault",
        signal.SIGILL: "an illegal instruction",
        signal.SIGKILL: "perhaps for want of memory",
    }
    return f"{found.name} ({meanings[found]})" if found in meanings else found.name


def tell(stream: IO[str]) -> None:
    """The child's life: each of its checks, each finding written before the next check starts.

    Ends after the first one where TVM cannot be loaded: all others would say only that again.
    """
    for number, check in enumerate(check for check in CHECKS if check.place is Place.CHILD):
        finding = _run(check)
        print(json.dumps(asdict(finding)), file=stream, flush=True)
        if number == 0 and finding.state is State.FAULT:
            return


# --- words ------------------------------------------------------------------------------------------------------------


def _ok(said: str, hint: str = "") -> Finding:
    return Finding("", State.OK, said, hint)


def _warning(said: str, hint: str) -> Finding:
    return Finding("", State.WARNING, said, hint)


def _fault(said: str, hint: str) -> Finding:
    return Finding("", State.FAULT, said, hint)


def _by_limits(amount: int, low: int, none: int, said: str, hint: str) -> Finding:
    """The state of an amount in bytes: a fault below `none`, a warning below `low`."""
    if amount < none:
        return _fault(said, hint)
    return _warning(said, hint) if amount < low else _ok(said)


def _gigabytes(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB"


if __name__ == "__main__":
    # Findings go out by a descriptor that no compiler inherits; what anything else prints goes to the log.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        tell(answers)
