"""Weight files: the format both ways against its reference implementation, and every way a file can be broken."""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import weightfile
from pipeline.errors import ArtifactError
from pipeline.types import TensorSpec
from pipeline.weightfile import open_weights, write

DTYPES = sorted(weightfile._CODES)


def blobs(folder: Path, arrays: dict[str, np.ndarray]) -> list[tuple[TensorSpec, Path]]:
    weights = []
    for number, (name, array) in enumerate(arrays.items()):
        path = folder / f"blob{number}"
        path.write_bytes(array.tobytes())
        weights.append((TensorSpec(name, array.shape, array.dtype.name), path))
    return weights


def sample(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = weightfile.dtype_of(dtype)
    return (np.arange(int(np.prod(shape))) % 2 + 1).reshape(shape).astype(kind)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    arrays = {f"t.{dtype}": sample(dtype, (3, 5)) for dtype in DTYPES}
    return arrays | {
        "big": np.arange(64 * 33, dtype=np.float32).reshape(64, 33),
        "scalar": np.asarray(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "ümlaut/…": np.asarray([True, False, True]),
    }


def test_round_trip_of_every_dtype(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    size = write(tmp_path / "w", blobs(tmp_path, arrays))
    assert size == (tmp_path / "w").stat().st_size
    weights = open_weights(tmp_path / "w")
    assert weights.keys() == arrays.keys()
    for name, array in arrays.items():
        assert weights[name].dtype == array.dtype
        assert weights[name].shape == array.shape
        assert weights[name].tobytes() == array.tobytes()


def test_views_are_read_only_and_aligned(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    write(tmp_path / "w", blobs(tmp_path, arrays))
    for array in open_weights(tmp_path / "w").values():
        assert not array.flags.writeable
        assert not array.flags.owndata
        assert array.flags.aligned
    assert open_weights(tmp_path / "w")["big"].ctypes.data % 64 == 0


def test_tensors_of_whole_lines_stand_first_then_by_evenness_and_name(tmp_path: Path) -> None:
    sizes = {"odd": 3, "b64": 64, "pair": 6, "a128": 128, "none": 0, "eight": 8}
    write(tmp_path / "w", blobs(tmp_path, {name: np.zeros(size, np.uint8) for name, size in sizes.items()}))
    data = (tmp_path / "w").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 64 == 0
    assert list(json.loads(data[8 : 8 + length])) == ["a128", "b64", "none", "eight", "pair", "odd"]


def test_bytes_depend_on_the_weights_alone(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    weights = blobs(tmp_path, arrays)
    stream = io.BytesIO()
    assert write(stream, weights[::-1]) == len(stream.getvalue())
    write(tmp_path / "w", weights)
    assert (tmp_path / "w").read_bytes() == stream.getvalue()


def test_a_buffered_stream_is_written_from_where_it_stands(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    weights = blobs(tmp_path, arrays)
    write(tmp_path / "w", weights)
    with open(tmp_path / "larger", "wb") as stream:
        stream.write(b"#" * 64)
        write(stream, weights)
        stream.write(b"end")
    assert (tmp_path / "larger").read_bytes() == b"#" * 64 + (tmp_path / "w").read_bytes() + b"end"
    found = open_weights(tmp_path / "larger", offset=64)
    assert found["big"].tobytes() == arrays["big"].tobytes()
    assert found["big"].ctypes.data % 64 == 0


def test_without_copying_in_the_kernel_the_bytes_are_the_same(
    tmp_path: Path, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = blobs(tmp_path, arrays)
    write(tmp_path / "w", weights)

    def refuse(*_: object) -> int:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    write(tmp_path / "v", weights)
    assert (tmp_path / "v").read_bytes() == (tmp_path / "w").read_bytes()


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()

    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "out" / "w", blobs(tmp_path, arrays))
    assert list((tmp_path / "out").iterdir()) == []


def test_safetensors_reads_what_we_write(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    reference = pytest.importorskip("safetensors")
    write(tmp_path / "w", blobs(tmp_path, arrays))
    # Its parser knows every dtype, its NumPy face some.
    found = dict(reference.deserialize((tmp_path / "w").read_bytes()))
    assert found.keys() == arrays.keys()
    for name, tensor in found.items():
        assert tuple(tensor["shape"]) == arrays[name].shape
        assert tensor["dtype"] == weightfile._CODES[arrays[name].dtype.name]
        assert bytes(tensor["data"]) == arrays[name].tobytes()
    with reference.safe_open(tmp_path / "w", framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("big"), arrays["big"], strict=True)
        assert file.get_tensor("t.bfloat16").tobytes() == arrays["t.bfloat16"].tobytes()


def test_we_read_what_safetensors_writes(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    plain = {n: a for n, a in arrays.items() if a.dtype.kind != "V"}
    reference.save_file(plain, tmp_path / "w", metadata={"format": "np"})
    found = open_weights(tmp_path / "w")
    assert found.keys() == plain.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, plain[name], strict=True)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)),
        max_size=6,
    )
)
def test_round_trip_of_any_weights(specs: dict[str, tuple[str, list[int]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arrays = {name: sample(dtype, tuple(shape)) for name, (dtype, shape) in specs.items()}
        write(Path(folder, "w"), blobs(Path(folder), arrays))
        found = open_weights(Path(folder, "w"))
        assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in found.items()} == {
            n: (a.dtype, a.shape, a.tobytes()) for n, a in arrays.items()
        }
        assert all(a.flags.aligned for a in found.values())


def test_what_cannot_be_written_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    (tmp_path / "four").write_bytes(b"1234")
    good = (TensorSpec("a", (1,), "float32"), tmp_path / "four")
    for weights, words in [
        ([good, good], "the name is taken"),
        ([(TensorSpec("__metadata__", (1,), "float32"), tmp_path / "four")], "the name is taken"),
        ([(TensorSpec("a", (4,), "int4"), tmp_path / "four")], "cannot hold dtype int4"),
        ([(TensorSpec("a", (2,), "float32"), tmp_path / "four")], "has 4 bytes, its shape needs 8"),
        ([(TensorSpec("a", (2,), "float32"), tmp_path / "none")], "No such file"),
    ]:
        with pytest.raises(ArtifactError, match=words):
            write(tmp_path / "w", weights)
        assert not (tmp_path / "w").exists()


def test_a_blob_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = blobs(tmp_path, {"a": np.zeros(4, np.float32)})
    checked = weightfile._checked(weights)
    weights[0][1].write_bytes(b"short")
    monkeypatch.setattr(weightfile, "_checked", lambda _: checked)
    with pytest.raises(ArtifactError, match="changed while"):
        write(tmp_path / "w", weights)
    assert not (tmp_path / "w").exists()


def broken(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object, shape: object, *offsets: object) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated"),
        (b"1234567", "truncated"),
        (broken({}, length=99), "ends inside its header"),
        (broken({}, length=1 << 62), "claims to be"),
        (broken(b"{nonsense"), "header is broken"),
        (broken(b"\xff\xfe"), "header is broken"),
        (broken([]), "header is broken"),
        (broken({"a": 1}), "header is broken"),
        (broken({"a": {"dtype": "F32"}}), "header is broken"),
        (broken(entry("F32", [-1], 0, 4), b"1234"), "header is broken"),
        (broken(entry("F32", [1], 0, "4"), b"1234"), "header is broken"),
        (broken(entry("F32", [2], 0, 4), b"1234"), "its shape and place"),
        (broken(entry("F32", [1], 4, 8), b"12345678"), "its shape and place"),
        (broken(entry("F32", [1], 0, 4), b"12"), "truncated"),
        (broken(entry("F32", [1], 0, 4), b"12345"), "1 bytes follow"),
        (broken(entry("Q7", [1], 0, 4), b"1234"), "unknown dtype Q7"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "broken.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=words) as caught:
        open_weights(tmp_path / "broken.safetensors")
    assert "broken.safetensors" in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "w", blobs(tmp_path, {"a": np.arange(5, dtype=np.float32), "b": np.arange(3, dtype=np.int8)}))
    data = (tmp_path / "w").read_bytes()
    for size in range(len(data)):
        (tmp_path / "v").write_bytes(data[:size])
        with pytest.raises(ArtifactError):
            open_weights(tmp_path / "v")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone.*No such file"):
        open_weights(tmp_path / "gone")


def test_metadata_of_other_writers_is_passed_over(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, **entry("F32", [1], 0, 4)}
    (tmp_path / "w").write_bytes(broken(header, np.float32(2.5).tobytes()))
    assert open_weights(tmp_path / "w")["a"].tolist() == [2.5]
