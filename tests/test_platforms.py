"""Which part of a target runs on a host, and where."""

from __future__ import annotations

import pytest

from pipeline import platforms

HERE = f"{platforms.architecture('')}-unknown-linux-gnu"
NATIVE = {"kind": "llvm", "mtriple": HERE}
OPENCL = {"kind": "opencl", "host": {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}}


def test_the_host_part_is_told_from_the_device_part() -> None:
    assert platforms.host_of(NATIVE) == NATIVE
    assert platforms.host_of(OPENCL) == OPENCL["host"]
    assert platforms.triple_of(OPENCL) == "aarch64-linux-gnu"
    assert platforms.triple_of({"kind": "c"}) == ""
    assert (platforms.suffix_of({"kind": "c"}), platforms.suffix_of(OPENCL)) == (".c", ".o")


@pytest.mark.parametrize(
    ("triple", "architecture"),
    [("arm64-apple-macos", "aarch64"), ("amd64-linux-gnu", "x86_64"), ("riscv64-linux-gnu", "riscv64")],
)
def test_architectures_go_by_one_name(triple: str, architecture: str) -> None:
    assert platforms.architecture(triple) == architecture


@pytest.mark.parametrize(
    ("attributes", "runs"),
    [
        (NATIVE, True),
        ({"kind": "c"}, True),
        ({"kind": "llvm", "mtriple": "s390x-linux-gnu"}, False),
        ({"kind": "llvm", "mtriple": HERE.replace("linux-gnu", "windows-msvc")}, False),
        ({"kind": "opencl", "host": NATIVE}, False),
    ],
    ids=str,
)
def test_what_can_be_tried_here(attributes: dict[str, object], runs: bool) -> None:
    assert platforms.runs_here(attributes) is runs


def test_only_gnu_libraries_are_taken_to_have_versions() -> None:
    assert platforms.is_glibc("armv7-linux-gnueabihf")
    assert not platforms.is_glibc("aarch64-linux-musl")
    assert not platforms.is_glibc("aarch64-linux-android")
