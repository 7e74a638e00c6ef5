"""Files that are truncated, altered, foreign or made to do harm: one named error for all."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcoll import tensors
from kvcoll.errors import FileFormatError

pytestmark = pytest.mark.single

W = '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> str:
    """Write a header of one array."""
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}})


def framed(header: str | bytes, data: bytes = bytes(8)) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def read(path: Path, raw: bytes) -> None:
    """Read all that a file says and holds."""
    path.write_bytes(raw)
    with tensors.opened(str(path)) as file:
        for name in file.arrays:
            file.read(name)


def refused(path: Path, raw: bytes) -> str:
    with pytest.raises(FileFormatError) as raised:
        read(path, raw)
    text = str(raised.value)
    assert repr(str(path)) in text
    assert text.endswith("; take another copy of it, or write it again")
    assert len(text) < 800
    return text


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """Give the bytes of a small sound file."""
    arrays = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "é": np.array([True, False]),
        "n": np.zeros((0, 4), np.int64),
    }
    tensors.write(str(tmp_path / "whole"), arrays, {"note": "x", "other": "[1]"})
    return (tmp_path / "whole").read_bytes()


def test_a_file_cut_off_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    read(tmp_path / "f", whole)
    for n_bytes in range(len(whole)):
        refused(tmp_path / "f", whole[:n_bytes])


def test_a_file_with_bytes_at_its_end_is_refused(whole: bytes, tmp_path: Path) -> None:
    for more in (b"\0", b"}", whole):
        refused(tmp_path / "f", whole + more)


@pytest.mark.parametrize("change", [0x01, 0x02, 0x10, 0x20, 0x80, 0xFF])
def test_an_altered_byte_is_found_wherever_it_is(whole: bytes, tmp_path: Path, change: int) -> None:
    name = whole.index(b"kvcoll.crc32")
    for place in range(len(whole)):
        raw = bytearray(whole)
        raw[place] ^= change
        if name <= place < name + len(b"kvcoll.crc32"):
            (tmp_path / "f").write_bytes(raw)  # nothing says any more that there are checksums
            try:
                with tensors.opened(str(tmp_path / "f")) as file:
                    assert not file.has_checksums
            except FileFormatError:
                pass
            continue
        refused(tmp_path / "f", bytes(raw))


def test_without_checksums_an_altered_header_is_refused_or_still_sound(tmp_path: Path) -> None:
    raw = framed('{"__metadata__":{"a":"b"},' + W + "}")
    n_refused = 0
    for place in range(len(raw) - 8):
        for change in (1, 2, 3, 4, 8, 16, 32, 64, 128, 255):
            altered = bytearray(raw)
            altered[place] ^= change
            try:
                read(tmp_path / "f", bytes(altered))
            except FileFormatError:
                n_refused += 1
    assert n_refused > 8 * (len(raw) - 8)


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for n_bytes in [*range(64), *[1000] * 50]:
        noise = rng.bytes(n_bytes)
        refused(tmp_path / "f", noise)
        refused(tmp_path / "f", framed(noise))
        refused(tmp_path / "f", framed(b"{" + noise + b"}"))


def test_pieces_of_a_header_in_any_order_are_refused_or_sound(tmp_path: Path) -> None:
    words = ["{", "}", "[", "]", ",", ":", '"w"', '"dtype"', '"F32"', '"shape"', "2", "-1", "null"]
    words += ['"data_offsets"', '"__metadata__"', "0", "8", "1e9", "true", W, '""', " ", "NaN"]
    rng = np.random.default_rng(1)
    for _ in range(1000):
        text = "{" + "".join(rng.choice(words, rng.integers(1, 12))) + "}"
        try:
            read(tmp_path / "f", framed(text))
        except FileFormatError:
            continue
        assert set(json.loads(text)) <= {"w", "", "__metadata__"}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("", "does not begin with '{'"),
        (" {}", "does not begin with '{'"),
        ("[]", "does not begin with '{'"),
        (b"\xef\xbb\xbf{}", "does not begin with '{'"),
        ("{", "cannot be read"),
        ("{}", "by its header it has 10 bytes, the file is 18"),
        ("{" + W + "}{}", "cannot be read"),
        ("{" + W + "}\0", "cannot be read"),
        ("{" + W + "," + W + "}", "a name stands twice"),
        ('{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "twice"),
        (b'{"\xff":0}', "cannot be read"),
        ('{"\\ud800":' + W[4:] + "}", "cannot be read"),
        ('{"__metadata__":{"a":"\\udc00"},' + W + "}", "cannot be read"),
        ('{"__metadata__":{"a":1},' + W + "}", "metadata are not texts"),
        ('{"__metadata__":[],' + W + "}", "metadata are not texts"),
        ('{"__metadata__":null,' + W + "}", "metadata are not texts"),
        ('{"__metadata__":{"a":"b","kvcoll.crc32":"0"},' + W + "}", "another program rewrote it"),
        ('{"w":0}', "gives not just dtype, shape and offsets"),
        ('{"w":{"dtype":"F32","shape":[2]}}', "gives not just"),
        (entry(more=1), "gives not just"),
        (entry("F4"), "is of dtype 'F4'; known are BOOL"),
        (entry("f" * 5000), "is of dtype 'ffff"),
        (entry(["F32"]), "is of dtype"),
        (entry(shape=2), "the shape of array 'w' is none"),
        (entry(shape=[-2]), "the shape of array 'w' is none"),
        (entry(shape=[True, 2]), "the shape of array 'w' is none"),
        (entry(shape=["2"]), "the shape of array 'w' is none"),
        (entry(shape=[1] * 33), "the shape of array 'w' is none"),
        (entry(shape=[2.0]), "2.0 is not a whole number"),
        (entry(shape=[float("nan")]), "NaN is not a whole number"),
        (entry(shape=[10**30]), "too many digits"),
        (entry(shape=[2**62]), "larger than any memory"),
        (entry(shape=[2**31, 2**31, 2**31]), "larger than any memory"),
        (entry(shape=[0, 2**62], offsets=[0, 0]), "larger than any memory"),
        (entry(shape=[2**40]), "must have the bytes [0, 4398046511104], and has [0, 8]"),
        (entry(shape=[2**40], offsets=[0, 2**42]), "by its header it has"),
        (entry(shape=[3]), "must have the bytes [0, 12], and has [0, 8]"),
        (entry(offsets=[8, 0]), "must have the bytes [0, 8], and has [8, 0]"),
        (entry(offsets=[4, 12]), "must have the bytes [0, 8], and has [4, 12]"),
        (entry(offsets=[0, 8, 8]), "the offsets of array 'w' are not two numbers"),
        (entry(offsets=[-8, 0]), "the offsets of array 'w' are not two numbers"),
        (entry(offsets="08"), "the offsets of array 'w' are not two numbers"),
        ("{" + W + "," + W.replace("w", "v", 1) + "}", "must have the bytes [8, 16]"),
        ('{"w":' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        ('{"w":' * 200_000 + "0" + "}" * 200_000, "nested too deeply"),
        ('{"' + "w" * 100_000 + '":0}', "of array 'www"),
    ],
    ids=range(46),
)
def test_a_header_that_cannot_be_is_refused_and_says_why(
    tmp_path: Path, header: str | bytes, why: str
) -> None:
    assert why in refused(tmp_path / "f", framed(header))


def test_the_same_header_without_a_fault_is_read(tmp_path: Path) -> None:
    for sound in ("{" + W + "}", "{" + W + "}   ", entry(), '{"__metadata__":{},' + W + "}"):
        read(tmp_path / "f", framed(sound))


def test_bytes_that_are_no_bools_are_refused(tmp_path: Path) -> None:
    header = entry("BOOL", [8])
    read(tmp_path / "f", framed(header, b"\0\1" * 4))
    assert "neither 0 nor 1" in refused(tmp_path / "f", framed(header, b"\0\1\2\1" * 2))


def test_what_a_hostile_file_claims_takes_no_memory(tmp_path: Path) -> None:
    claims = [
        (2**63 - 1).to_bytes(8, "little") + b"{}",
        (99_000_000).to_bytes(8, "little") + b"{}",
        framed(entry("U8", [2**40], [0, 2**40])),
        framed(entry("U8", [2**62], [0, 2**62])),
    ]
    tracemalloc.start()
    try:
        for raw in claims:
            refused(tmp_path / "f", raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    for raw in [
        (tmp_path / "array.npy").read_bytes(),
        (tmp_path / "arrays.npz").read_bytes(),
        b"cos\nsystem\n(S'touch harmed'\ntR.",
        b'{"json": 1}',
        b"",
    ]:
        refused(tmp_path / "f", raw)
