"""Fetching the tensors of a session where they lie, without a copy.

`session.run` copies each tensor that it hands to Python (TF_TensorToPyArray in tensorflow/python/lib/core): as much
memory again as the variables take, and the time to fill it. The C API that it calls (tensorflow/c/c_api.h) hands out
the tensors themselves, and TensorFlow's shared libraries export it. The C++ objects behind a session and its ops are
asked for by the protocol that pybind11 has for other extension modules, which gives them only as the type that they
are. Where any of this is not to be had, and for the outputs of ops that give strings, `session.run` does it.
"""

from __future__ import annotations

import builtins
import ctypes
import functools
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_ckpt.frontends.tensorflow.variants import is_variant, read_variants

logger = logging.getLogger(__name__)

_ABI = re.compile(r"__pybind11_internals_v\d+(\w+?)__")
"""The name under which pybind11 keeps its types in a process; it ends with the id of the compiler's ABI."""

_POINTER = b"raw_pointer_ephemeral"
_TYPE_INFO = b"St9type_info"
_SESSION = b"10TF_Session"
_OPERATION = b"12TF_Operation"
"""Mangled names of C++ types."""


class Fetch:
    """Gets the values of the same tensors of one session again and again.

    Arrays are read-only views of TensorFlow's memory where possible: drop them before the next step is run, as it may
    change what they show (ref variables) or have to copy it first (resource variables).
    """

    def __init__(self, session: Any, tensors: Sequence[Any]) -> None:
        self._session = session
        self._tensors = list(tensors)
        # What one op gives belongs together, the keys and values of a table for one: it comes from one run.
        others = {t.op for t in tensors if not _is_plain(t)}
        self._is_plain = [t.op not in others for t in tensors]
        self._direct = _Direct.of(session, [t for t, plain in zip(tensors, self._is_plain, strict=True) if plain])

    def __call__(self) -> list[Any]:
        """The values in the order of the tensors, scalars as numpy's. Raises what `session.run` does."""
        arrays = self._direct.run() if self._direct else None
        direct = self._is_plain if arrays is not None else [False] * len(self._tensors)
        tensors = list(zip(self._tensors, direct, strict=True))
        run = [t for t, is_direct in tensors if not is_direct and not is_variant(t)]
        found = {True: iter(arrays or ()), False: iter(self._session.run(run))}
        variants = iter(read_variants(self._session, [t for t in self._tensors if is_variant(t)]))
        return [next(variants if is_variant(t) else found[is_direct]) for t, is_direct in tensors]


def _is_plain(tensor: Any) -> bool:
    """Whether the elements lie in memory as numpy has them."""
    dtype = tensor.dtype.base_dtype
    return dtype.name not in ("string", "resource", "variant") and not dtype.is_quantized


class _TypeInfo(ctypes.Structure):
    """A std::type_info: its virtual table, which nobody uses here, and the name by which types are compared."""

    _fields_ = (("vtable", ctypes.c_void_p), ("name", ctypes.c_char_p))


class _Output(ctypes.Structure):
    """A TF_Output: which output of which op."""

    _fields_ = (("oper", ctypes.c_void_p), ("index", ctypes.c_int))


class _Memory:
    """Owns one TF_Tensor; numpy arrays made of it keep it."""

    def __init__(self, api: _Api, tensor: int) -> None:
        self._api, self._tensor = api, tensor
        self.nbytes: int = api.TF_TensorByteSize(tensor)
        read_only = True
        self.__array_interface__ = {
            "version": 3,
            "data": (api.TF_TensorData(tensor) or 0, read_only),
            "shape": (self.nbytes,),
            "typestr": "|u1",
        }

    def __del__(self) -> None:
        self._api.TF_DeleteTensor(self._tensor)


class _Direct:
    """Runs a session by the C API."""

    def __init__(self, api: _Api, session: Any, pointers: Sequence[int], tensors: Sequence[Any]) -> None:
        self._api = api
        self._session = session
        self._dtypes = [np.dtype(t.dtype.base_dtype.as_numpy_dtype) for t in tensors]
        self._outputs = (_Output * len(tensors))(
            *(_Output(pointer, t.value_index) for pointer, t in zip(pointers, tensors, strict=True))
        )

    @classmethod
    def of(cls, session: Any, tensors: Sequence[Any]) -> _Direct | None:
        """None where the session is none of TensorFlow's own, or this build of TensorFlow does not offer it."""
        import tensorflow as tf

        api = _api()
        is_plain = getattr(session.run, "__func__", None) is tf.compat.v1.Session.run
        if api is None or not is_plain or not tensors:
            return None
        pointers = [_pointer(t.op._c_op, _OPERATION) for t in tensors]
        found = [pointer for pointer in pointers if pointer]
        if len(found) < len(tensors):
            logger.info("tensors are fetched by session.run, which copies them: pybind11 does not tell where ops lie")
            return None
        return cls(api, session, found, tensors)

    def run(self) -> list[Any] | None:
        """The arrays; None if it failed: `session.run` then says why."""
        session = _pointer(self._session._session, _SESSION)
        if session is None:
            return None
        # What was added to the graph since the last run.
        self._session._extend_graph()
        count = len(self._outputs)
        tensors = (ctypes.c_void_p * count)()
        if not self._api.run(session, self._outputs, tensors, count):
            return None
        memories = [_Memory(self._api, tensor) for tensor in tensors if tensor]
        if len(memories) < count:
            return None
        return [self._array(i, tensors[i], memory) for i, memory in enumerate(memories)]

    def _array(self, i: int, tensor: Any, memory: _Memory) -> Any:
        shape = tuple(self._api.TF_Dim(tensor, axis) for axis in range(self._api.TF_NumDims(tensor)))
        dtype = self._dtypes[i]
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        array = np.asarray(memory).view(dtype).reshape(shape)
        return array if shape else array[()]


