"""Arrays that behave like cupy's without a GPU: numpy's functions work on them by its protocols and nothing else does.

Whatever would move data without being asked to, or mix arrays of two places, raises TypeError, as with cupy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

METHODS = ("any", "all", "astype", "copy", "max", "mean", "min", "ravel", "reshape", "sum", "transpose", "view")
ATTRIBUTES = ("dtype", "itemsize", "nbytes", "ndim", "shape", "size")
CREATE = {np.asarray, np.zeros, np.empty, np.full, np.eye, np.tri}  # with like=: these may read arrays in memory


class Foreign(np.lib.mixins.NDArrayOperatorsMixin):
    """An array somewhere else. used: the names of the functions that were called on such arrays."""

    __hash__ = None  # type: ignore[assignment]
    used: ClassVar[set[str]] = set()

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self._values = values

    def get(self) -> np.ndarray[Any, Any]:
        """The way back to memory, cupy's."""
        return self._values.copy()

    def __array__(self, *_: object, **__: object) -> np.ndarray[Any, Any]:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or "where" in kwargs:
            raise TypeError(f"{ufunc.__name__}: cupy has not everything of this")
        type(self).used.add(ufunc.__name__)
        return _wrapped(ufunc(*map(_operand, inputs), **{name: _inside(one) for name, one in kwargs.items()}))

    def __array_function__(self, func: Callable[..., Any], types: object, args: Any, kwargs: Any) -> Any:
        type(self).used.add(f"{func.__module__}.{func.__name__}".removeprefix("numpy."))
        inside = _moved if func in CREATE else _inside
        result = func(*[inside(one) for one in args], **{name: inside(one) for name, one in kwargs.items()})
        return _wrapped(result)

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES:
            return getattr(self._values, name)
        if name == "T":
            return Foreign(self._values.T)
        if name in METHODS:
            type(self).used.add(f"ndarray.{name}")
            method = getattr(self._values, name)
            return lambda *args, **kwargs: _wrapped(method(*map(_inside, args), **kwargs))
        raise AttributeError(f"cupy's arrays are not known to have {name}")

    def __getitem__(self, index: Any) -> Foreign:
        return Foreign(np.asarray(self._values[_index(index)]))

    def __setitem__(self, index: Any, value: Any) -> None:
        self._values[_index(index)] = _operand(value)

    def __len__(self) -> int:
        return len(self._values)

    def __bool__(self) -> bool:
        return bool(self._values)

    def __float__(self) -> float:
        return float(self._values)


def _index(index: Any) -> Any:
    return tuple(map(_operand, index)) if isinstance(index, tuple) else _operand(index)


def _operand(value: Any) -> Any:
    """A number, or a foreign array's values."""
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return _inside(value)


def _inside(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(value, tuple | list):
        return type(value)(map(_inside, value))
    return _moved(value)


def _moved(value: Any) -> Any:
    return value._values if isinstance(value, Foreign) else value


def _wrapped(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return Foreign(np.asarray(value))
    if isinstance(value, tuple | list):
        return tuple(_wrapped(one) for one in value)
    return value
