"""The block of modules that a library carries: read as TVM writes it, and joined."""

from __future__ import annotations

import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax
from tvm.relax.vm_build import _ffi_api as vm_api
from tvm.runtime import _ffi_api as runtime_api

from pipeline.compiler.packed import LIBRARY, Module, Packed, decode, encode, join, with_cubin

OPERATOR = Packed((Module(LIBRARY), Module("opencl", b"kernels")), ((1,), ()))


@st.composite
def blocks(draw: st.DrawFn) -> Packed:
    kinds = st.one_of(st.just(LIBRARY), st.text("abc.", min_size=1))
    modules = draw(st.lists(st.builds(Module, kinds, st.binary(max_size=9)), min_size=1, max_size=5))
    plain = tuple(Module(m.kind) if m.kind == LIBRARY else m for m in modules)
    child = st.integers(0, len(plain) - 1)
    return Packed(plain, tuple(tuple(draw(st.lists(child, max_size=3))) for _ in plain))


@given(blocks())
def test_what_is_encoded_is_decoded(packed: Packed) -> None:
    assert decode(encode(packed)) == packed


@given(blocks(), st.data())
def test_a_block_that_was_cut_or_added_to_is_refused(packed: Packed, data: st.DataObject) -> None:
    whole = encode(packed)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for damaged in (whole[:cut], whole + b"\0"):
        with pytest.raises(ValueError, match="packed modules"):
            decode(damaged)


def test_tvm_writes_the_same_block() -> None:
    builder = relax.ExecBuilder()
    with builder.function("main", 1, ["x"]):
        builder.emit_ret(builder.r(0))
    executable = vm_api.VMLink(builder, tvm.target.Target("llvm"), None, [], {})
    written = runtime_api.ModulePackImportsToTensor(executable).numpy().tobytes()
    packed = decode(written)
    assert [module.kind for module in packed.modules] == ["relax.VMExecutable", LIBRARY]
    assert packed.imports == ((1,), ())
    assert encode(packed) == written


def test_the_device_code_of_operators_is_joined_under_the_machine_code() -> None:
    main = Packed((Module("relax.VMExecutable", b"bytecode"), Module(LIBRARY)), ((1,), ()))
    other = Packed((Module(LIBRARY), Module("opencl", b"others")), ((1,), ()))
    joined = join(main, [*OPERATOR.devices, *other.devices])
    assert joined.modules == (*main.modules, Module("opencl", b"kernels"), Module("opencl", b"others"))
    assert joined.imports == ((1,), (2, 3), (), ())
    assert decode(encode(joined)).devices == (*OPERATOR.devices, *other.devices)
    assert join(main, []) == main


def test_source_in_a_cuda_module_becomes_machine_code() -> None:
    def string(content: bytes) -> bytes:
        return len(content).to_bytes(8, "little") + content

    module = Module("cuda", string(b"cuda") + b"functions" + string(b"source"))
    assert with_cubin(module, b"source", b"code").content == string(b"cubin") + b"functions" + string(b"code")
    with pytest.raises(ValueError, match="not known"):
        with_cubin(module, b"another source", b"code")
