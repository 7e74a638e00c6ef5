"""Buckets hold every key once, in order, one dtype each, and are as large as they may be."""

from __future__ import annotations

import random
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from kvcoll.bucket import Bucket, plan
from kvcoll.replica import Entry, Replica
from kvcoll.schema import Spec

pytestmark = pytest.mark.single

DTYPES = tuple(map(np.dtype, ("f4", "f8", "f2", ml_dtypes.bfloat16, "i8", "u1", "c16")))
BUCKET_BYTES = 1000
OWN_BYTES = 300


def entries_of(specs: list[Spec], calls: list[int]) -> list[Entry]:
    """Initialise keys in several calls: they lie in memory as a store would lay them."""
    replica = Replica(chunk_bytes=512)
    start = 0
    for stop in [*calls, len(specs)]:
        part = specs[start:stop]
        replica.keep(replica.draft(part), [np.zeros(s.shape, s.dtype) for s in part])
        start = stop
    return [replica.entries[spec.key] for spec in specs]


def random_entries(seed: int) -> list[Entry]:
    choose = random.Random(seed)
    n_keys = choose.choice([1, 2, 5, 40])
    n_dtypes = choose.randint(1, 3)
    shapes = [(), (0,), (1,), (3, 4), (7,), (10, 2), (100,), (0, 5), (5, 5, 5)]
    specs = [
        Spec(key, choose.choice(shapes), choose.choice(DTYPES[:n_dtypes]), key)
        for key in range(n_keys)
    ]
    entries = entries_of(specs, sorted(choose.sample(range(n_keys), choose.randint(0, n_keys))))
    if choose.random() < 0.3:  # a push of some keys, in an order that is not that of memory
        entries = choose.sample(entries, choose.randint(1, n_keys))
    return entries


def cut(entries: list[Entry]) -> list[Bucket]:
    return plan(entries, BUCKET_BYTES, OWN_BYTES)


seeds = pytest.mark.parametrize("seed", range(60))


@seeds
def test_every_key_is_in_one_bucket_and_the_order_is_kept(seed: int) -> None:
    entries = random_entries(seed)
    members = [member for bucket in cut(entries) for member in bucket.members]
    assert [member.entry for member in members] == entries
    assert [member.position for member in members] == list(range(len(entries)))


@seeds
def test_members_lie_one_behind_another(seed: int) -> None:
    for bucket in cut(random_entries(seed)):
        at = 0
        for member in bucket.members:
            assert member.start == at
            at += member.entry.spec.n_elements
            assert member.stop == at
        assert bucket.n_elements == at
        assert bucket.first == bucket.members[0].position
        assert bucket.last == bucket.members[-1].position + 1


@seeds
def test_a_bucket_is_of_one_dtype(seed: int) -> None:
    for bucket in cut(random_entries(seed)):
        assert {member.entry.spec.dtype for member in bucket.members} == {bucket.dtype}
        small = bucket.dtype.itemsize == 2
        assert bucket.is_small_float is small
        assert bucket.wide_dtype == (np.dtype("f4") if small else bucket.dtype)


@seeds
def test_a_bucket_keeps_its_size_and_large_keys_are_alone(seed: int) -> None:
    for bucket in cut(random_entries(seed)):
        sizes = [member.entry.spec.n_elements * bucket.dtype.itemsize for member in bucket.members]
        assert len(sizes) == 1 or (sum(sizes) <= BUCKET_BYTES and max(sizes) < OWN_BYTES)


@seeds
def test_neighbours_are_not_parted_without_need(seed: int) -> None:
    buckets = cut(random_entries(seed))
    for one, other in pairwise(buckets):
        last = [member.entry.value.nbytes for member in one.members]
        following = other.members[0].entry.value.nbytes
        assert (
            one.dtype != other.dtype
            or sum(last) + following > BUCKET_BYTES
            or max(*last, following) >= OWN_BYTES
        )


@seeds
def test_runs_are_the_members_joined_where_they_are_neighbours_in_memory(seed: int) -> None:
    for bucket in cut(random_entries(seed)):
        marks = np.arange(bucket.n_elements) % 200  # fits every dtype
        for run in bucket.runs:
            at = run.chunk_start
            run.chunk.flat[at : at + run.stop - run.start] = marks[run.start : run.stop]
        for member in bucket.members:
            value = member.entry.value.reshape(-1)
            np.testing.assert_array_equal(value.real, marks[member.start : member.stop])
        assert bucket.runs[0].first == 0
        assert bucket.runs[-1].last == len(bucket.members)
        for run, following in pairwise(bucket.runs):
            assert (run.last, run.stop) == (following.first, following.start)
            end = run.chunk_start + run.stop - run.start
            assert run.chunk is not following.chunk or following.chunk_start != end


@seeds
def test_the_plan_depends_on_keys_shapes_and_dtypes_alone(seed: int) -> None:
    entries = random_entries(seed)
    again = entries_of([entry.spec for entry in entries], [])

    def cuts(buckets: list[Bucket]) -> list[list[Spec]]:
        return [[member.entry.spec for member in bucket.members] for bucket in buckets]

    assert cuts(cut(entries)) == cuts(cut(again))


def test_no_keys_are_no_buckets() -> None:
    assert plan([]) == []


def test_keys_that_fill_a_bucket_to_the_byte_share_it_and_one_byte_more_does_not() -> None:
    specs = [Spec(key, (10,), np.dtype("u1"), key) for key in range(4)]
    for bucket_bytes, expected in [(40, [4]), (39, [3, 1]), (20, [2, 2]), (10, [1] * 4)]:
        buckets = plan(entries_of(specs, []), bucket_bytes, OWN_BYTES)
        assert [len(bucket.members) for bucket in buckets] == expected


def test_neighbours_of_one_init_are_one_run() -> None:
    specs = [Spec(key, (3,), np.dtype("f4"), key) for key in range(5)]
    (bucket,) = cut(entries_of(specs, []))
    assert [(run.first, run.last, run.start, run.stop) for run in bucket.runs] == [(0, 5, 0, 15)]
