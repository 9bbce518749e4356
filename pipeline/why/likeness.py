"""Which operator of the build before a new one most likely was, and how their functions differ."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.hashing import Digest
from pipeline.journal import Noted, Operator
from pipeline.store import Store
from pipeline.why.evidence import Evidence, plan_of

_ENOUGH = 0.45  # of 1: less alike are two operators that have nothing to do with each other
_NAME, _SHAPES, _PLACE = 0.4, 0.3, 0.3  # what counts how much
_CONTEXT = 2  # lines around a difference


@dataclass(frozen=True)
class Likeness:
    """The operator that a new one most likely was, and what of it is another, in words."""

    label: str
    said: tuple[str, ...]


def predecessors(before: Noted, after: Noted, evidence: Evidence) -> dict[str, Likeness]:
    """For the operators that only the later build has, those of the earlier one that they most likely were, each once:
    alike in name and shapes, and between the same neighbours."""
    old, new = (plan_of(evidence, build) for build in (before, after))
    gone = [label for label in old if label not in after.state.operators]
    came = [label for label in new if label not in before.state.operators]
    pairs = sorted(
        (-_alike(before.state.operators[a], after.state.operators[b], _between(old, a, new, b)), a, b)
        for a in gone
        for b in came
    )
    found: dict[str, Likeness] = {}
    taken: set[str] = set()
    for score, a, b in pairs:
        if -score >= _ENOUGH and a not in taken and b not in found:
            found[b] = Likeness(a, tuple(_differences(before.state.operators[a], after.state.operators[b])))
            taken.add(a)
    return found


def _alike(old: Operator, new: Operator, place: float) -> float:
    names = difflib.SequenceMatcher(None, old.name, new.name, autojunk=False).ratio()
    return _NAME * names + _SHAPES * _shapes_alike(old.shapes, new.shapes) + _PLACE * place


def _shapes_alike(old: Sequence[str], new: Sequence[str]) -> float:
    """The share of parameters that are the same, a half for those of as many axes."""
    score = 0.0
    for a, b in zip(old, new, strict=False):
        score += 1.0 if a == b else 0.5 if a.count("x") == b.count("x") else 0.0
    return score / max(len(old), len(new), 1)


def _between(old: Sequence[str], a: str, new: Sequence[str], b: str) -> float:
    """How alike two places in plans are: by the neighbours on both sides, and by how far along they are."""
    i, j = old.index(a), new.index(b)
    sides = [(_at(old, i + step), _at(new, j + step)) for step in (-1, 1)]
    neighbours = sum(left == right for left, right in sides) / len(sides)
    along = 1 - abs(i / max(len(old), 1) - j / max(len(new), 1))
    return (neighbours + along) / 2


def _at(labels: Sequence[str], index: int) -> str:
    return labels[index] if 0 <= index < len(labels) else ""


def _differences(old: Operator, new: Operator) -> list[str]:
    said = [f"operators in it: {old.name} → {new.name}"] if old.name != new.name else []
    for i in range(max(len(old.shapes), len(new.shapes))):
        a, b = _at(old.shapes, i), _at(new.shapes, i)
        if a != b:
            said.append(f"shape of parameter {i}: {a or 'nothing'} → {b or 'nothing'}")
    return said or ["its shapes are the same: what it computes is another"]


def ir_difference(store: Store, old: Operator, new: Operator) -> str:
    """The functions of two operators as TVMScript, as a unified diff; or a sentence that says why there is none."""
    try:
        texts = {name: _script(store, each) for name, each in ((old.label, old.workload), (new.label, new.workload))}
    except LookupError as error:
        return f"how their IR differs cannot be shown: {error.args[0]}"
    (name, text), (other, another) = texts.items()
    lines = difflib.unified_diff(text.splitlines(), another.splitlines(), name, other, lineterm="", n=_CONTEXT)
    return "\n".join(lines)


def _script(store: Store, function: Digest) -> str:
    """Raises LookupError where it cannot be had, in words."""
    data = store.get(function)
    if data is None:
        raise LookupError(f"the store has no blob {function} any more")
    try:
        from pipeline.compiler import ir

        text: str = ir.load(data).script()
    except Exception as error:  # no TVM here, or another one that does not read it
        raise LookupError(f"TVM does not read the function: {type(error).__name__}: {error}") from error
    return text


def alone(like: Mapping[str, Likeness], before: Noted, after: Noted) -> list[str]:
    """The operators of the earlier build that the later one has nothing of."""
    become = {each.label for each in like.values()}
    return [label for label in before.state.operators if label not in after.state.operators and label not in become]
