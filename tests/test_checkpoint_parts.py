"""What a checkpoint is made of: shares, memory, and a manifest that is believed in nothing."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvcoll
from kvcoll.checkpoint import memory
from kvcoll.checkpoint.kept import Kept
from kvcoll.checkpoint.shares import CUT_BYTES, PART_BYTES, cut, name_of, pieces, worker_of
from kvcoll.errors import FileFormatError

pytestmark = pytest.mark.single

MB = 1 << 20


def kept(*sizes_mb: float) -> list[Kept]:
    return [
        Kept(f"value:{k}", np.dtype("f4"), (int(mb * MB) // 4,)) for k, mb in enumerate(sizes_mb)
    ]


@pytest.mark.parametrize("n_writers", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "sizes", [(), (0,), (1,), (400,), (100, 0, 300), (30, 300, 0, 5, 0), (4.0,) * 90, (0, 64, 0)]
)
def test_parts_cover_every_element_once_and_are_alike_in_size(
    sizes: tuple[float, ...], n_writers: int
) -> None:
    arrays = kept(*sizes)
    starts = cut(arrays, n_writers)
    shares = pieces(arrays, starts)
    seen: dict[int, int] = {}
    for share in shares:
        for piece in share:
            assert piece.start == seen.get(piece.array, 0)
            seen[piece.array] = piece.stop
    assert seen == {number: array.n_elements for number, array in enumerate(arrays)}
    total = sum(array.n_bytes for array in arrays)
    n_bytes = [sum((p.stop - p.start) * 4 for p in share) for share in shares]
    assert sum(n_bytes) == total
    assert 1 <= len(shares) <= n_writers
    if len(shares) > 1:
        assert max(n_bytes) <= total / len(shares) + CUT_BYTES
        assert min(n_bytes) >= min(PART_BYTES, total / len(shares)) - CUT_BYTES
    if total >= n_writers * PART_BYTES:
        assert len(shares) == n_writers
    names = [name_of(arrays, piece) for share in shares for piece in share]
    assert len(set(names)) == len(names)


def test_small_arrays_are_never_cut_and_pieces_of_large_ones_say_where_they_begin() -> None:
    arrays = kept(15, 15, 15, 15, 15, 200)
    shares = pieces(arrays, cut(arrays, 4))
    names = [[name_of(arrays, piece) for piece in share] for share in shares]
    assert names[0] == [f"value:{k}" for k in range(5)]
    at = [share[0].start for share in shares[1:]]
    ends = [*at[1:], arrays[5].n_elements]
    assert at[0] == 0
    assert names[1:] == [[f"value[{a}:{b}]:5"] for a, b in zip(at, ends, strict=True)]


@pytest.mark.parametrize(("n_parts", "n_workers"), [(1, 4), (3, 4), (4, 4), (8, 3), (2, 100)])
def test_parts_are_spread_over_the_ranks(n_parts: int, n_workers: int) -> None:
    workers = [worker_of(part, n_parts, n_workers) for part in range(n_parts)]
    assert all(0 <= worker < n_workers for worker in workers)
    assert len(set(workers)) == min(n_parts, n_workers)
    assert max(map(workers.count, workers)) <= -(-n_parts // n_workers)


def test_neighbours_in_memory_are_joined_and_no_others() -> None:
    flat = np.arange(20, dtype=np.float32)
    runs = memory.joined([flat[2:5], flat[5:5], flat[5:9], flat[10:12], flat[12:14]])
    assert [run.view(np.float32).tolist() for run in runs] == [
        [2, 3, 4, 5, 6, 7, 8],
        [10, 11, 12, 13],
    ]
    own = np.arange(3.0)
    assert [run.size for run in memory.joined([own, flat[:2]])] == [24, 8]


def test_one_memory_holds_arrays_of_all_dtypes_aligned_and_apart() -> None:
    sizes = [(np.dtype(name), n) for name, n in [("i1", 3), ("f8", 2), ("f2", 0), ("c16", 5)]]
    arrays = memory.take(sizes)
    assert [(array.dtype, array.size) for array in arrays] == sizes
    for number, array in enumerate(arrays):
        assert array.flags.aligned
        array[...] = number
    assert [set(array.tolist()) for array in arrays] == [{0}, {1.0}, set(), {3 + 0j}]


def forged(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a manifest says, and give it the right checksum."""
    file = path / "00000001" / "manifest.json"
    content = json.loads(file.read_text())["checkpoint"]
    change(content)
    body = f'"checkpoint": {json.dumps(content)}}}\n'.encode()
    file.write_bytes(f'{{"crc32": "{zlib.crc32(body):08x}", '.encode() + body)


