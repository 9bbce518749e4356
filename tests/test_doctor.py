"""`doit doctor`: what is wrong with a machine is said in words, and nothing that is wrong stops the saying."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pty
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import doctor, processor, toolchain
from pipeline.doctor import CHECKS, Check, Finding, Place, State, compiling, machine, surroundings
from pipeline.store import Store

ROOT = Path(doctor.__file__).parents[2]
COMMAND = [sys.executable, "-m", "doit", "doctor"]
IN_CHILD = [check.title for check in CHECKS if check.place is Place.CHILD]
NOTHING = [sys.executable, "-S", "-c", ""]  # a child that has nothing to say


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TVMAKE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _compiler_is_looked_for_anew() -> Iterator[None]:
    toolchain.compiler.cache_clear()
    yield
    toolchain.compiler.cache_clear()


def found(child: Sequence[str] = NOTHING, limit: float = 60) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(child, limit)}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a person runs it, in an empty folder, with a store of its own."""
    return subprocess.run(
        [*COMMAND, *options],
        cwd=workplace(folder),
        env={**os.environ, "TVMAKE_CACHE": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def workplace(folder: Path) -> Path:
    """An empty folder; where tvmake is not installed, with a file that tells doit of the command."""
    place = folder / "empty"
    place.mkdir()
    if not any(entry.name == "doctor" for entry in importlib.metadata.entry_points(group="doit.COMMAND")):
        (place / "doit.cfg").write_text("[COMMAND]\ndoctor = pipeline.commands.doctor:Doctor\n")
    return place


# --- the command ------------------------------------------------------------------------------------------------------


def test_here_all_is_well(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if not line.lstrip().startswith("→")]
    assert [line[9:].split("  ")[0] for line in lines[:-1]] == [check.title for check in CHECKS]
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "warning"}
    assert lines[-1].startswith("no fault, ")
    assert "\x1b" not in done.stdout
    assert not list((tmp_path / "empty").glob("dodo*"))
    assert not [path for path in (tmp_path / "cache" / "cas").rglob("*") if path.is_file()]


def test_json(tmp_path: Path) -> None:
    done = run(tmp_path, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (0, True)
    assert [finding["name"] for finding in report["findings"]] == [check.title for check in CHECKS]
    assert all(set(finding) == {"name", "state", "said", "hint"} for finding in report["findings"])


def test_without_a_compiler(tmp_path: Path) -> None:
    done = run(tmp_path, "--json", PATH="", CXX="")
    report = json.loads(done.stdout)
    states = {finding["name"]: finding for finding in report["findings"]}
    assert (done.returncode, report["ok"]) == (1, False)
    assert states["compiler"]["state"] == "fault"
    assert "apt-get install g++" in states["compiler"]["hint"]
    assert states["compile and run"]["state"] == "warning"
    assert [name for name, finding in states.items() if finding["state"] == "fault"] == ["compiler"]


def test_a_terminal_gets_colour(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "TVMAKE_CACHE": str(tmp_path / "cache"), "TVM_USE_RUNTIME_LIB": "1"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        COMMAND, cwd=workplace(tmp_path), env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        said = b"".join(iter(lambda: _read(ours), b"")).decode()
    os.close(ours)
    assert process.returncode == 1  # TVM was told to load without its compiler
    assert "\x1b[32mok\x1b[0m" in said
    assert re.search("\x1b\\[1;31mfault\x1b\\[0m +tvm import ", said)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other end of a terminal is closed
        return b""


def test_a_pipe_that_knows_only_ascii(tmp_path: Path) -> None:
    done = run(tmp_path, PYTHONIOENCODING="ascii", TVM_USE_RUNTIME_LIB="1")
    assert (done.returncode, done.stderr) == (1, "")
    assert "? unset TVM_USE_RUNTIME_LIB" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 fault, ")


def test_arguments_are_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "everything")
    assert done.returncode == 3
    assert "takes no arguments: everything" in done.stderr
    assert "Traceback" not in done.stderr


# --- the store --------------------------------------------------------------------------------------------------------


def _file(cache: Path) -> None:
    cache.write_text("")


def _other_format(cache: Path) -> None:
    cache.mkdir()
    (cache / "TVMAKE_STORE").write_text("tvmake store, format 99\n")


def _somebody_elses(cache: Path) -> None:
    cache.mkdir()
    (cache / "thesis.tex").write_text("")


def _broken_inside(cache: Path) -> None:
    Store(cache)
    shutil.rmtree(cache / "tmp")
    (cache / "tmp").write_text("")


@pytest.mark.parametrize(
    ("spoil", "said", "hint"),
    [
        (_file, "", "TVMAKE_CACHE"),
        (_other_format, "format 99", "TVMAKE_CACHE"),
        (_somebody_elses, "neither empty nor a store", "TVMAKE_CACHE"),
        (_broken_inside, "writing blob", "delete this one"),
    ],
)
def test_a_folder_that_is_no_store(cache: Path, spoil: Callable[[Path], None], said: str, hint: str) -> None:
    spoil(cache)
    findings = found()
    assert findings["store"].state is State.FAULT
    assert said in findings["store"].said
    assert hint in findings["store"].hint
    assert findings["store disk"].state is not State.FAULT
    assert findings["quarantine"].state is State.OK


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_that_cannot_be_written(cache: Path) -> None:
    Store(cache)
    folders = [cache, *(path for path in cache.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        finding = found()["store"]
    finally:
        for folder in folders:
            folder.chmod(stat.S_IRWXU)
    assert finding.state is State.FAULT
    assert "permissions" in finding.hint


def test_damaged_blobs_are_counted(cache: Path) -> None:
    store = Store(cache)
    digest = store.put(b"bytes")
    path = store.path(digest)
    assert path is not None
    path.chmod(0o644)
    path.write_bytes(b"rotten"[: digest.size])
    assert Store(cache).get(digest) is None
    finding = found()["quarantine"]
    assert finding.state is State.WARNING
    assert finding.said.startswith("1 file in ")
    assert str(cache / "quarantine") in finding.hint


# --- the pair of TVM and FFI, and the child that dies -----------------------------------------------------------------


def test_a_wrong_pair_is_told_in_words(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15"}
    monkeypatch.setattr(toolchain, "package_version", lambda package: versions.get(package, toolchain.ABSENT))
    findings = found()
    assert findings["tvm pair"].state is State.FAULT
    assert "0.1.15 is not a pair known to work" in findings["tvm pair"].said
    assert "apache-tvm-ffi==0.1.14" in findings["tvm pair"].hint
    assert findings["doit"].state is State.WARNING
    # What is optional and absent is no warning, but one is told what it is for.
    assert (findings["torch"].state, findings["torch"].hint) == (State.OK, 'pip install "tvmake[torch]"')


def test_a_missing_tvm_is_told_in_words(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "package_version", lambda package: toolchain.ABSENT)
    finding = found()["tvm pair"]
    assert (finding.state, finding.said) == (State.FAULT, "apache-tvm is not installed")


def test_what_was_found_before_a_crash_stands(cache: Path) -> None:
    """The real child, in which saving IR does what it does with a wrong FFI."""
    findings = found(
        python(
            "import ctypes, sys; from pipeline import doctor; from pipeline.compiler import ir; "
            "ir.canonical = lambda func: ctypes.string_at(0); doctor.tell(sys.stdout)"
        )
    )
    assert findings["tvm import"].state is State.OK
    assert findings["saving IR"].state is State.FAULT
    assert "killed by SIGSEGV" in findings["saving IR"].said
    assert "apache-tvm-ffi==0.1.14" in findings["saving IR"].hint
    for name in IN_CHILD[2:]:
        assert findings[name].state is State.WARNING
        assert findings[name].said.startswith("not checked")
    assert findings["store"].state is State.OK


@pytest.mark.parametrize(
    ("child", "said"),
    [
        (python("import os; os.kill(os.getpid(), 4)"), "killed by SIGILL (an illegal instruction)"),
        (python("import os; os.kill(os.getpid(), 40)"), "killed by signal 40"),
        (python("import sys; print('noise', 7, {}); sys.exit('no such thing')"), "exit code 1: no such thing"),
        (python("import sys; print('[]\\n{\"name\":', end=''); sys.exit(3)"), "ended with exit code 3"),
        (["/no/such/python"], "no process can be started: No such file"),
    ],
)
def test_each_end_of_the_child_is_a_finding(cache: Path, child: list[str], said: str) -> None:
    findings = found(child)
    assert findings["tvm import"].state is State.FAULT
    assert said in findings["tvm import"].said
    assert findings["tvm import"].hint
    assert findings["llvm"].state is State.WARNING


def test_a_child_that_hangs_is_stopped_with_its_children(cache: Path, tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    code = (
        "import subprocess, time, pathlib; child = subprocess.Popen(['sleep', '60']); "
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid)); time.sleep(60)"
    )
    findings = found(python(code), limit=1)
    assert findings["tvm import"].said == "had not ended after 1 s"
    deadline = time.monotonic() + 10
    while _lives(int(note.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_all_others_wait_for_a_tvm_that_loads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_USE_RUNTIME_LIB", "1")
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["tvm import"].hint == "unset TVM_USE_RUNTIME_LIB"
    assert [findings[name].state for name in IN_CHILD] == [State.FAULT] + [State.WARNING] * (len(IN_CHILD) - 1)


# --- single checks ----------------------------------------------------------------------------------------------------


def test_a_check_that_raises_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_baked() -> Finding:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(doctor, "CHECKS", (Check(half_baked, hint="bake it"),))
    assert list(doctor.examine(NOTHING)) == [
        Finding("half baked", State.FAULT, "ZeroDivisionError: first line", "bake it")
    ]


def test_a_compiler_that_is_named_and_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = found()["compiler"]
    assert finding.state is State.FAULT
    assert "CXX names no-such-compiler" in finding.said


@pytest.mark.parametrize(("free", "state"), [(6e9, State.OK), (4e9, State.WARNING), (1e8, State.FAULT)])
def test_a_disk_that_fills(cache: Path, monkeypatch: pytest.MonkeyPatch, free: float, state: State) -> None:
    usage = shutil.disk_usage(cache.parent)._replace(free=int(free))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    finding = surroundings.store_disk()
    assert finding.state is state
    assert bool(finding.hint) is (state is not State.OK)


def test_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: ((os.cpu_count() or 1) + 0.5, 0.0, 0.0))
    finding = machine.cores()
    assert finding.state is State.WARNING
    assert "noisy" in finding.said


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    now = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: now._replace(available=1_000_000_000))
    finding = machine.memory()
    assert (finding.state, finding.said.split(" of ")[0]) == (State.WARNING, "1.0 GB available")


def test_a_temporary_folder_that_is_not_there(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert found()["temporary files"].state is State.WARNING
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    finding = found()["temporary files"]
    assert (finding.state, finding.hint.split()[:2]) == (State.FAULT, ["set", "TMPDIR"])


@pytest.mark.skipif("avx2" not in processor._features(), reason="hides what an x86 processor must have first")
def test_a_virtual_machine_that_hides_features(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.compiler import targets

    native = targets.resolve(targets.NATIVE)
    hidden = frozenset(name for name in processor._features() if not name.startswith(("avx", "fma", "f16c", "bmi")))
    monkeypatch.setattr(processor, "_features", lambda: hidden)
    finding = compiling.processor()
    assert finding.state is State.FAULT
    assert f"takes this for a {native['mcpu']}" in finding.said
    assert len(re.findall("avx512_?bf16", finding.said)) <= 1
    # What one is told to write is what a target's file may hold, and code for it runs here.
    told: dict[str, Any] = tomllib.loads(finding.hint.partition(": ")[2])["target"]
    assert processor.missing_features(targets.resolve(told)) == []