class _Api:
    """The functions of TensorFlow's C API that are needed, from the libraries that this process has loaded.

    Raises `OSError` or `AttributeError` where they are not there.
    """

    def __init__(self, folder: Path) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int
        # A library that is not loaded yet would be a second TensorFlow.
        libraries = [
            ctypes.CDLL(str(folder / name), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
            for name in ("libtensorflow_cc.so.2", "libtensorflow_framework.so.2")
        ]

        def function(name: str, result: Any, *arguments: Any) -> Any:
            found = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
            if found is None:
                raise AttributeError(name)
            found.restype, found.argtypes = result, arguments
            return found

        feeds = (pointer, pointer, number)
        targets = (pointer, number)
        outputs = (pointer, pointer, number)
        self._session_run = function(
            "TF_SessionRun", None, pointer, pointer, *feeds, *outputs, *targets, pointer, pointer
        )
        self._new_status = function("TF_NewStatus", pointer)
        self._get_code = function("TF_GetCode", number, pointer)
        self._delete_status = function("TF_DeleteStatus", None, pointer)
        self.TF_TensorData = function("TF_TensorData", pointer, pointer)
        self.TF_TensorByteSize = function("TF_TensorByteSize", ctypes.c_size_t, pointer)
        self.TF_NumDims = function("TF_NumDims", number, pointer)
        self.TF_Dim = function("TF_Dim", ctypes.c_int64, pointer, number)
        self.TF_DeleteTensor = function("TF_DeleteTensor", None, pointer)

    def run(self, session: int, outputs: Any, tensors: Any, count: int) -> bool:
        """Fill ``tensors`` with the outputs' values; whether it went well."""
        status = self._new_status()
        try:
            self._session_run(session, None, None, None, 0, outputs, tensors, count, None, 0, None, status)
            return bool(self._get_code(status) == 0)
        finally:
            self._delete_status(status)


@functools.lru_cache(maxsize=1)
def _api() -> _Api | None:
    import tensorflow as tf

    try:
        return _Api(Path(tf.sysconfig.get_lib()))
    except (OSError, AttributeError) as error:
        logger.info("tensors are fetched by session.run, which copies them: no C API in this TensorFlow (%s)", error)
        return None


@functools.lru_cache(maxsize=1)
def _python() -> ctypes.PyDLL:
    """The functions of Python's C API that are needed, apart from `ctypes.pythonapi`, which others set up too."""
    python = ctypes.PyDLL(None)
    python.PyInterpreterState_Get.restype = ctypes.c_void_p
    python.PyInterpreterState_GetDict.restype = ctypes.py_object
    python.PyInterpreterState_GetDict.argtypes = (ctypes.c_void_p,)
    python.PyCapsule_New.restype = ctypes.py_object
    python.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    return python


@functools.lru_cache(maxsize=1)
def _abis() -> list[bytes]:
    """The ids of the ABIs that extension modules of this process were built for."""
    python = _python()
    names = {*vars(builtins), *python.PyInterpreterState_GetDict(python.PyInterpreterState_Get())}
    matches = filter(None, (_ABI.fullmatch(name) for name in names if isinstance(name, str)))
    return sorted({match[1].encode() for match in matches})


def _pointer(instance: Any, kind: bytes) -> int | None:
    """Where the C++ object behind a Python one lies; None unless it is of this type."""
    conduit = getattr(instance, "_pybind11_conduit_v1_", None)
    if conduit is None:
        return None
    info = _TypeInfo(None, kind)
    wanted = _python().PyCapsule_New(ctypes.addressof(info), _TYPE_INFO, None)
    for abi in _abis():
        found = conduit(abi, wanted, _POINTER)
        if found is not None:
            # The capsule is named after the type.
            pointer: int | None = _python().PyCapsule_GetPointer(found, kind)
            return pointer
    return None
