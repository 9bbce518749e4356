"""Every error that a user can see, in one tree.

    TvmakeError
    ├── ConfigError          dodo.py or a targets/*.toml says something that cannot be meant
    ├── SetupError           this machine lacks something: a package, a compiler, the right pair of TVM and FFI
    │   └── NoLinkerError    nothing here links for a target
    ├── ModelError           a model cannot be read or imported: broken file, unsupported operator, open shape
    ├── StageError           a stage failed for one operator or one model
    │   ├── WorkerDiedError  the process that ran it died
    │   └── CheckError       the artifact and the reference disagree
    ├── NotBuiltError        a stage would have to run, where nothing may
    ├── ExecutorError        the machines that were to run stages are not there, or cannot
    │   └── WorkerLostError  the one worker that was to run it is gone
    ├── DeviceError          a device that candidates are measured on, or its tracker, does not do its part
    ├── StoreError           the store cannot be used as it is: format, permissions, space
    │   └── RemoteError      a remote store does not do its part; `trouble` tells why
    └── ArtifactError        a built artifact cannot be loaded or called

An error is a sentence about what is wrong and, where there is one, a `hint`: what to type or change next.
"""

from __future__ import annotations

import enum
import errno
import os

# Where Python lies that no user wrote: ours, the standard library, and what is installed with it.
_NOT_THE_USERS = (os.path.dirname(__file__), os.path.dirname(os.__file__))


class TvmakeError(Exception):
    """Base of all errors that are reported without a traceback."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel from worker processes; keyword-only arguments need help to survive pickling.
        return _restore, (type(self), self.__dict__)


def _restore(cls: type[TvmakeError], state: dict[str, object]) -> TvmakeError:
    error = cls.__new__(cls)
    Exception.__init__(error, state.get("message", ""))
    error.__dict__.update(state)
    return error


class ConfigError(TvmakeError):
    """The workspace says something that cannot be meant."""


class SetupError(TvmakeError):
    """This machine lacks something that the work needs."""


class NoLinkerError(SetupError):
    """Nothing here links for a target: there are objects, and no library of them."""


class ModelError(TvmakeError):
    """A model cannot be read or imported."""


class StageError(TvmakeError):
    """A stage failed. Names the stage, what it worked on, the target and the short key."""

    def __init__(self, message: str, *, stage: str, subject: str, key: str = "", hint: str = "") -> None:
        where = f"{stage} of {subject}" + (f" (key {key[:12]})" if key else "")
        super().__init__(f"{where} failed: {message}", hint=hint)
        self.stage = stage
        self.subject = subject
        self.key = key


class NotBuiltError(TvmakeError):
    """A stage would have to run for what was asked, where only what is stored may be looked at."""


class ExecutorError(TvmakeError):
    """What was to run stages elsewhere is not there, or cannot. Nothing is wrong with what it was to run."""


class WorkerLostError(ExecutorError):
    """The worker that alone was to run an action is gone. Nothing is known of the action, nothing is wrong with it."""


class WorkerDiedError(StageError):
    """The process that ran a stage died: a signal, memory, or a crash of the compiler. `timed_out` where it was stopped
    because it took too long."""

    timed_out = False


class CheckError(StageError):
    """An artifact's outputs and the reference's disagree."""


class DeviceError(TvmakeError):
    """A device that candidates are measured on, or the tracker that knows it, does not do its part."""


class StoreError(TvmakeError):
    """The store cannot be used as it is."""


class Trouble(enum.Enum):
    """Why a remote does not do its part."""

    AWAY = "away"  # no connection, no answer in time, a connection that broke, an error of the server's own
    REFUSED = "refused"  # it wants other credentials, or forbids what was asked
    GARBLED = "garbled"  # an answer that its protocol does not have
    FULL = "full"  # no space, or the blob is larger than it takes


class RemoteError(StoreError):
    """A remote store does not do its part. The message names the remote, without credentials."""

    def __init__(self, message: str, *, trouble: Trouble = Trouble.AWAY, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.trouble = trouble


class ArtifactError(TvmakeError):
    """A built artifact cannot be loaded or called."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_line(error: BaseException) -> str:
    """The last line of what an exception says, after the trace of C++ frames that TVM puts before it, and without what
    to do about it."""
    said = error.message if isinstance(error, TvmakeError) else str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def raised(error: BaseException) -> str:
    """What Python of the user's raised, and where in it, in one line."""
    if isinstance(error, SyntaxError):
        said, file, line = error.msg, error.filename, error.lineno
    else:
        said, file, line = str(error), None, None
        trace = error.__traceback__
        while trace is not None:
            if not trace.tb_frame.f_code.co_filename.startswith(("<", *_NOT_THE_USERS)):
                file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
            trace = trace.tb_next
    place = f" (line {line} of {os.path.basename(file)})" if file else ""
    return f"{type(error).__name__}: {said}{place}"


def explain_os_error(error: OSError, doing: str) -> StoreError:
    """Turns an operating system's refusal into a sentence and a hint."""
    hints = {
        errno.ENOSPC: "free some space, or set TVMAKE_CACHE to a folder on a larger disk",
        errno.EDQUOT: "the disk quota is used up; free some space or set TVMAKE_CACHE to another disk",
        errno.EROFS: "the file system is read-only; choose a folder that can be written",
        errno.EACCES: "check who owns the folder and its permissions",
        errno.EPERM: "check who owns the folder and its permissions",
    }
    place = f" ({error.filename})" if error.filename else ""
    return StoreError(f"{doing}: {error.strerror or error}{place}", hint=hints.get(error.errno or 0, ""))
