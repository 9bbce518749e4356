"""What ELF files name: functions that they have, that they want, and libraries that they need. Read, never run."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile


@contextmanager
def _opened(path: Path) -> Iterator[ELFFile]:
    with open(path, "rb") as stream:
        try:
            yield ELFFile(stream)
        except ELFError as error:
            raise ValueError(f"{path.name} is not an ELF file: {error}") from error


def _section(elf: ELFFile, name: str) -> Any:
    """A section as what its name says it is, or None: the library types all sections alike."""
    return elf.get_section_by_name(name)


def open_ends(library: Path) -> set[str]:
    """Functions that a shared library wants and for which the linker found none, where system libraries have versions.

    It writes down the version of each that it found in the system's libraries; what it found in a library without
    versions looks the same as what it did not find, and is among the open ends.
    """
    with _opened(library) as elf:
        table, versions = _section(elf, ".dynsym"), _section(elf, ".gnu.version")
        return {
            symbol.name
            for index, symbol in enumerate(table.iter_symbols() if table else ())
            if _is_wanted(symbol) and not (versions and _has_version(versions.get_symbol(index)))
        }


def provided(library: Path, names: Set[str]) -> set[str]:
    """Those of `names` that a shared library has."""
    with _opened(library) as elf:
        hashed = _section(elf, ".gnu.hash")
        if hashed is not None:
            return {name for name in names if hashed.get_symbol(name) is not None}
        table = _section(elf, ".dynsym")
        found = (
            {symbol.name for symbol in table.iter_symbols() if symbol["st_shndx"] != "SHN_UNDEF"} if table else set()
        )
        return found & names


def undefined(file: Path) -> set[str]:
    """Functions that an object file wants."""
    with _opened(file) as elf:
        table = _section(elf, ".symtab")
        return {symbol.name for symbol in table.iter_symbols() if _is_wanted(symbol)} if table else set()


def needed(library: Path) -> list[str]:
    """The libraries that a shared library loads, by file name."""
    with _opened(library) as elf:
        dynamic = _section(elf, ".dynamic")
        return [str(tag.needed) for tag in dynamic.iter_tags("DT_NEEDED")] if dynamic else []


def _has_version(symbol: Any) -> bool:
    return symbol.entry["ndx"] not in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")


def _is_wanted(symbol: Any) -> bool:
    return bool(symbol.name) and symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] == "STB_GLOBAL"
