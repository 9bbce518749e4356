"""`doit cache`: the store and the remote behind it: what they hold, what they saved, what goes in and out."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from doit.cmd_base import DoitCmdBase
from doit.exceptions import InvalidDodoFile

from pipeline.commands.arguments import OptionsAnywhere, Verb, opt_target, the_verb
from pipeline.commands.build import counted
from pipeline.commands.looking import selection_of
from pipeline.errors import ConfigError, TvmakeError
from pipeline.workspace import Selection, Workspace, selecting, the_workspace

if TYPE_CHECKING:
    from pipeline.sharing import Moved
    from pipeline.store.carry import Carried
    from pipeline.store.upkeep import Collected, Sizes
    from pipeline.store.usage import UsageCounts

OK, INCOMPLETE, ERROR, INTERRUPTED = 0, 1, 2, 130

opt_json = {"name": "json", "short": "", "long": "json", "type": bool, "default": False, "help": "print JSON"}
opt_dry_run = {
    "name": "dry_run",
    "short": "n",
    "long": "dry-run",
    "type": bool,
    "default": False,
    "help": "gc: only show what would be removed",
}
opt_size = {
    "name": "size",
    "short": "",
    "long": "size",
    "type": str,
    "default": "",
    "help": "gc: keep at most so much, such as 20GB [default: [store] size of the user's tvmake.toml]",
}
opt_age = {
    "name": "age",
    "short": "",
    "long": "age",
    "type": str,
    "default": "",
    "help": "gc: remove what was not used for so long, such as 60d",
}


@dataclass(frozen=True)
class Asked:
    """What was typed: `what` the verb wants, and the names of models."""

    what: str
    names: Sequence[str]
    targets: Sequence[str]
    json: bool
    dry_run: bool
    size: str
    age: str

    def pairs(self, workspace: Workspace) -> list[tuple[str, Any]]:
        """The artifacts that are meant: of the models that are named, or of all."""
        return workspace.pairs(selection_of(self.names, self.targets))


Act = Callable[[Workspace, Asked], int]


class Cache(OptionsAnywhere, DoitCmdBase):
    """One command with a verb for each thing that can be done."""

    doc_purpose = "look after the store, and share it with other machines"
    doc_usage = "VERB [NAME...]"
    doc_description = """\
The store holds what was ever compiled or tuned on this machine; a
remote, named in tvmake.toml or TVMAKE_REMOTE, is shared by many.

  doit cache stats                what is in the store, what it saved
  doit cache verify               reads all of it, sets aside what is corrupt
  doit cache gc [--size 20GB] [--age 60d] [-n]
                                  removes what was not used for longest
  doit cache pin NAME [MODEL...]  keeps built artifacts whatever gc is told
  doit cache unpin NAME

  doit cache lookup [MODEL...]    is it on the remote, and what is not
  doit cache push [MODEL...]      sends what is built here
  doit cache pull [MODEL...]      brings what others have built
  doit cache export FILE [MODEL...]    the same in a file, to carry
  doit cache import FILE
  doit cache key FILE             makes a key to sign with

