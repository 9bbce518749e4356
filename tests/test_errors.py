from __future__ import annotations

import errno
import pickle

import pytest

from pipeline import errors
from pipeline.errors import (
    CheckError,
    DeviceError,
    StageError,
    StoreError,
    TvmakeError,
    WorkerDiedError,
    explain_os_error,
    last_line,
)

STAGE_ERRORS = (StageError, WorkerDiedError, CheckError)


def tree(kind: type[TvmakeError]) -> list[type[TvmakeError]]:
    below = [error for error in kind.__subclasses__() if error.__module__ == errors.__name__]
    return [kind, *(error for child in below for error in tree(child))]


@pytest.mark.parametrize("kind", tree(TvmakeError))
def test_every_error_is_drawn_in_the_tree(kind: type[TvmakeError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")
    assert kind.__doc__


@pytest.mark.parametrize("kind", [kind for kind in tree(TvmakeError) if kind not in STAGE_ERRORS])
def test_a_message_and_a_hint_survive_pickling(kind: type[TvmakeError]) -> None:
    error = pickle.loads(pickle.dumps(kind("it is wrong", hint="do this")))
    assert type(error) is kind
    assert str(error) == "it is wrong\n  → do this"
    assert (error.message, error.hint, error.args) == ("it is wrong", "do this", ("it is wrong",))
    assert str(kind("it is wrong")) == "it is wrong"


@pytest.mark.parametrize("kind", STAGE_ERRORS)
def test_a_stage_error_names_stage_subject_and_key_and_survives_pickling(kind: type[StageError]) -> None:
    error = pickle.loads(
        pickle.dumps(kind("no", stage="codegen", subject="cpu:add-12", key="0123456789abcdef", hint="so"))
    )
    assert type(error) is kind
    assert str(error) == "codegen of cpu:add-12 (key 0123456789ab) failed: no\n  → so"
    assert (error.stage, error.subject, error.key) == ("codegen", "cpu:add-12", "0123456789abcdef")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_refusal_of_the_system_is_explained_with_a_hint(number: int) -> None:
    error = explain_os_error(OSError(number, "what it says", "the-file"), "writing x")
    assert isinstance(error, StoreError)
    assert error.message == "writing x: what it says (the-file)"
    assert error.hint


def test_an_unknown_refusal_is_still_a_sentence() -> None:
    assert str(explain_os_error(OSError("odd"), "writing x")) == "writing x: odd"


def test_the_last_line_is_of_what_is_wrong_and_not_of_what_to_do() -> None:
    assert last_line(DeviceError("no board came free", hint="start one")) == "no board came free"
    assert last_line(RuntimeError("a trace\n  of frames\nValueError: no loops")) == "ValueError: no loops"
    assert last_line(KeyError()) == "KeyError"
