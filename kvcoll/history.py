"""What a few elements of each key were after each push, so that a difference can be dated.

Rules of the file: samples are taken where an update has just run, in its thread; which elements
follows from the push and the key alone, and moves on, so that all are seen in turn; nothing is
compared here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import NamedTuple, TypeAlias, final

from .arrays import Array
from .place import Kept
from .replica import Entry
from .schema import Key
from .updater import Optimize, Updater

SAMPLE_ELEMENTS = 16
_MOST_SAMPLES = 1 << 16  # some 20 MB

Note: TypeAlias = Callable[[Iterable[Entry]], None]


class _Sample(NamedTuple):
    """A key after a push."""

    push: int
    key: Key
    updater: Updater
    kept: Kept  # of all keys of the push
    first: int  # the value's place among them; those of the states follow
    last: int


@final
class History:
    """Samples of the pushes since the replicas were compared last.

    Parameters
    ----------
    number : callable
        Gives the number of the push that is about to be made.
    """

    def __init__(self, number: Callable[[], int]) -> None:
        self._number = number
        self._samples: deque[_Sample] = deque(maxlen=_MOST_SAMPLES)

    def of_push(self, updater: Updater) -> Note:
        """Give what takes the samples of the next push, once it has updated some of its keys."""
        return partial(self._take, self._number(), updater)

    def clear(self) -> None:
        """Forget all."""
        self._samples.clear()

    def digests(
        self, updater: Updater, wanted: Mapping[Key, Sequence[str]]
    ) -> dict[str, list[tuple[int, str]]]:
        """Digest samples, to be compared with those of other ranks.

        Parameters
        ----------
        updater : Updater
            The store's; the states of another one are others.
        wanted : mapping of key to sequence of str
            The keys that count, each with the names of its value and states.

        Returns
        -------
        dict of str to list of (int, str)
            By name, for each push its number and the sample's digest; in the order of updates.
        """
        found: dict[str, list[tuple[int, str]]] = {}
        told: dict[int, Sequence[bytes]] = {}  # by the identity of what tells it, which is kept
        for sample in self._samples:
            if id(sample.kept) not in told:
                told[id(sample.kept)] = sample.kept()
            parts = told[id(sample.kept)][sample.first : sample.last]
            names = wanted.get(sample.key, ())
            of_now = names if sample.updater is updater else names[:1]
            for name, part in zip(of_now, parts, strict=False):
                seen = blake2b(part, digest_size=8).hexdigest()
                found.setdefault(name, []).append((sample.push, seen))
        return found

    def _take(self, push: int, updater: Updater, entries: Iterable[Entry]) -> None:
        arrays: list[Array] = []
        places: list[tuple[Key, int, int]] = []
        for entry in entries:
            n = entry.stop - entry.start
            low = push % max(1, -(-n // SAMPLE_ELEMENTS)) * SAMPLE_ELEMENTS
            first, own = len(arrays), [entry.flat]
            if isinstance(updater, Optimize):
                own += updater.states_of(entry)
            arrays += [array[low : low + SAMPLE_ELEMENTS] for array in own]
            places.append((entry.spec.key, first, len(arrays)))
        kept = updater.place.keep(arrays)
        for key, first, last in places:
            self._samples.append(_Sample(push, key, updater, kept, first, last))
