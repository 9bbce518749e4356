"""What the rules want to know of a processor: read from the target alone, never from the machine that builds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import tvm
from tvm.target import codegen

# Buffers on the stack must be smaller than this for TVM to leave them to LLVM, which then keeps them in registers
# (kMaxStackAlloca in TVM's runtime/device_api.h).
_STACK_BYTES = 1024


@dataclass(frozen=True)
class Machine:
    """vector_bytes and registers of the vector unit; cores is 0 where the target does not tell."""

    vector_bytes: int
    registers: int
    cores: int

    def lanes(self, dtype: str) -> int:
        """How many elements fit in one register."""
        return max(1, self.vector_bytes // itemsize(dtype))

    def accumulators(self, dtype: str) -> int:
        """How many registers a tile may hold: the rest is for operands, and the whole must fit on the stack."""
        free = self.registers - (4 if self.registers <= 16 else 8)
        return min(free, (_STACK_BYTES - 1) // (self.lanes(dtype) * itemsize(dtype)))

    def chunks(self) -> int:
        """Into how many parts parallel work is cut: a few for each core, or enough for most machines."""
        return 4 * self.cores if self.cores else 16


def machine(target: tvm.target.Target) -> Machine:
    """AVX-512 → 64 bytes and 32 registers, AVX → 32 and 16, plain x86 → 16 and 16, any other → 16 and 32."""
    cores = int(target.attrs.get("num-cores", 0))
    if not _is_x86(target):
        return Machine(16, 32, cores)
    if codegen.llvm_cpu_has_features("avx512f", target):
        return Machine(64, 32, cores)
    return Machine(32 if codegen.llvm_cpu_has_features("avx", target) else 16, 16, cores)


def _is_x86(target: tvm.target.Target) -> bool:
    if target.kind.name != "llvm":
        return False
    triple = str(target.attrs.get("mtriple", "")) or codegen.llvm_get_system_triple()
    return triple.startswith(("x86_64", "i386", "i486", "i586", "i686"))


def itemsize(dtype: str) -> int:
    """Bytes of an element: bool and the like take a whole one."""
    return max(1, math.ceil(tvm.DataType(dtype).bits / 8))
