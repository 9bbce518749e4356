"""Sizes and spans of time as people write them: "20 GB", "512 MiB", "60 days", "1.5h"."""

from __future__ import annotations

import math
import re

from pipeline.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*([\d.]+)\s*([KMGT]I?)?B?\s*", re.IGNORECASE)
_SPANS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_SPAN = re.compile(r"\s*([\d.]+)\s*(s|m|h|d|w)[a-z]*\s*", re.IGNORECASE)


def size_of(text: str) -> int:
    """20 GB → 20,000,000,000. Raises ConfigError."""
    if (match := _SIZE.fullmatch(text)) is not None:
        try:
            return int(float(match[1]) * _UNITS[(match[2] or "").upper()])
        except (ValueError, OverflowError):
            pass
    raise ConfigError(f"{text[:40]!r} is no size", hint='write a size such as "20 GB" or "512 MiB"')


def span_of(text: str) -> float:
    """60 days → 5,184,000 (seconds). Raises ConfigError."""
    if (match := _SPAN.fullmatch(text)) is not None:
        try:
            seconds = float(match[1]) * _SPANS[match[2].lower()]
        except ValueError:
            seconds = math.inf
        if seconds < math.inf:
            return seconds
    raise ConfigError(f"{text[:40]!r} is no span of time", hint='write a span such as "60 days" or "12 h"')
