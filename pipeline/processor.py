"""Whether this processor can run what was compiled for a target: read from /proc/cpuinfo, without LLVM.

A library for a newer processor loads and then dies of an illegal instruction, so what is known to be missing is said
before. What is not known here (another system, an unlisted processor) is let through.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

# https://gitlab.com/x86-psABIs/x86-64-ABI, "micro-architecture levels", in the words of /proc/cpuinfo. What vector
# code of LLVM uses first, not every flag of a level.
_V2 = ("sse4_1", "sse4_2", "ssse3", "popcnt")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_PROCESSORS = (
    (r"x86-64-v2|nehalem|westmere|sandybridge|ivybridge", _V2),
    (r"x86-64-v3|haswell|broadwell|skylake|alderlake|raptorlake|meteorlake|arrowlake.*|lunarlake|znver[123]", _V3),
    (r"x86-64-v4|skylake-avx512|cascadelake|cooperlake|icelake-\w+|tigerlake|rocketlake", _V4),
    (r"sapphirerapids|emeraldrapids|graniterapids.*|znver[45]", (*_V4, "avx512_bf16", "avx512_vnni")),
)


# What libraries and pools of threads read of the environment, and what changes how fast and how exactly they compute.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "TVM_NUM_THREADS", "OPENBLAS_CORETYPE")


def device() -> str:
    """What times on this machine hold for: the processor, how many of it a process may use, and the environment."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    said = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if os.environ.get(name)]
    found = re.search(r"^model name\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    features = xxhash.xxh3_64_hexdigest(" ".join(sorted(_features())).encode())
    name = found[1].strip() if found else platform.machine()
    return ", ".join([f"{name} ({features[:8]})", f"{usable} processors", *said])


def cores() -> int:
    """The physical cores that this process may use: two logical ones of a core share what vector code needs."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {_siblings(number) for number in usable}
    return max(1, len(siblings))


def _siblings(number: int) -> str:
    """Which logical processors share a core with this one, as the system lists them."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(number)


def missing_features(target: Mapping[str, Any]) -> list[str]:
    """What the code for a target uses and this processor lacks, as far as the target's mcpu and mattr tell."""
    have = _features()
    if not have:
        return []
    needed = list(_implied(str(target.get("mcpu", ""))))
    attributes = target.get("mattr", ())
    for attribute in attributes.split(",") if isinstance(attributes, str) else attributes:
        name = str(attribute).strip()
        if name.startswith("-"):
            needed = [feature for feature in needed if _plain(feature) != _plain(name)]
        elif _plain(name).startswith(("avx", "amx")):
            needed.append(name.lstrip("+"))
    return [feature for feature in needed if _plain(feature) not in have]


def _implied(mcpu: str) -> tuple[str, ...]:
    for pattern, features in _PROCESSORS:
        if re.fullmatch(pattern, mcpu):
            return features
    return ()


def _plain(name: str) -> str:
    """LLVM's and Linux's spellings of a feature agree without signs: +avx512vnni, avx512_vnni."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def _features() -> frozenset[str]:
    """The plain names of this processor's features; none where they cannot be told."""
    found = re.search(r"^flags\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    return frozenset(_plain(flag) for flag in found[1].split()) if found else frozenset()


@cache
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
