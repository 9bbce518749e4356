"""Sizes and spans of time as people write them."""

from __future__ import annotations

import pytest

from pipeline.amounts import size_of, span_of
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("30 min", 1800), ("8h", 28800), ("1.5h", 5400), ("2 days", 172800), ("2w", 1209600)],
)
def test_a_span_of_time(text: str, seconds: float) -> None:
    assert span_of(text) == seconds


@pytest.mark.parametrize(("text", "size"), [("20 GB", 20 * 10**9), ("512 MiB", 512 << 20), ("7", 7), ("1.5k", 1500)])
def test_a_size(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "soon", "-3h", "1.2.3 days", "9" * 400 + "d", "3 lightyears", "h"])
def test_what_is_neither(text: str) -> None:
    with pytest.raises(ConfigError, match="is no span of time"):
        span_of(text)
    with pytest.raises(ConfigError, match="is no size"):
        size_of(text)
