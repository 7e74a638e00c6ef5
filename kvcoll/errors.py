"""The exception tree: one named class per way a call can be wrong.

Rules of the file: every class is also the built-in exception that a Python user
expects in its place, and every class can be rebuilt on another rank from its name
and its message alone, because one rank's mistake is raised on all of them.
"""

from __future__ import annotations

from collections.abc import Iterable


class KVCollError(Exception):
    """Base of every error that kvcoll raises by itself."""

    def __str__(self) -> str:
        # KeyError would show the message in quotes.
        return str(self.args[0]) if self.args else ""


class KeyNotFoundError(KVCollError, KeyError):
    """A key that was never initialised."""


class KeyExistsError(KVCollError, ValueError):
    """A key that was initialised before."""


class KeyKindError(KVCollError, TypeError):
    """A key that is neither int nor str, or of the other kind than the store's keys."""


class ShapeMismatchError(KVCollError, ValueError):
    """An array of another shape than its key's."""


class DTypeMismatchError(KVCollError, TypeError):
    """An array whose dtype does not cast to its key's, or cannot be summed."""


class ArrayError(KVCollError, TypeError):
    """A value that is not an array, or an output that cannot be written."""


class ArgumentError(KVCollError, ValueError):
    """Lists whose lengths do not fit, an unknown option, a name that is not known."""


class RanksDisagreeError(KVCollError, RuntimeError):
    """The ranks called different things where they must call the same."""


class RankFailedError(KVCollError, RuntimeError):
    """A call failed on another rank, for a reason that is not a wrong argument."""


class UpdaterError(RankFailedError):
    """The updater raised on another rank."""


class RankLeftError(RankFailedError):
    """A rank ended, or closed the store, while others still work with it."""


class WaitEndedError(RankFailedError):
    """Waiting for other ranks was ended: a call that they take part in cannot be completed.

    Parameters
    ----------
    message : str
    ranks : iterable of int
        Which ranks it is about, as the communicator of the store counts them.
    """

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class RankLostError(WaitEndedError):
    """Ranks have died; the others may go on without them, see `KVStore.recover`."""


class LateRankError(WaitEndedError):
    """Ranks have kept the others waiting for longer than the hard limit."""


class NotSurvivableError(KVCollError, RuntimeError):
    """The MPI of the job cannot go on when a rank has died."""


class NoWholeReplicaError(RankFailedError):
    """A loss has interrupted the pushes of all survivors halfway."""


class BrokenMPIError(RankFailedError):
    """MPI gives wrong results since a rank was lost."""


class StoreClosedError(KVCollError, RuntimeError):
    """A call to a store that was closed, or that a rank has left."""


class ThreadError(KVCollError, RuntimeError):
    """A second thread of a rank calls a distributed store."""


class MissingDependencyError(KVCollError, ImportError):
    """A library that the store needs is not installed."""


class LaunchError(KVCollError, RuntimeError):
    """The job was started by a launcher that does not belong to the MPI library."""


class NoOptimizerError(KVCollError, RuntimeError):
    """A call about an optimizer, in a store that has none."""


class FileError(KVCollError, OSError):
    """A file that cannot be opened, read or written."""


class NoCheckpointError(FileError, FileNotFoundError):
    """A folder in which there is no complete checkpoint."""


class FileFormatError(KVCollError, ValueError):
    """A file that is truncated, altered, or of another kind than the one expected."""


class StatesMismatchError(KVCollError, ValueError):
    """A sound file of states that are not those of this store's keys or optimizer."""


class CheckpointMismatchError(KVCollError, ValueError):
    """A sound checkpoint that is not one of this store's keys or updater."""


def _tree(root: type[KVCollError]) -> list[type[KVCollError]]:
    return [root] + [leaf for child in root.__subclasses__() for leaf in _tree(child)]


_BUILTIN = (TypeError, ValueError, IndexError, MemoryError, BufferError)


def _known() -> dict[str, type[Exception]]:
    # A class that a user derived is not known on the other ranks.
    classes = [cls for cls in _tree(KVCollError) if cls.__module__ == __name__]
    own: dict[str, type[Exception]] = {cls.__name__: cls for cls in classes}
    return own | {cls.__name__: cls for cls in _BUILTIN}


def name_of(error: BaseException) -> str:
    """Give the name under which `rebuild` finds the class of `error`.

    For a subclass that is not known this is the nearest class that is: NumPy, for one,
    never raises MemoryError itself.
    """
    known = _known()
    names = [cls.__name__ for cls in type(error).__mro__ if known.get(cls.__name__) is cls]
    return names[0] if names else type(error).__name__


def text_of(error: BaseException) -> str:
    """Write an error's text, also where the class of a user cannot write its own."""
    try:
        return str(error)
    except Exception as second:  # the other ranks wait to be told, whatever it is
        return f"(its text cannot be written: {type(second).__name__})"


def rebuild(name: str, message: str) -> Exception:
    """Make the error that another rank described.

    Parameters
    ----------
    name : str
        What `name_of` gave there.
    message : str
        The text of the error.

    Returns
    -------
    Exception
        Of the same class where this class is one of kvcoll's own or a built-in
        one for wrong arguments, else a `RankFailedError` that names the class.
    """
    known = _known()
    if name in known:
        return known[name](message)
    return RankFailedError(f"{name}: {message}")
