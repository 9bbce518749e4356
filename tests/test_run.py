"""The command that runs an artifact, as a person calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sample_artifact
from sample_artifact import BF16, WEIGHTS, assemble, write_manifest

from pipeline import run
from pipeline.samples import seeded_inputs

ROOT = Path(run.__file__).parent.parent


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_artifact.parts(tmp_path_factory.getbasetemp())


@pytest.fixture
def folder(parts: Path, tmp_path: Path) -> Path:
    return assemble(parts, tmp_path / "artifact")


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that an error is told in."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_says_what_comes_out_and_how_long_it_takes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(folder), "--repeat", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sample for here, loaded in ")
    assert [line.split()[0] for line in lines[2:9]] == ["output", "y", "z", "n", "d", "same_x", "same_w"]
    assert lines[6].split() == ["d", "[3]", "float32", "2", "4", "6"]
    assert lines[-1].startswith("time per run: median ")
    assert lines[-1].endswith(" over 3 runs")


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(folder), "--json", "--repeat", "4", "--verify"]) == 0
    report = json.loads(capsys.readouterr().out)
    weight = report["outputs"][-1]
    assert weight == {
        "name": "same_w", "shape": [8, 16], "dtype": "float32", "min": 0, "mean": 63.5, "max": 127, "not_finite": 0
    }  # fmt: skip
    assert report["repeat"] == 4
    assert 0 < report["min_seconds"] <= report["median_seconds"] < 1


def test_without_timing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(folder), "--repeat", "0"]) == 0
    assert "time per run" not in capsys.readouterr().out


def test_inputs_from_files_and_outputs_to_one(folder: Path, tmp_path: Path) -> None:
    x, h = np.ones((1, 8), np.float32), np.asarray([1, 2, 3, 4], BF16)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "rest.npz", h=h, s=np.float32(2))
    np.savez(tmp_path / "one.npz", m=np.ones(4, bool), unused=x)
    files = [f"x={tmp_path}/x.npy", f"{tmp_path}/rest.npz", f"m={tmp_path}/one.npz"]
    options = [option for file in files for option in ("--input", file)]
    assert run.main([str(folder), *options, "--output", str(tmp_path / "out.npz")]) == 0
    with np.load(tmp_path / "out.npz") as found:
        assert found.files == ["y", "z", "n", "d", "same_x", "same_w"]
        np.testing.assert_array_equal(found["y"], x @ WEIGHTS["w"] + 2)
        np.testing.assert_array_equal(found["z"].view(BF16), h + WEIGHTS["c"])
        assert not found["n"].any()
    first = (tmp_path / "out.npz").read_bytes()
    assert run.main([str(folder), *options, "--output", str(tmp_path / "out.npz")]) == 0
    assert (tmp_path / "out.npz").read_bytes() == first


def test_random_inputs_follow_the_seed(folder: Path, tmp_path: Path) -> None:
    for seed in ("3", "4"):
        assert run.main([str(folder), "--seed", seed, "--output", str(tmp_path / f"{seed}.npz")]) == 0
    with np.load(tmp_path / "3.npz") as three, np.load(tmp_path / "4.npz") as four:
        wanted = seeded_inputs(sample_artifact.INPUTS, 3)["x"]
        np.testing.assert_array_equal(three["same_x"], wanted)
        assert (four["same_x"] != wanted).all()


def test_what_is_not_finite_is_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.asarray([[np.nan, np.inf, 1, 1, 1, 1, 1, 1]], np.float32))
    options = [str(folder), "--input", f"x={tmp_path}/x.npy"]
    assert run.main([*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["outputs"][4]
    assert (report["name"], report["mean"], report["not_finite"]) == ("same_x", None, 2)
    assert run.main(options) == 0
    assert "2 not finite" in capsys.readouterr().out


def test_an_output_without_elements() -> None:
    report = run._output_report("none", np.zeros((0, 3), np.float32))
    assert (report.min, report.mean, report.max, report.not_finite) == (None, None, None, 0)


def test_errors_are_one_line_and_exit_1(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 8), np.float32))
    np.savez(tmp_path / "q.npz", q=np.zeros(3))
    np.save(tmp_path / "objects.npy", np.asarray([{}], object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("not an array")
    (tmp_path / "zip.npz").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "empty.npy").touch()
    for name, words in [
        (f"x={tmp_path}/x.npy", "input 'x': expected shape [1, 8], got [2, 8]"),
        (f"{tmp_path}/q.npz", "the model has no input 'q'; its inputs: x, s, h, m"),
        (f"q={tmp_path}/x.npy", "the model has no input 'q'"),
        (f"x={tmp_path}/q.npz", "q.npz has no array 'x'; it has: q"),
        (f"x={tmp_path}/gone.npy", "gone.npy cannot be read: No such file"),
        (f"x={tmp_path}/text.npy", "text.npy is not a .npy or .npz file"),
        (f"x={tmp_path}/objects.npy", "objects.npy is not a .npy or .npz file"),
        (f"x={tmp_path}/empty.npy", "empty.npy is not a .npy or .npz file"),
        (f"{tmp_path}/zip.npz", "zip.npz is not a .npy or .npz file"),
    ]:
        assert run.main([str(folder), "--input", name]) == 1, name
        assert words in line_of(capsys)
    assert run.main([str(tmp_path)]) == 1
    assert "is not an artifact: it has no manifest.json (build it again)" in line_of(capsys)
    assert run.main([str(folder), "--output", str(tmp_path / "no" / "out.npz")]) == 1
    assert "out.npz cannot be written: No such file" in line_of(capsys)
    (folder / "lib.so").unlink()  # not overwritten: it is mapped, and the process would end in SIGBUS
    (folder / "lib.so").write_bytes(b"")
    assert run.main([str(folder)]) == 1
    assert "lib.so is truncated" in line_of(capsys)
    write_manifest(folder)
    assert run.main([str(folder)]) == 1
    assert "lib.so is no ELF library" in line_of(capsys)


@pytest.mark.parametrize(
    "options",
    [[], ["a", "b"], ["a", "--input", "x"], ["a", "--input", "x="], ["a", "--input", "=f.npy"], ["a", "--repeat", "-1"],
     ["a", "--threads", "0"], ["a", "--seed", "x"], ["a", "--high", "0"], ["a", "--what"]],
)  # fmt: skip
def test_a_wrong_command_line_exits_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(options)
    assert caught.value.code == 2
    assert "python -m pipeline.run: error: " in capsys.readouterr().err


def apart(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.run", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_help_explains_itself_without_loading_a_runtime() -> None:
    done = apart("--help")
    assert done.returncode == 0
    for word in ("artifact", "--input NAME=FILE.npy", "--threads", "examples:", "exit status:"):
        assert word in done.stdout
    imports = "import sys, pipeline.run; sys.exit('tvm_ffi' in sys.modules or 'tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imports], cwd=ROOT, check=False).returncode == 0


def test_as_a_command(folder: Path, tmp_path: Path) -> None:
    done = apart(str(folder), "--threads", "1")
    assert (done.returncode, done.stderr) == (0, "")
    done = apart(str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_threads_are_set_before_the_runtime_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "9")
    seen = []
    monkeypatch.setattr(run, "_run", lambda options: seen.append(os.environ["TVM_NUM_THREADS"]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.main([str(folder), "--threads", "2"])
    assert seen == ["2"]
