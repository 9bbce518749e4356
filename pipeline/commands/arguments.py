"""How commands read what is typed after their names."""

from __future__ import annotations

import getopt
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from doit.cmd_base import Command, DodoTaskLoader
from doit.cmdparse import CmdParseError

from pipeline.errors import ConfigError, raised

Act = TypeVar("Act")

_WRONG = 2  # the exit code of a command that was typed wrong

# Of commands that look at what is there.
opt_target = {
    "name": "targets",
    "short": "t",
    "long": "target",
    "type": list,
    "default": [],
    "help": "for this target only; may be given several times",
}
opt_json = {"name": "json", "short": "", "long": "json", "type": bool, "default": False, "help": "print JSON instead"}


class OptionsAnywhere(Command):
    """A command that takes options wherever they stand, also after the names of models. Numbers are counts, from 1 on,
    but for the options that `from_zero` names.

    typed  the options that were given, by their names in doit, as they were typed
    """

    from_zero: frozenset[str] = frozenset()
    typed: Mapping[str, str]

    def parse_execute(self, in_args: list[str]) -> int:
        """build squeezenet -j 2  →  build -j 2 -- squeezenet, which is all that doit understands"""
        parser = self.cmdparser
        if not {"-h", "--help"}.isdisjoint(in_args):
            print(self.help())
            return 0
        try:
            given, names = getopt.gnu_getopt(in_args, parser.get_short(), parser.get_long())
            options = [self._read(name, value) for name, value in given]
            self.typed = {parser.get_option(name)[0].name: name for name, _ in given}
            code: int = super().parse_execute([*itertools.chain(*options), "--", *names])
        except (getopt.error, CmdParseError) as error:
            said = " ".join(str(error).partition("(parsing options")[0].split())
            print(f"ERROR: doit {self.name}: {said}\n  → its options: doit help {self.name}", file=sys.stderr)
            return _WRONG
        except Exception as error:
            if not self._is_reading_dodo():
                raise  # for doit, who knows those that it raises
            print(f"ERROR: dodo.py: {raised(error)}", file=sys.stderr)
            return _WRONG
        return code

    def _is_reading_dodo(self) -> bool:
        """Whether doit is at the user's dodo.py, or was when something went wrong."""
        loader = getattr(self, "loader", None)
        return isinstance(loader, DodoTaskLoader) and loader.namespace is None

    def _read(self, name: str, value: str) -> list[str]:
        """An option as doit takes it. Raises getopt.error where its value is none."""
        option = self.cmdparser.get_option(name)[0]
        if option.type is int:
            least = 0 if option.name in self.from_zero else 1
            if not value.isdecimal() or int(value) < least:
                raise getopt.error(f"option {name} wants a number of {least} or more, and not {value!r}")
        return [name] if option.type is bool else [name, value]


@dataclass(frozen=True)
class Verb(Generic[Act]):
    """One of the things that a command can do.

    options     those of the command's that mean something to it, by their names in doit
    wants       what it must be given first, in words: "a folder"; "" where nothing
    takes_names whether names may follow: of models
    """

    act: Act
    options: frozenset[str] = frozenset()
    wants: str = ""
    takes_names: bool = False


def the_verb(
    command: OptionsAnywhere, verbs: Mapping[str, Verb[Act]], args: Sequence[str]
) -> tuple[Act, str, Sequence[str]]:
    """What is to be done, what it wants, and the names that follow. Raises ConfigError where that makes no sense."""
    name, *rest = args or [""]
    if name not in verbs:
        said = f"`doit {command.name} {name}` is unknown" if name else f"`doit {command.name}` wants to know what to do"
        raise ConfigError(said, hint=f"verbs: {', '.join(verbs)}; see: doit help {command.name}")
    verb, called, see = verbs[name], f"`doit {command.name} {name}`", f"see: doit help {command.name}"
    for option, typed in command.typed.items():
        if option not in verb.options:
            those = [other for other, each in verbs.items() if option in each.options]
            raise ConfigError(f"{called} takes no {typed}", hint=f"that is for: {', '.join(those)}")
    if verb.wants and not rest:
        raise ConfigError(f"{called} wants {verb.wants}", hint=see)
    first, names = (rest[0], rest[1:]) if verb.wants else ("", rest)
    if names and not verb.takes_names:
        raise ConfigError(f"{called} has no use for {' '.join(names)}", hint=see)
    return verb.act, first, names
