"""Errors: each says what is wrong, what it got, what is allowed, and how to fix it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

_LONGEST = 300
"""Characters that an error quotes of what was read, and again of a library's message."""


def printable(text: str) -> str:
    """Text whose control codes, which a terminal would obey, stand there as escapes; ends of lines stay.

    Example:
        >>> printable(chr(27) + "[31m") == chr(92) + "x1b[31m"
        True
    """
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode("ascii") for one in text)


class OldLogitsError(Exception):
    """Base of all errors of this package.

    Example:
        >>> str(OldLogitsError("band must be above 1", got="0.9", allowed="a number > 1", fix="set band = 1.5"))
        'band must be above 1; got: 0.9; allowed: a number > 1; fix: set band = 1.5'
    """

    def __init__(self, what: str, *, got: str = "", allowed: str = "", fix: str = "") -> None:
        self.what, self.got, self.allowed, self.fix = what, got, allowed, fix
        parts = [("", what), ("got: ", got), ("allowed: ", allowed), ("fix: ", fix)]
        super().__init__("; ".join(label + text for label, text in parts if text))

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the four parts when the error crosses a process boundary."""
        return (partial(type(self), self.what, got=self.got, allowed=self.allowed, fix=self.fix), ())


class ConfigError(OldLogitsError, ValueError):
    """A recipe, an override or a command-line option is wrong."""


class AbsentCheckoutError(ConfigError):
    """A recipe names a checkout of another project that is not here."""


class MissingPolicyError(ConfigError):
    """A variant asks for log-probs that its source does not provide."""


class RunFolderError(OldLogitsError, FileExistsError):
    """The run folder is not empty, or cannot be resumed."""


class RunWriteError(OldLogitsError, OSError):
    """A file of a run cannot be written: the disk is full, or the folder is gone or read-only."""


class ModelFolderError(OldLogitsError, FileNotFoundError):
    """A model folder is missing, incomplete, or of a family that is not supported."""


class EnvironmentShapeError(OldLogitsError, TypeError):
    """A class does not have the shape of an environment."""


class ContentError(OldLogitsError, ValueError):
    """Words of an environment cannot be shown to the model as they are."""


class ReplayError(OldLogitsError, ValueError):
    """A record of batches is damaged, or does not hold what training from it again needs."""


class TrajectoryError(OldLogitsError, ValueError):
    """The segments of a trajectory contradict each other."""


class TokenTableError(OldLogitsError, ValueError):
    """A file of trained tokens is damaged, or its columns contradict each other."""


class MissingLogprobError(OldLogitsError, ValueError):
    """A token lacks the log-prob that the objective needs; never replaced by a ratio of 1."""


class VersionEvictedError(OldLogitsError, LookupError):
    """A version was asked for that the store no longer holds."""


class StoreUseError(OldLogitsError, RuntimeError):
    """The store of versions was asked for what its order of calls does not allow."""


class StoreBusyError(OldLogitsError, BlockingIOError):
    """Another owner has the folder of versions open."""


class StoreWriteError(OldLogitsError, OSError):
    """A version could not be written to disk, such as a full one; what was there before is intact."""


class StoreDamagedError(OldLogitsError, ValueError):
    """A file of versions is not what was written."""


class LayoutError(OldLogitsError, ValueError):
    """Weights or a patch do not fit the tensors that they are meant for."""


class PatchError(OldLogitsError, ValueError):
    """Bytes are no patch, were written in another format, or are damaged."""


class ReceiverBehindError(OldLogitsError, LookupError):
    """A receiver of weights cannot take a patch: it holds another version, or the patch is damaged."""


class ExactnessError(OldLogitsError, ArithmeticError):
    """A consistency check contradicts log-probs that were claimed to be exact."""


class ProbeError(OldLogitsError, ArithmeticError):
    """Engine and trainer disagree on a fixed prompt right after a weight update."""


class NonFiniteError(OldLogitsError, FloatingPointError):
    """A loss or a gradient is not finite."""


class RolloutError(OldLogitsError, RuntimeError):
    """Sampling goes on without anything to train: episodes fail, or groups are left out."""


class RunInterrupted(KeyboardInterrupt):
    """The user wants a run to stop at once; no environment's code can raise it by accident, as it can a KeyboardInterrupt."""


class AccountingError(OldLogitsError, RuntimeError):
    """Trajectories were lost, counted twice, or would be trained beyond the staleness bound."""


class UnknownCallError(OldLogitsError, AttributeError):
    """A process was asked for a call that it does not offer."""


class McpServerError(OldLogitsError, RuntimeError):
    """A server of the Model Context Protocol cannot be started or reached, or does not do what it is asked for."""


class WorkerDiedError(OldLogitsError, RuntimeError):
    """The engine or the trainer process ended or stopped answering."""


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make the folder writable, or choose another"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), "leave the folder in its place while it is written"),
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses inside into a `RunWriteError` that names the path."""
    try:
        yield
    except OldLogitsError:
        raise
    except OSError as error:
        raise RunWriteError(
            f"{path} cannot be written",
            got=error.strerror or str(error),
            allowed="a folder that stays in its place, is writable and has room",
            fix=f"{_REMEDIES.get(error.errno or 0, 'look at that disk')}, then start again or go on with --resume",
        ) from error


@contextmanager
def reading(kind: type[OldLogitsError], what: str, *, got: str, allowed: str, fix: str) -> Iterator[None]:
    """Turn whatever is raised while something from outside is read into one error: a model folder, a row file, a recipe.

    This is the one place for that: libraries raise what they like on a damaged file, panics of Rust included, which are no
    `Exception`. Errors of this package and interruptions pass.

    Args:
        kind: The error's class.
        what: What is wrong, in words.
        got: What was read; the exception's message is put behind it.
        allowed: What is allowed.
        fix: How to fix it.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, OldLogitsError) or not (is_panic or isinstance(error, Exception)):
            raise
        said = " ".join(str(error).split())[:_LONGEST]
        raise kind(what, got=f"{got[:_LONGEST]}: {said or type(error).__name__}", allowed=allowed, fix=fix) from error
