"""Files of arrays: what is written is read again, by us and by the safetensors package."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvcoll import tensors
from kvcoll.errors import ArgumentError, DTypeMismatchError, MissingDependencyError

Array = npt.NDArray[Any]

pytestmark = pytest.mark.single

NAMES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8"]
CHECKSUMMED = b'{"__metadata__":{"kvcoll.crc32":"'


def numbers(dtype: Any, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Give any bits that are values of a dtype."""
    dtype = np.dtype(dtype)
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(
        0, 2 if dtype.kind == "b" else 256, n_bytes, np.uint8
    )
    array: Array = raw.view(dtype).reshape(shape)
    return array


def same(one: Array, other: Array) -> bool:
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def read_all(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    with tensors.opened(str(path)) as file:
        return {name: file.read(name) for name in file.arrays}, file.metadata


def round_trip(path: Path, arrays: dict[str, Array], metadata: dict[str, str]) -> None:
    tensors.write(str(path), arrays, metadata)
    got, texts = read_all(path)
    assert texts == metadata
    assert set(got) == set(arrays)
    for name, array in arrays.items():
        assert same(got[name], array.astype(array.dtype.newbyteorder("="))), name


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_arrays_of_every_dtype_come_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays = {name: numbers(name, shape, seed) for seed, name in enumerate(NAMES)}
    round_trip(tmp_path / "f", arrays, {})


def test_the_small_floats_of_ml_dtypes_come_back(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    kinds = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
    arrays = {str(k): numbers(kind, (3, 5), k) for k, kind in enumerate(kinds)}
    round_trip(tmp_path / "f", arrays, {})


def test_names_and_texts_may_be_any_unicode(tmp_path: Path) -> None:
    names = ["", "é", "日本", '"quoted"\\', "a\nb", "\U0001f600", "[{", "kvcoll.crc32"]
    arrays = {name: numbers("f4", (k,), k) for k, name in enumerate(names)}
    texts = {name: name[::-1] for name in names if name != "kvcoll.crc32"}
    round_trip(tmp_path / "f", arrays, texts)


def test_a_file_may_hold_nothing(tmp_path: Path) -> None:
    round_trip(tmp_path / "f", {}, {})


def test_strided_transposed_and_big_endian_arrays_come_back(tmp_path: Path) -> None:
    base = numbers("i4", (6, 8))
    arrays: dict[str, Array] = {
        "strided": base[::2, 1::3],
        "transposed": base.T,
        "backward": base[::-1],
        "broadcast": np.broadcast_to(base[0], (3, 8)),
        "big": base.astype(">i4"),
        "big complex": np.array([1 + 2j, 3 - 4j], ">c8"),
        "fortran": np.asfortranarray(base),
    }
    before = {name: array.copy() for name, array in arrays.items()}
    round_trip(tmp_path / "f", arrays, {})
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_the_bytes_are_those_of_the_specification(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {"b": np.array([[1], [2]], np.int16), "a": np.array(0.5, np.float32)}
    tensors.write(str(tmp_path / "f"), arrays, {"note": "é"})
    raw = (tmp_path / "f").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    assert length % 8 == 0
    assert data == b"\0\0\0\x3f" + b"\1\0\2\0"  # the larger elements first
    entries = json.loads(header)
    checksums = entries["__metadata__"].pop("kvcoll.crc32")
    assert entries == {
        "__metadata__": {"note": "é"},
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "b": {"dtype": "I16", "shape": [2, 1], "data_offsets": [4, 8]},
    }
    zeroed = header.replace(checksums.encode(), b"0" * 24)
    expected = [zeroed, data[:4], data[4:]]
    assert checksums == "".join(f"{zlib.crc32(part):08x}" for part in expected)
    assert header.startswith(CHECKSUMMED)


def test_the_safetensors_package_reads_our_files(tmp_path: Path) -> None:
    theirs = pytest.importorskip("safetensors", reason="safetensors is not installed")
    arrays = {name: numbers(name, (2, k), k) for k, name in enumerate(NAMES) if name != "c8"}
    tensors.write(str(tmp_path / "f"), arrays, {"a": "b", "é": '"'})
    with theirs.safe_open(tmp_path / "f", "np") as file:
        texts = file.metadata()
        assert len(texts.pop("kvcoll.crc32")) == 8 * (len(arrays) + 1)
        assert texts == {"a": "b", "é": '"'}
        assert set(file.keys()) == set(arrays)
        for name, array in arrays.items():
            assert same(file.get_tensor(name), array)


def test_we_read_the_files_of_the_safetensors_package(tmp_path: Path) -> None:
    theirs = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    arrays = {name: numbers(name, (k, 2), k) for k, name in enumerate(NAMES) if name != "c8"}
    theirs.save_file(arrays, tmp_path / "f", metadata={"a": "b"})
    got, texts = read_all(tmp_path / "f")
    assert texts == {"a": "b"}
    assert set(got) == set(arrays)
    assert all(same(got[name], arrays[name]) for name in arrays)
    theirs.save_file(arrays, tmp_path / "without_texts")
    assert set(read_all(tmp_path / "without_texts")[0]) == set(arrays)


def test_bfloat16_and_complex64_are_the_same_to_the_safetensors_package(tmp_path: Path) -> None:
    theirs = pytest.importorskip("safetensors", reason="safetensors is not installed")
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    arrays = {"BF16": numbers(ml_dtypes.bfloat16, (2, 3)), "F8_E5M2": numbers("u1", (5,))}
    arrays["F8_E5M2"] = arrays["F8_E5M2"].view(ml_dtypes.float8_e5m2)
    version = tuple(map(int, theirs.__version__.split(".")[:2]))
    if version >= (0, 6):  # where complex came in
        arrays["C64"] = numbers("c8", (4,))
    tensors.write(str(tmp_path / "f"), arrays, {})
    raw = theirs.deserialize((tmp_path / "f").read_bytes())
    assert {name: (one["dtype"], bytes(one["data"])) for name, one in raw} == {
        name: (name, array.tobytes()) for name, array in arrays.items()
    }


@pytest.mark.parametrize("dtype", ["c16", "g", "m8", "S3", "O"])
def test_a_dtype_that_the_format_lacks_is_named_and_no_file_is_written(
    tmp_path: Path, dtype: str
) -> None:
    name = np.dtype(dtype).name
    if name == "float64":
        pytest.skip("long double is double here")
    with pytest.raises(DTypeMismatchError, match=f"array 'w' is {name}"):
        tensors.write(str(tmp_path / "f"), {"w": np.zeros(2, dtype)}, {})
    assert list(tmp_path.iterdir()) == []


def test_names_that_a_file_cannot_hold_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcoll.tensors.header.LONGEST_HEADER_BYTES", 1000)
    cases: list[tuple[dict[str, Array], dict[str, str], str]] = [
        ({"__metadata__": np.zeros(1)}, {}, "cannot be the name of an array"),
        ({"\ud800": np.zeros(1)}, {}, "not valid unicode"),
        ({}, {"a": "\udfff"}, "not valid unicode"),
        ({}, {"kvcoll.crc32": "0"}, "is the file's own"),
        ({}, {"a": "x" * 1000}, "the format allows 1000"),
    ]
    for arrays, texts, why in cases:
        with pytest.raises(ArgumentError, match=why):
            tensors.write(str(tmp_path / "f"), arrays, texts)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_without_ml_dtypes_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = b'{"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},' + (
        b'"v":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}}'
    )
    raw = len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f\7"
    (tmp_path / "f").write_bytes(raw)
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    with tensors.opened(str(tmp_path / "f")) as file:
        assert file.read("v")[0] == 7
        with pytest.raises(MissingDependencyError, match="bfloat16 arrays need ml_dtypes: pip"):
            file.read("w")


def test_writing_and_reading_take_no_memory_beside_the_arrays(tmp_path: Path) -> None:
    path, n_bytes = str(tmp_path / "f"), 24 << 20
    arrays: dict[str, Array] = {"a": np.ones(n_bytes // 8), "b": np.ones(n_bytes, np.uint8)}
    out = np.empty(n_bytes // 8)
    tracemalloc.start()
    try:
        tensors.write(path, arrays, {})
        with tensors.opened(path) as file:
            file.read_into("a", out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert out.sum() == n_bytes // 8


def test_an_array_may_be_longer_than_what_is_written_at_once(tmp_path: Path) -> None:
    array = numbers("u1", ((9 << 20) + 3,))
    round_trip(tmp_path / "f", {"w": array, "v": array[::7]}, {})
