"""Targets as files write them → complete, the same on every machine, and only those that TVM builds for here."""

from __future__ import annotations

import pytest

from pipeline.compiler import targets
from pipeline.errors import ConfigError
from pipeline.platforms import host_of, triple_of


@pytest.mark.parametrize(
    "written",
    [
        "native",
        "nvidia/nvidia-a100",
        {"kind": "c"},
        {"kind": "cuda", "arch": "sm_90"},
        {"kind": "opencl"},
        {"kind": "webgpu"},
        {"kind": "metal"},
        {"kind": "llvm", "mtriple": "riscv64-linux-gnu"},
        {"kind": "opencl", "host": {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}},
    ],
    ids=str,
)
def test_what_is_complete_stays_as_it_is(written: object) -> None:
    attributes = targets.resolve(written)  # type: ignore[arg-type]
    assert targets.resolve(attributes) == attributes
    assert targets.load(attributes).kind.name == attributes["kind"]


def test_a_device_gets_the_host_that_is_usual_for_it() -> None:
    here = targets.resolve({"kind": "llvm"})["mtriple"]
    usual = {kind: triple_of(targets.resolve({"kind": kind})) for kind in ("opencl", "webgpu", "metal")}
    assert usual == {"opencl": here, "webgpu": "wasm32-unknown-unknown-wasm", "metal": "arm64-apple-macos"}


def test_a_host_that_is_named_is_kept() -> None:
    host = {"kind": "llvm", "mtriple": "riscv64-linux-gnu"}
    resolved = host_of(targets.resolve({"kind": "opencl", "host": host}))
    assert resolved["mtriple"] == "riscv64-linux-gnu"
    assert resolved["mabi"] == "lp64d"


def test_riscv_gets_the_abi_of_linux_distributions_unless_it_says_what_it_has() -> None:
    plain = targets.resolve({"kind": "llvm", "mtriple": "riscv64-linux-gnu"})
    assert (plain["mabi"], plain["mattr"]) == ("lp64d", ["+m", "+a", "+f", "+d", "+c"])
    bare = targets.resolve({"kind": "llvm", "mtriple": "riscv64-unknown-elf", "mattr": ["+m"]})
    assert "mabi" not in bare


@pytest.mark.parametrize("kind", ["vulkan", "rocm", "nvptx", "hexagon"])
def test_kinds_without_a_code_generator_are_refused_at_once(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"generates no code|refuses the target") as caught:
        targets.resolve({"kind": kind})
    assert "llvm, c, cuda, metal, opencl, webgpu" in caught.value.hint


@pytest.mark.parametrize("written", ["cuda", {"kind": "cuda"}, '{"kind": "cuda"}'], ids=str)
def test_cuda_must_say_its_architecture(written: object) -> None:
    with pytest.raises(ConfigError, match="names no architecture"):
        targets.resolve(written)  # type: ignore[arg-type]


def test_kernels_are_launched_by_machine_code() -> None:
    with pytest.raises(ConfigError, match="host of a target of kind 'opencl' is of kind 'c'"):
        targets.resolve({"kind": "opencl", "host": {"kind": "c"}})
    with pytest.raises(ConfigError, match="no processor 'pentium9'"):
        targets.resolve({"kind": "opencl", "host": {"kind": "llvm", "mcpu": "pentium9"}})
