"""Files of states that were made by hand to do harm: sound files, with other words in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kvcoll
from kvcoll import KVStore, tensors
from kvcoll.errors import FileFormatError, StatesMismatchError

Array = npt.NDArray[Any]

pytestmark = pytest.mark.single

ODD: list[Any] = [None, True, -1, 2**63, 1.5, "x", [], {}, [[]], [None], {"a": 1}, "\ud7ff"]


@pytest.fixture
def kv() -> KVStore:
    """Give a store with two keys of Adam, each pushed once."""
    store = kvcoll.create("local")
    store.init(["a", "b"], [np.ones(2, np.float32), np.ones(3, np.float16)])
    store.set_optimizer("adam", multi_precision=True)
    store.push(["a", "b"], [np.ones(2, np.float32), np.ones(3, np.float16)])
    return store


@pytest.fixture
def sound(kv: KVStore, tmp_path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Give the arrays and the texts of a file of it."""
    kv.save_optimizer_states(tmp_path / "sound", dump_optimizer=True)
    with tensors.opened(str(tmp_path / "sound")) as file:
        return {name: file.read(name) for name in file.arrays}, file.metadata


def changed(value: Any) -> list[Any]:
    """Give copies of plain data with one part of it replaced by something odd, or left out."""
    copies = list(ODD)
    if isinstance(value, list):
        for place, part in enumerate(value):
            copies += [[*value[:place], new, *value[place + 1 :]] for new in changed(part)]
            copies.append(value[:place] + value[place + 1 :])
        copies.append(value + value)
    elif isinstance(value, dict):
        for name, part in value.items():
            copies += [{**value, name: new} for new in changed(part)]
            copies.append({other: value[other] for other in value if other != name})
        copies.append({**value, "__class__": "os.system"})
    return copies


def loads_or_is_refused(kv: KVStore, path: Path, arrays: Any, texts: dict[str, str]) -> bool:
    tensors.write(str(path), arrays, texts)
    try:
        kv.load_optimizer_states(path)
    except (FileFormatError, StatesMismatchError) as error:
        said = str(error)
    else:
        kv.push("a", np.ones(2, np.float32))  # what was taken in is good for work
        return True
    assert repr(str(path)) in said
    return False


@pytest.mark.parametrize("name", ["keys", "num_update", "settings", "dump_optimizer"])
def test_odd_parts_of_what_a_file_says_are_refused(
    kv: KVStore, sound: Any, tmp_path: Path, name: str
) -> None:
    arrays, texts = sound
    results = [
        loads_or_is_refused(kv, tmp_path / "f", arrays, {**texts, name: json.dumps(new)})
        for new in changed(json.loads(texts[name]))
    ]
    assert results.count(False) > 0.7 * len(results)
    assert loads_or_is_refused(kv, tmp_path / "f", arrays, texts)


def test_texts_that_are_missing_or_no_json_are_refused(
    kv: KVStore, sound: Any, tmp_path: Path
) -> None:
    arrays, texts = sound
    for name in texts:
        less = {other: texts[other] for other in texts if other != name}
        assert not loads_or_is_refused(kv, tmp_path / "f", arrays, less)
        for odd in ("", "{", "[" * 100_000, "nan", "cos\nsystem\n", "os.system"):
            assert not loads_or_is_refused(kv, tmp_path / "f", arrays, {**texts, name: odd})


def test_arrays_that_do_not_fit_the_list_of_keys_are_refused(
    kv: KVStore, sound: Any, tmp_path: Path
) -> None:
    arrays, texts = sound
    for odd in (
        {},
        {**arrays, "state2:a": arrays["state0:a"]},
        {**arrays, "state0:a": arrays["state0:a"].astype("f8")},
        {**arrays, "state0:a": arrays["state0:a"].view("i4")},
        {**arrays, "state0:a": arrays["state0:a"].reshape(2, 1)},
        {**arrays, "state0:a": np.ones(3, np.float32)},
        {name: array for name, array in arrays.items() if name != "master:b"},
    ):
        assert not loads_or_is_refused(kv, tmp_path / "f", odd, texts)


def test_a_file_without_checksums_is_refused(kv: KVStore, sound: Any, tmp_path: Path) -> None:
    raw = (tmp_path / "sound").read_bytes()
    start = raw.index(b'"kvcoll.crc32"')
    stop = raw.index(b',"format"')
    header = raw[8:start] + raw[stop + 1 : 8 + int.from_bytes(raw[:8], "little")]
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(FileFormatError, match="its checksums are missing"):
        kv.load_optimizer_states(tmp_path / "f")