Exit code: 0 done, 1 something is missing or was corrupt, 2 the
workspace, the settings or the machine is at fault, 130 interrupted.
"""
    cmd_options = (opt_target, opt_json, opt_dry_run, opt_size, opt_age)
    name = "cache"
    _act: Act

    def execute(self, params: Any, args: list[str]) -> int:
        try:
            self._act, what, names = the_verb(self, VERBS, args)
            self._asked = Asked(
                what, names, params["targets"], params["json"], params["dry_run"], params["size"], params["age"]
            )
            with selecting(Selection()):
                code: int = super().execute(params, [])
                return code
        except (TvmakeError, InvalidDodoFile) as error:
            _say(f"ERROR: {error}")
            return ERROR
        except KeyboardInterrupt:
            _say("interrupted; what was moved is where it went")
            return INTERRUPTED

    def _execute(self) -> int:
        workspace = the_workspace(self.loader.namespace)
        try:
            return self._act(workspace, self._asked)
        finally:
            workspace.stop()


# the store


def _stats(workspace: Workspace, asked: Asked) -> int:
    from pipeline.sharing import TUNE, tuning_seconds
    from pipeline.store import upkeep
    from pipeline.store.usage import StageUsage, Usage

    with _progress("looking at the store") as progress:
        sizes = upkeep.sizes(workspace.store, progress)
    usage = Usage(workspace.store.root).read()
    tuned = usage.stages.setdefault(TUNE, StageUsage())
    tuned.seconds_saved = max(0.0, tuning_seconds(workspace.store) - tuned.seconds_spent)
    if asked.json:
        print(msgspec.json.format(msgspec.json.encode({"store": dataclasses.asdict(sizes), "usage": usage})).decode())
    else:
        _show_stats(workspace, sizes, usage)
    return OK


def _show_stats(workspace: Workspace, sizes: Sizes, usage: UsageCounts) -> None:
    from pipeline.report import duration

    rows = []
    for stage in sorted({*sizes.by_stage, *usage.stages}):
        held, used = sizes.by_stage.get(stage), usage.stages.get(stage)
        cells = [str(held.entries), _bytes(held.bytes)] if held is not None else ["", ""]
        if used is not None:
            counts = (used.hits, used.remote_hits, used.misses, used.errors)
            cells += [*(str(count or "") for count in counts), duration(used.seconds_saved)]
        rows.append((stage, *cells))
    columns = ("stage", "entries", "size", "hits", "remote hits", "run", "failed", "saved")
    _table(columns, rows)
    saved = sum(each.seconds_saved for each in usage.stages.values())
    print(
        f"{workspace.store.root}: {counted(sizes.entries, 'entry')}, {counted(sizes.blobs, 'blob')}, "
        f"{_bytes(sizes.bytes)}; {counted(sizes.members, 'tuning record')} of {counted(sizes.sets, 'operator')}"
    )
    if sizes.set_aside:
        print(f"{counted(sizes.set_aside, 'corrupt file')} set aside, {_bytes(sizes.set_aside_bytes)}")
    for name, remote in usage.remotes.items():
        print(
            f"{name}: {counted(remote.requests, 'request')}, {counted(remote.errors, 'error')}, "
            f"{_bytes(remote.bytes_received)} received, {_bytes(remote.bytes_sent)} sent"
        )
    print(f"{counted(usage.runs, 'run')} saved {duration(saved)} of work")


def _verify(workspace: Workspace, asked: Asked) -> int:
    from pipeline.store import upkeep

    with _progress("reading the store", _bytes) as progress:
        found = upkeep.verify(workspace.store, progress)
    for key in found.corrupt_entries:
        print(f"corrupt entry {key}")
    for name in found.corrupt_blobs:
        print(f"corrupt blob {name}")
    for each in found.incomplete:
        print(f"{each.stage} {each.key[:12]}: {counted(len(each.missing), 'blob')} missing")
    for path in found.unreadable_pins:
        print(f"unreadable pin {path}")
    wrong = len(found.corrupt_entries) + len(found.corrupt_blobs) + found.torn
    read = f"{counted(found.entries, 'entry')}, {counted(found.blobs, 'blob')}, {counted(found.members, 'record')}"
    _say(f"{read}, {_bytes(found.bytes)} read: {f'{wrong} set aside' if wrong else 'all as they should be'}")
    return OK if found.good else INCOMPLETE


def _gc(workspace: Workspace, asked: Asked) -> int:
    from pipeline.amounts import size_of, span_of
    from pipeline.store import Pins, upkeep

    settings = workspace.settings
    bounds = upkeep.Bounds(
        size_of(asked.size) if asked.size else settings.max_bytes,
        span_of(asked.age) if asked.age else settings.max_age,
    )
    if bounds == upkeep.Bounds():
        raise ConfigError(
            "nothing says how much to keep", hint='type --size 20GB or --age 60d, or write [store] size = "20 GB"'
        )
    store, pins = workspace.store, Pins(workspace.store.root)
    with _progress("looking at the store") as progress:
        planned = upkeep.collect(store, bounds, pins, dry_run=True, progress=progress)
    _show_collected(planned)
    if asked.dry_run:
        _say(_collected("would remove", planned))
    elif not planned.unreadable_pins:
        if planned.entries_removed or planned.blobs_removed:
            with _progress("removing") as progress:
                planned = upkeep.collect(store, bounds, pins, progress=progress)
        _say(_collected("removed", planned))
    return OK if planned.within else INCOMPLETE


def _show_collected(planned: Collected) -> None:
    rows = [
        (stage or "(not named)", str(share.entries_removed), _bytes(share.bytes_freed), str(share.entries_kept),
         _bytes(share.bytes_kept))
        for stage, share in planned.by_stage.items()
    ]  # fmt: skip
    _table(("stage", "entries that go", "bytes", "that stay", "bytes"), rows)
    for path in planned.unreadable_pins:
        _say(f"{path} cannot be read: as it may pin anything, nothing is removed\n  → mend it or delete it")
    if not planned.within and not planned.unreadable_pins:
        _say("what is pinned or in use is more than that: it stays")


def _collected(verb: str, planned: Collected) -> str:
    removed = f"{counted(planned.entries_removed, 'entry')} and {counted(planned.blobs_removed, 'blob')}"
    kept = f"{counted(planned.entries_kept, 'entry')} and {counted(planned.blobs_kept, 'blob')}"
    return (
        f"{verb} {removed}, {_bytes(planned.bytes_freed)}; {kept} stay, {_bytes(planned.bytes_kept)} "
        f"({planned.entries_pinned} pinned, {planned.entries_in_use} in use)"
    )


def _pin(workspace: Workspace, asked: Asked) -> int:
    from pipeline.store import Pins

    name = asked.what
    pairs = asked.pairs(workspace)
    keys = {key for target, model in pairs for key in workspace.build.found(target, model)}
    about = ", ".join(f"{target}:{model.name}" for target, model in pairs)
    Pins(workspace.store.root).add(name, sorted(keys), about)
    _say(f"pinned {counted(len(keys), 'entry')} of {about} as {name}")
    return OK


def _unpin(workspace: Workspace, asked: Asked) -> int:
    from pipeline.store import Pins

    pins, name = Pins(workspace.store.root), asked.what
    if not pins.remove(name):
        raise ConfigError(f"there is no pin {name!r}", hint=f"pins: {', '.join(pins.names()) or 'none'}")
    return OK


# the remote


def _lookup(workspace: Workspace, asked: Asked) -> int:
    from pipeline import sharing

    return _say_moved(sharing.lookup(workspace, asked.pairs(workspace)), "on the remote", asked.json)


def _push(workspace: Workspace, asked: Asked) -> int:
    from pipeline import sharing

    pairs = asked.pairs(workspace)
    remote = sharing.require_remote(workspace)
    with _left(f"sending to {remote.remote.name}") as left:
        moved = sharing.push(workspace, pairs, left)
    code = _say_moved(moved, "sent", asked.json)
    _say(f"{_bytes(remote.counts.sent)} sent; what was there already was not sent again")
    return code


def _pull(workspace: Workspace, asked: Asked) -> int:
    from pipeline import sharing

    remote = sharing.require_remote(workspace)
    code = _say_moved(sharing.pull(workspace, asked.pairs(workspace)), "fetched", asked.json)
    _say(f"{_bytes(remote.counts.received)} received; what was here already was not fetched")
    return code


def _say_moved(moved: Sequence[Moved], how: str, json: bool) -> int:
    if json:
        print(msgspec.json.format(msgspec.json.encode([dataclasses.asdict(each) for each in moved])).decode())
    else:
        for each in moved:
            what = f"{each.target}:{each.model}"
            if each.why:
                print(f"{what}: {counted(each.entries, 'entry')} {how}; {each.why}")
            else:
                print(f"{what}: {each.entries} of {counted(each.of, 'entry')} {how}")
            for name in each.missing:
                print(f"  missing: {name}")
    return OK if all(each.whole for each in moved) else INCOMPLETE


# a file


def _export(workspace: Workspace, asked: Asked) -> int:
    from pipeline import sharing

    path = Path(asked.what)
    with _progress(f"writing {path.name}", _bytes) as progress:
        carried = sharing.export(workspace, asked.pairs(workspace), path, progress)
    _say(f"{_carried(carried)} written to {path}")
    return _say_wrong(carried)


def _import(workspace: Workspace, asked: Asked) -> int:
    from pipeline import sharing

    path = Path(asked.what)
    with _progress(f"reading {path.name}", _bytes) as progress:
        carried = sharing.take_in(workspace, path, progress)
    _say(f"{_carried(carried)} taken in, {carried.known} known already")
    return _say_wrong(carried)


def _carried(carried: Carried) -> str:
    counts = f"{counted(carried.entries, 'entry')}, {counted(carried.blobs, 'blob')}"
    return f"{counts}, {counted(carried.members, 'tuning record')}, {_bytes(carried.bytes)}"


def _say_wrong(carried: Carried) -> int:
    for name, why in carried.wrongs:
        _say(f"left out: {name}: {why}")
    if carried.wrong > len(carried.wrongs):
        _say(f"… and {carried.wrong - len(carried.wrongs)} more")
    if carried.missing:
        _say(f"{counted(len(carried.missing), 'entry')} left out, as they are not whole")
    if not carried.complete:
        _say("the file is truncated: what came before its end was taken in")
    return INCOMPLETE if carried.wrong or carried.missing or not carried.complete else OK


def _key(workspace: Workspace, asked: Asked) -> int:
    from pipeline.remotes.trust import new_key

    path = Path(asked.what).absolute()
    public = new_key(path)
    _say(f'wrote a private key to {path}; in the tvmake.toml of this user:\n  [trust]\n  sign_with = "{path}"')
    _say(f'and on machines that are to trust it:\n  [trust]\n  keys = ["{public}"]')
    print(public)
    return OK


_JSON, _TARGETS = frozenset({"json"}), frozenset({"targets"})
VERBS: dict[str, Verb[Act]] = {
    "stats": Verb(_stats, _JSON),
    "verify": Verb(_verify),
    "gc": Verb(_gc, frozenset({"dry_run", "size", "age"})),
    "pin": Verb(_pin, _TARGETS, "a name for the pin", takes_names=True),
    "unpin": Verb(_unpin, wants="the name of a pin"),
    "lookup": Verb(_lookup, _TARGETS | _JSON, takes_names=True),
    "push": Verb(_push, _TARGETS | _JSON, takes_names=True),
    "pull": Verb(_pull, _TARGETS | _JSON, takes_names=True),
    "export": Verb(_export, _TARGETS, "a file to write", takes_names=True),
    "import": Verb(_import, wants="a file to read"),
    "key": Verb(_key, wants="a file for the key"),
}


# what one sees


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _bytes(count: float) -> str:
    from rich.filesize import decimal

    return decimal(int(count))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if rows:
        Console(width=None if sys.stdout.isatty() else 160).print(table)


@contextlib.contextmanager
def _progress(what: str, shown: Callable[[float], str] = str) -> Iterator[Callable[[int, int], None]]:
    """Something to tell steps done, of how many: a line now and then, from the third second on."""
    from pipeline.progress import Progress

    with Progress().telling(what) as tell:
        yield lambda done, total: tell(f"{shown(done)} of {shown(total)}")


@contextlib.contextmanager
def _left(what: str) -> Iterator[Callable[[int], None]]:
    from pipeline.progress import Progress

    with Progress().telling(what) as tell:
        yield lambda count: tell(f"{count} left")
