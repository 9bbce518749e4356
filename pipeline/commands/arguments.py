"""How commands read what is typed after their names."""

from __future__ import annotations

import contextlib
import getopt
import itertools

from doit.cmd_base import Command

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
        with contextlib.suppress(getopt.error):  # doit says it in words of its own
            given, names = getopt.gnu_getopt(in_args, parser.get_short(), parser.get_long())
            options = [[name] if parser.get_option(name)[0].type is bool else [name, value] for name, value in given]
            in_args = [*itertools.chain(*options), "--", *names]
        code: int = super().parse_execute(in_args)
        return code
