"""How commands read what is typed after their names."""

from __future__ import annotations

import getopt
import itertools
import sys

from doit.cmd_base import Command
from doit.cmdparse import CmdParseError

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
    """A command that takes options wherever they stand, also after the names of models."""

    def parse_execute(self, in_args: list[str]) -> int:
        """build squeezenet -j 2  →  build -j 2 -- squeezenet, which is all that doit understands"""
        parser = self.cmdparser
        if not {"-h", "--help"}.isdisjoint(in_args):
            print(self.help())
            return 0
        try:
            given, names = getopt.gnu_getopt(in_args, parser.get_short(), parser.get_long())
            options = [self._read(name, value) for name, value in given]
            code: int = super().parse_execute([*itertools.chain(*options), "--", *names])
        except (getopt.error, CmdParseError) as error:
            said = " ".join(str(error).partition("(parsing options")[0].split())
            print(f"ERROR: doit {self.name}: {said}\n  → its options: doit help {self.name}", file=sys.stderr)
            return _WRONG
        return code

    def _read(self, name: str, value: str) -> list[str]:
        """An option as doit takes it. Raises getopt.error where its value is none."""
        kind = self.cmdparser.get_option(name)[0].type
        if kind is int and not value.removeprefix("-").isdecimal():
            raise getopt.error(f"option {name} wants a number, and not {value!r}")
        return [name] if kind is bool else [name, value]
