"""The CPU rules with their parameters opened: a few tens of candidates, found by changing one decision at a time.

Decisions are a mapping from what a rule asked to the option taken, first options left out:

    {}                            what the strategy `rules` makes
    {"0.tile": 3, "0.parts": 1}   another register tile for the first stage, and fewer parts
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm

    from pipeline.compiler.search import Proposal, Tried

# Parameters in the order in which they were seen to pay, over operators of real networks.
_PROMISE = (
    *("windows", "parallel", "parts", "tile", "rounds", "lanes", "order", "vectors", "inside", "unroll"),
    *("square", "packed", "divide"),
)
_MOST = 64  # candidates of one workload
_BETTER = 1.02  # from here on a change is taken for a gain
_HOPELESS = 0.9  # a change that made this of the speed is not tried beside others

Key = tuple[tuple[str, int], ...]  # decisions in the order of their names


class RulesSpace:
    """What the rules for CPUs could do otherwise: see pipeline.compiler.rules.choices."""

    name = "rules"
    version = 1

    def propose(
        self,
        func: tvm.tirx.PrimFunc,
        target: tvm.target.Target,
        tried: Sequence[Tried],
        known: Collection[str],
        count: int,
        seed: int,
    ) -> Sequence[Proposal]:
        """The same for any seed. At most some tens for a workload, all calls together."""
        from pipeline.compiler.records import digest_of
        from pipeline.compiler.search import Proposal

        if target.kind.name != "llvm":
            return ()
        ratios = {_key(each.decisions): each.ratio for each in tried}
        made: dict[Key, _Made] = {}

        def asked(decisions: Key) -> Mapping[str, int]:
            made[decisions] = made.get(decisions) or _Made(func, target, decisions)
            return made[decisions].asked

        room = min(count, _MOST - len(ratios))
        found: list[Proposal] = []
        seen = set(known)
        for decisions in steps(ratios, asked) if room > 0 else ():
            asked(decisions)
            function = made[decisions].function
            if function is None or (digest := digest_of(function)) in seen:
                continue
            seen.add(digest)
            found.append(Proposal(dict(decisions), function))
            if len(found) == room:
                break
        return found

    def make(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target, decisions: Any) -> tvm.tirx.PrimFunc:
        """Raises ValueError for a decision that no rule asks for, and for an option that there is not."""
        made = _Made(func, target, _key(decisions))
        if made.function is None:
            raise ValueError(made.refused)
        return made.function


class _Made:
    """What decisions make of a function, or why they do not; and what was asked on the way."""

    def __init__(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target, decisions: Key) -> None:
        from pipeline.compiler import rules
        from pipeline.compiler.rules.choices import Choices
        from pipeline.errors import last_line

        choices = Choices(dict(decisions))
        self.function: tvm.tirx.PrimFunc | None = None
        self.refused = "no rule takes the function"
        try:
            function = rules.schedule(func, target, choices)
            choices.require_used()
            self.function = function
        except (RuntimeError, ValueError, TypeError) as error:
            self.refused = last_line(error)
        self.asked: Mapping[str, int] = choices.asked if self.function is not None else {}


def steps(ratios: Mapping[Key, float], asked: Any) -> Iterator[Key]:
    """Decisions that were not tried, the most promising first.

    The rules' own; then what is known to gain, all together; then the best so far with one decision changed: by one
    that gained elsewhere, by those that nobody tried, the first of each parameter before the second of any; last, by
    those that cost little elsewhere. `asked` says which parameters decisions have, and how many options each.
    """
    if () not in ratios:
        yield ()
    tried = {(): 1.0, **ratios}  # what is as known and was not tried is the baseline
    worth = _worth(tried)
    best = max(tried, key=lambda key: (tried[key], -len(key)))
    gains = sorted((each for each in worth if worth[each] >= _BETTER), key=lambda each: (-worth[each], each))
    together = dict(best)
    for name, option in gains:
        together.setdefault(name, option)
    base = asked(best) or asked(())
    ahead: list[Key] = [_key(together)]
    ahead += [_changed(best, *change) for change in gains]
    ahead += [_changed(best, *change) for change in _changes(base) if change not in worth]
    ahead += [_changed(best, name, 0) for name, _ in best]
    close = [each for each in worth if _HOPELESS <= worth[each] < _BETTER]
    ahead += [_changed(best, *change) for change in sorted(close, key=lambda each: (-worth[each], each))]
    yield from (key for key in dict.fromkeys(ahead) if key not in ratios and key != ())


def _worth(ratios: Mapping[Key, float]) -> dict[tuple[str, int], float]:
    """For each decision how many times as fast it made the best that it was tried with, where that was tried without it
    as well."""
    found: dict[tuple[str, int], float] = {}
    for key, ratio in ratios.items():
        for each in key:
            without = ratios.get(tuple(other for other in key if other != each), 0.0)
            if without > 0:
                found[each] = max(found.get(each, 0.0), ratio / without)
    return found


def _changes(asked: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Every other option: the first of each parameter, then the second of each; the most promising parameters first."""

    def promise(name: str) -> tuple[int, str]:
        kind = name.rpartition(".")[2]
        return (_PROMISE.index(kind) if kind in _PROMISE else len(_PROMISE), name)

    names = sorted(asked, key=promise)
    for option in range(1, max(asked.values(), default=1)):
        yield from ((name, option) for name in names if option < asked[name])


def _changed(key: Key, name: str, option: int) -> Key:
    return _key({**dict(key), name: option})


def _key(decisions: Any) -> Key:
    """Decisions in order, first options left out. Raises ValueError for what are not decisions."""
    if not isinstance(decisions, Mapping):
        raise ValueError(f"decisions are a mapping, not a {type(decisions).__name__}")
    for name, option in decisions.items():
        if not isinstance(name, str) or type(option) is not int or option < 0:
            raise ValueError(f"{name!r}: {option!r} is not a name and the index of an option")
    return tuple(sorted((name, option) for name, option in decisions.items() if option))