FORGERIES: list[Callable[[dict[str, Any]], object]] = [
    lambda m: m.update(format="another"),
    lambda m: m.update(format_version=99),
    lambda m: m.pop("keys"),
    lambda m: m["keys"].append("c"),
    lambda m: m.update(keys=["a", 3]),
    lambda m: m.update(keys=["a", "a"]),
    lambda m: m.update(keys=["a", True]),
    lambda m: m.update(version=-1),
    lambda m: m.update(version=1.5),
    lambda m: m.update(num_workers=0),
    lambda m: m.update(num_workers=2),
    lambda m: m["arrays"][0].__setitem__(1, "object"),
    lambda m: m["arrays"][0].__setitem__(1, "float16"),
    lambda m: m["arrays"][0].__setitem__(2, [-1]),
    lambda m: m["arrays"][0].__setitem__(2, [2**40, 2**40]),
    lambda m: m["arrays"][0].__setitem__(2, [0, 2**62]),
    lambda m: m["arrays"][0].__setitem__(2, [1] * 65),
    lambda m: m["arrays"][0].__setitem__(2, [5]),
    lambda m: m.pop("fingerprints"),
    lambda m: m["fingerprints"].pop(),
    lambda m: m["fingerprints"].append(m["fingerprints"][0]),
    lambda m: m["fingerprints"].__setitem__(1, 7),
    lambda m: m["fingerprints"].__setitem__(1, "0" * 31),
    lambda m: m["fingerprints"].__setitem__(1, "0" * 32),
    lambda m: m.update(fingerprints=m["fingerprints"][::-1]),
    lambda m: m["parts"][0].__setitem__(0, "../../etc/passwd"),
    lambda m: m["parts"][0].__setitem__(0, "part-00000-of-00001.safetensors/../x"),
    lambda m: m["parts"][0].__setitem__(1, 7),
    lambda m: m["parts"][0].__setitem__(2, "00000000"),
    lambda m: m["parts"].append(m["parts"][0]),
    lambda m: m.update(parts=[], starts=[]),
    lambda m: m.update(starts=[[0, 1]]),
    lambda m: m.update(starts=[[1, 0]]),
    lambda m: m.update(starts=[[0, 0], [0, 0]]),
    lambda m: m.update(optimizer={"format": 3}),
    lambda m: m.update(optimizer="SGD"),
    lambda m: m.update(rank_arrays=[[], []]),
    lambda m: m.update(rank_arrays=[[]]),
    lambda m: m.update(about=None),
    lambda m: m.update(compression=3),
    lambda m: m.update(compression={"is_on": True, "params": {"type": "exec"}}),
    lambda m: m.update(compression={"is_on": True, "params": {"type": "none"}}),
    lambda m: m.update(compression={"is_on": 1, "params": {"type": "2bit"}}),
]


@pytest.mark.parametrize("number", range(len(FORGERIES)))
def test_a_forged_manifest_is_an_error_and_nothing_else(tmp_path: Path, number: int) -> None:
    with kvcoll.create("local") as kv:
        kv.init(["a", "b"], [np.ones(4, np.float32), np.ones((2, 2))])
        kv.set_optimizer("adam")
        kv.push(["a", "b"], [np.ones(4, np.float32), np.ones((2, 2))])
        kv.save(tmp_path)
        before = [value.tobytes() for value in kv.pull(["a", "b"])]
        forged(tmp_path, FORGERIES[number])
        with pytest.raises((FileFormatError, kvcoll.errors.CheckpointMismatchError)) as raised:
            kv.load(tmp_path)
        assert str(tmp_path / "00000001") in str(raised.value)
        assert [value.tobytes() for value in kv.pull(["a", "b"])] == before
        with pytest.raises(kvcoll.errors.KVCollError), kvcoll.create("local") as empty:
            empty.load(tmp_path)


@pytest.mark.parametrize(
    ("row_sparse", "why"),
    [
        (None, "a list is none"),
        ([0, 1], "a list of bools is none"),
        ("no", "a list is none"),
        ([False], "it does not say of each key whether it is row-sparse"),
        ([False] * 3, "it does not say of each key whether it is row-sparse"),
        ([True, True], "'value:b' is row-sparse, but has no rows"),
    ],
)
def test_what_is_said_of_row_sparse_keys_is_believed_in_nothing_either(
    tmp_path: Path, row_sparse: Any, why: str
) -> None:
    with kvcoll.create("local") as kv, kvcoll.create("local") as empty:
        kv.init(["a", "b"], [np.ones(4), np.array(1.0)])
        kv.save(tmp_path)
        forged(tmp_path, lambda m: m.update(row_sparse=row_sparse))
        for load in (kv.load, empty.load, kvcoll.load):
            with pytest.raises(FileFormatError) as raised:
                load(tmp_path)
            assert str(raised.value).endswith(f"is not a sound checkpoint: {why}")
        forged(tmp_path, lambda m: m.pop("row_sparse"))
        with pytest.raises(FileFormatError, match="its manifest does not say 'row_sparse'"):
            empty.load(tmp_path)
        empty.init("a", np.ones(1))  # which nothing was loaded into


def test_a_manifest_that_is_not_changed_is_read_as_ever(tmp_path: Path) -> None:
    with kvcoll.create("local") as kv:
        kv.init("a", np.arange(4.0))
        kv.save(tmp_path)
        forged(tmp_path, lambda m: None)
        assert kv.load(tmp_path).version == 0
