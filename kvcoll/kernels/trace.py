"""A function on arrays, run once on symbols, written down as the operations it did.

Rules of the file: numbers are no part of a program, so that a learning rate that changes
changes no program; an operation is written down only if a GPU gives the same bits for it as
NumPy does; what cannot be written down raises `UntraceableError`, and never a wrong program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, final

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ..arrays import DType, is_small_float

#: How many elements a symbol says that it has; a function that depends on it is wrong anyway.
SIZE = 1 << 16

_UNWRITTEN = -1
_BOOL, _DOUBLE = np.dtype(bool), np.dtype(np.float64)
# By ufunc: the function of the prelude, and whether it gives a bool.
_EXACT: dict[np.ufunc, tuple[str, bool]] = {
    np.add: ("add", False),
    np.subtract: ("subtract", False),
    np.multiply: ("multiply", False),
    np.divide: ("divide", False),
    np.sqrt: ("square_root", False),
    np.absolute: ("absolute", False),
    np.fabs: ("absolute", False),
    np.negative: ("negative", False),
    np.positive: ("same", False),
    np.square: ("square", False),
    np.sign: ("sign", False),
    np.copysign: ("copy_sign", False),
    np.maximum: ("maximum", False),
    np.minimum: ("minimum", False),
    np.greater: ("greater", True),
    np.greater_equal: ("greater_equal", True),
    np.less: ("less", True),
    np.less_equal: ("less_equal", True),
    np.equal: ("equal", True),
    np.not_equal: ("not_equal", True),
}
_ARITHMETIC = (np.dtype(np.float32), _DOUBLE)
_USED = "a sum over all elements that is used for more"
_GIVEN = ("load", "number", "scalar")  # their arguments are no places


class UntraceableError(Exception):
    """A function did what cannot be written down as a kernel; its text says what."""


class Operation(NamedTuple):
    """One operation; its result is known by its place in the program.

    Attributes
    ----------
    name : str
        ``load`` (argument: which array), ``number`` (which of the numbers), ``scalar`` (which
        of the numbers that lie on the GPU), ``cast``, ``select``, or a function of the prelude.
    dtype : numpy.dtype
        Of the result.
    arguments : tuple of int
        Places of earlier operations, but for ``load``, ``number`` and ``scalar``.
    """

    name: str
    dtype: DType
    arguments: tuple[int, ...]


@final
class Sum(NDArrayOperatorsMixin):
    """A sum over all elements of what an operation gives; it can be returned, and no more.

    Attributes
    ----------
    place : int
        Among the sums of the program.
    """

    def __init__(self, place: int) -> None:
        self.place = place

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        """Refuse: other kernels work with it."""
        raise UntraceableError(_USED)

    def __array__(self, *_: Any, **__: Any) -> Any:
        """Refuse."""
        raise UntraceableError(_USED)

    def __bool__(self) -> bool:
        raise UntraceableError(_USED)

    def __float__(self) -> float:
        raise UntraceableError(_USED)


@dataclass(frozen=True)
class Program:
    """What a function does to each element of its arrays, whatever the numbers are.

    Attributes
    ----------
    dtypes : tuple of numpy.dtype
        Of the arrays, in the order of the function's arguments.
    operations : tuple of Operation
    stores : tuple of (int, int)
        Which array gets the result at which place, at the end.
    sums : tuple of int
        The results that are summed over all elements.
    n_numbers : int
    n_scalars : int
        How many numbers (float64) lie on the GPU, as other kernels have worked them out.
    """

    dtypes: tuple[DType, ...]
    operations: tuple[Operation, ...]
    stores: tuple[tuple[int, int], ...]
    sums: tuple[int, ...]
    n_numbers: int
    n_scalars: int = 0


class Traced(NamedTuple):
    """A program, and the numbers that one call of the function would run it with."""

    program: Program
    numbers: tuple[int, ...]  # the bits of each, of its operation's dtype, as an int64
    result: Any  # what the function returned; a sum is a `Sum`


def trace(
    function: Callable[[list[Any]], Any], dtypes: Sequence[DType], n_scalars: int = 0
) -> Traced:
    """Write down what a function does to flat arrays.

    Parameters
    ----------
    function : callable
        Takes a list of symbols that stand for flat arrays of one size, and changes them by
        ufuncs with or without ``out``, ``numpy.clip``, ``copyto`` and ``where``.
    dtypes : sequence of numpy.dtype
        Of the arrays.
    n_scalars : int, default 0
        So many symbols more stand for numbers which only the GPU will know: they are taken as
        Python's floats are, and nothing can be decided by them.

    Raises
    ------
    UntraceableError
        It does something else.

    Notes
    -----
    Cost: one to two microseconds an operation, so a function may be traced at each call:
    what it decides in Python, by the numbers of the moment, is then always right.
    """
    recorder = _Recorder()
    arrays = [Symbol(recorder, recorder.load(k, dtype)) for k, dtype in enumerate(dtypes)]
    loaded = [array.place for array in arrays]
    scalars = [Symbol(recorder, recorder.scalar(k), is_scalar=True) for k in range(n_scalars)]
    result = function([*arrays, *scalars])
    stores = tuple((k, array.place) for k, array in enumerate(arrays) if array.place != loaded[k])
    program = Program(
        tuple(dtypes),
        tuple(recorder.operations),
        stores,
        tuple(recorder.sums),
        len(recorder.numbers),
        n_scalars,
    )
    return Traced(program, tuple(recorder.numbers), result)


@final
class _Recorder:
    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.numbers: list[int] = []
        self.sums: list[int] = []

    def load(self, which: int, dtype: DType) -> int:
        return self.write("load", dtype, (which,))

    def scalar(self, which: int) -> int:
        return self.write("scalar", _DOUBLE, (which,))

    def write(self, name: str, dtype: DType, arguments: tuple[int, ...]) -> int:
        self.operations.append(Operation(name, dtype, arguments))
        return len(self.operations) - 1

    def number(self, value: Any, dtype: DType) -> int:
        """Take a number as NumPy would: in the dtype of the operation that it is for."""
        word = np.zeros(8, np.uint8)
        with np.errstate(all="ignore"):
            word[: dtype.itemsize] = np.asarray(value).astype(dtype).reshape(1).view(np.uint8)
        self.numbers.append(int(word.view(np.int64)[0]))
        return self.write("number", dtype, (len(self.numbers) - 1,))

    def cast(self, place: int, dtype: DType) -> int:
        source = self.operations[place].dtype
        if source == dtype:
            return place
        return self.write("cast", dtype, (place,))

    def operand(self, given: Any, dtype: DType) -> int:
        """Give an operand in the dtype of an operation."""
        if isinstance(given, Symbol):
            if given.place == _UNWRITTEN:
                raise UntraceableError("scratch memory that is read before it is written")
            return self.cast(given.place, dtype)
        return self.number(given, dtype)


def _is_number(given: Any) -> bool:
    return isinstance(given, (bool, int, float, np.bool_, np.integer, np.floating)) or (
        type(given) is np.ndarray and given.ndim == 0 and given.dtype.kind in "biuf"
    )


def _is_scalar(given: Any) -> bool:
    return _is_number(given) or (isinstance(given, Symbol) and given.is_scalar)


Operand: TypeAlias = "Symbol | float"


class Symbol(NDArrayOperatorsMixin):
    """Stands for a flat array while a function is traced, or for a number that a GPU will know."""

    ndim = 1
    size = SIZE
    shape = (SIZE,)

    def __init__(
        self,
        recorder: _Recorder,
        place: int,
        dtype: DType | None = None,
        *,
        is_scalar: bool = False,
    ) -> None:
        self._recorder = recorder
        self.place, self.is_scalar = place, is_scalar
        self.dtype: DType = recorder.operations[place].dtype if dtype is None else dtype

    def scratch(self, dtype: DType) -> Symbol:
        """Give one that stands for memory of any contents, in the same function."""
        return Symbol(self._recorder, _UNWRITTEN, dtype)

    # What NumPy calls -------------------------------------------------------------

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """Write down a ufunc."""
        if method == "reduce" and ufunc is np.add:
            return self._sum(inputs, options)
        out = options.pop("out", (None,))[0]
        dtype = options.pop("dtype", None)
        options.pop("casting", None)
        if method != "__call__" or options or ufunc not in _EXACT:
            raise UntraceableError(f"numpy.{ufunc.__name__} ({method}, {sorted(options)})")
        name, gives_bool = _EXACT[ufunc]
        loop = np.dtype(dtype) if dtype is not None else _common(inputs)
        _check_arithmetic(ufunc.__name__, loop)
        places = tuple(self._recorder.operand(given, loop) for given in inputs)
        place = self._recorder.write(name, _BOOL if gives_bool else loop, places)
        return self._give(place, out, is_scalar=all(map(_is_scalar, inputs)))

    def __array_function__(
        self, function: Callable[..., Any], types: Any, given: tuple[Any, ...], options: Any
    ) -> Any:
        """Write down one of the few functions that are no ufuncs."""
        if function is np.copyto:
            return _copy(*given, **options)
        if function is np.clip:
            return self._clip(*given, **options)
        if function is np.where and len(given) == 3 and not options:
            return self._where(*given)
        raise UntraceableError(f"numpy.{function.__name__}")

    # What functions do with arrays ------------------------------------------------

    def __getitem__(self, index: Any) -> Symbol:
        """Give itself: a piece from the first element on, as optimizers cut scratch memory."""
        if index is Ellipsis or (isinstance(index, slice) and _is_all(index)):
            return self
        raise UntraceableError(f"single elements, [{index!r}]")

    def __setitem__(self, index: Any, value: Any) -> None:
        """Replace all elements."""
        _copy(self[index], value)

    def __len__(self) -> int:
        return SIZE

    def __array__(self, *_: Any, **__: Any) -> Any:
        """Refuse: a symbol has no numbers."""
        raise UntraceableError("a NumPy function that reads the elements")

    def __bool__(self) -> bool:
        raise UntraceableError("a decision that depends on elements")

    def __float__(self) -> float:
        raise UntraceableError("a Python number made of elements")

    def reshape(self, *shape: Any) -> Symbol:
        """Give itself for a flat shape."""
        if shape in ((-1,), (SIZE,), ((-1,),), ((SIZE,),)):
            return self
        raise UntraceableError(f"another shape, {shape!r}")

    def astype(self, dtype: Any, **_: Any) -> Symbol:
        """Cast."""
        return Symbol(self._recorder, self._recorder.operand(self, _storable(np.dtype(dtype))))

    def copy(self) -> Symbol:
        """Give another symbol of the same value."""
        return Symbol(self._recorder, self.place, self.dtype)

    def fill(self, value: Any) -> None:
        """Set all elements to a number."""
        _copy(self, value)

    # Inside -----------------------------------------------------------------------

    def _give(self, place: int, out: Any, *, is_scalar: bool = False) -> Symbol:
        """Put a result into `out`, or into a new symbol."""
        if out is None:
            return Symbol(self._recorder, place, is_scalar=is_scalar)
        if not isinstance(out, Symbol):
            raise UntraceableError("an out that is none of the function's arrays")
        source = self._recorder.operations[place].dtype
        if not np.can_cast(_known(source), _known(out.dtype), "same_kind"):
            raise UntraceableError(f"{source.name} into {out.dtype.name}")
        out.place = self._recorder.cast(place, out.dtype)
        return out

    def _clip(self, array: Any, low: Any = None, high: Any = None, out: Any = None) -> Symbol:
        loop = _common([given for given in (array, low, high) if given is not None])
        _check_arithmetic("clip", loop)
        place = self._recorder.operand(array, loop)
        for name, limit in (("at_least", low), ("at_most", high)):
            if limit is not None:
                limit_place = self._recorder.operand(limit, loop)
                place = self._recorder.write(name, loop, (place, limit_place))
        return self._give(place, out)

    def _where(self, condition: Any, first: Any, second: Any) -> Symbol:
        loop = _common((first, second))
        _check_arithmetic("where", loop)
        places = [self._recorder.operand(condition, _BOOL)]
        places += [self._recorder.operand(given, loop) for given in (first, second)]
        return Symbol(self._recorder, self._recorder.write("select", loop, tuple(places)))

    def _sum(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Sum:
        (array,) = inputs
        is_plain = all(given in (None, 0, False, (None,)) for given in options.values())
        if array.is_scalar or not is_plain:
            raise UntraceableError(f"numpy.add.reduce with {sorted(options)}")
        _check_arithmetic("add.reduce", array.dtype)
        self._recorder.sums.append(self._recorder.operand(array, array.dtype))
        return Sum(len(self._recorder.sums) - 1)


def _copy(to: Any, value: Any, casting: str = "same_kind", where: Any = True) -> None:
    if where is not True or not isinstance(to, Symbol):
        raise UntraceableError("numpy.copyto of some elements, or into another array")
    if isinstance(value, Symbol):
        to.place = to._recorder.operand(value, to.dtype)
    elif _is_number(value):
        to.place = to._recorder.number(value, to.dtype)
    else:
        raise UntraceableError(f"numpy.copyto of a {type(value).__name__}")


def _is_all(index: slice) -> bool:
    return index.start in (None, 0) and index.stop in (None, SIZE) and index.step in (None, 1)


def _known(dtype: DType) -> DType:
    return np.dtype(np.float16) if is_small_float(dtype) else dtype


def _common(operands: Sequence[Any]) -> DType:
    """Give the dtype in which NumPy works; Python's own numbers do not widen it."""
    for given in operands:
        if not isinstance(given, Symbol) and not _is_number(given):
            raise UntraceableError(f"an operand of type {type(given).__name__}")
    arrays = [given for given in operands if isinstance(given, Symbol) and not given.is_scalar]
    dtypes = [given.dtype for given in arrays]
    if any(is_small_float(dtype) for dtype in dtypes):
        raise UntraceableError("arithmetic in 16 bits")
    numbers = [given for given in operands if not isinstance(given, Symbol)]
    if len(arrays) + len(numbers) < len(operands):
        numbers.append(1.0)  # for those that only the GPU will know, which are floats
    return np.result_type(*dtypes, *numbers)


def _check_arithmetic(name: str, dtype: DType) -> None:
    if dtype not in _ARITHMETIC:
        raise UntraceableError(f"{name} in {dtype.name}")


def _storable(dtype: DType) -> DType:
    if dtype not in _ARITHMETIC and dtype != _BOOL:
        raise UntraceableError(f"a cast to {dtype.name}")
    return dtype


def without_unused(program: Program) -> list[int]:
    """Give the places of the operations that what is stored or summed depends on, in order."""
    needed = {place for _, place in program.stores} | set(program.sums)
    for place in range(len(program.operations) - 1, -1, -1):
        operation = program.operations[place]
        if place in needed and operation.name not in _GIVEN:
            needed.update(operation.arguments)
    return sorted(needed, key=operator.index)


def same_for_all(program: Program) -> set[int]:
    """Give the places of the operations whose results are the same for all elements."""
    places: set[int] = set()
    for place, operation in enumerate(program.operations):
        if operation.name in ("number", "scalar") or (
            operation.name != "load" and places.issuperset(operation.arguments)
        ):
            places.add(place)
    return places
