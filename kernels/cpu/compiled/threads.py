"""How a compiled kernel gets its arguments and its threads.

The threads are torch's own: `GOMP_parallel` of the OpenMP library that torch has loaded is called with the kernel's
address. A pool beside torch's (as numba's own parallel loops have) would fight it for the cores: its idle threads spin
while torch computes, and torch's while it does.

A kernel is declared with the structure of its arguments and runs once on each thread that OpenMP grants, which may be
fewer than were asked for: each takes every so-many-th share of the work.

    Arguments = structure("Arguments", out=ADDRESS, num_rows=COUNT)

    @kernel(Arguments)
    def fill(pointer):
        given = carray(pointer, 1)[0]
        for part in range(this_thread(), given.num_shares, num_threads()):
            first, end = share(given.num_rows, part, given.num_shares)
            ...

    fill(out.data_ptr(), num_rows, work=num_rows * width)

Addresses are integers; `bits_at` and its like make arrays of them inside a kernel. A kernel never allocates what Python
sees. numba keeps machine code by the file that a kernel stands in; what is inlined into it stands elsewhere, so the
folder of the cache is named by a digest of this whole package.
"""

import ctypes
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding
from numba import types
from numba.extending import intrinsic

ADDRESS = COUNT = ctypes.c_int64
NUMBER = ctypes.c_float
_TYPES = {ctypes.c_int64: types.int64, ctypes.c_float: types.float32}

OPTIONS = {
    # Sums may be reordered and multiplications fused, by one rule for all rows; NaNs and infinities stay what they are.
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "error_model": "numpy",
}
inlined = numba.njit(inline="always", **OPTIONS)
"""A part of a kernel. It sees the constants of its caller as constants, which a call would hide from the compiler."""

WORTH_A_THREAD = 8192
"""Elements below which waking another thread costs more than it spares."""

_openmp = ctypes.CDLL("libgomp.so.1")  # torch's, by its name; raises OSError where torch has another one
_parallel = _openmp.GOMP_parallel
_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_parallel.restype = None
for _name in ("omp_get_thread_num", "omp_get_num_threads"):
    binding.add_symbol(_name, ctypes.cast(getattr(_openmp, _name), ctypes.c_void_p).value)
_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


def _digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


numba.config.CACHE_DIR = str(Path(numba.config.CACHE_DIR or Path(__file__).parent / "__pycache__") / _digest())


def has_multiply_add() -> bool:
    features = binding.get_host_cpu_features()
    return "fma" not in features or bool(features["fma"])  # a processor that is no x86 has it under other names


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """The arguments of a kernel, in order; `num_shares`, the number of threads that share the work, comes last."""
    return type(name, (ctypes.Structure,), {"_fields_": [*fields.items(), ("num_shares", COUNT)]})


def kernel(arguments: type[ctypes.Structure]) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Compiles a function of a pointer to `arguments`; the result takes their values in order."""
    record = types.Record.make_c_struct([(name, _TYPES[kind]) for name, kind in arguments._fields_])
    signature = types.void(types.CPointer(record))

    def decorate(body: Callable[[Any], None]) -> Callable[..., None]:
        try:
            compiled = numba.cfunc(signature, cache=True, **OPTIONS)(body)
        except (RuntimeError, OSError):  # no folder that can be written: every process compiles for itself
            compiled = numba.cfunc(signature, **OPTIONS)(body)
        alone = compiled.ctypes

        def run(*values: float, work: int = 0, num_shares: int = 0) -> None:
            """`work` is the number of elements to touch: little work stays on the calling thread. Or `num_shares`."""
            num_shares = num_shares or max(1, min(torch.get_num_threads(), work // WORTH_A_THREAD))
            given = arguments(*values, num_shares)
            if num_shares == 1:
                alone(ctypes.addressof(given))
            else:
                _parallel(compiled.address, ctypes.addressof(given), num_shares, 0)

        return run

    return decorate


@inlined
def share(num_items, part, num_shares):
    """The first and the last + 1 of the items of one share."""
    return num_items * part // num_shares, num_items * (part + 1) // num_shares


@inlined
def this_thread():
    return np.int64(_thread_num())


@inlined
def num_threads():
    """Of those that run this kernel: as many as OpenMP granted."""
    return np.int64(_num_threads())


@intrinsic
def _pointer(typing, address, like):
    """An address as a pointer to numbers of the type of `like`."""

    def write(context, builder, signature, given):
        return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), write


@inlined
def bits_at(address, shape):
    """The bfloat16 numbers at an address, as their bits: uint16 of this shape."""
    return numba.carray(_pointer(address, types.uint16), shape)


@inlined
def float32_at(address, shape):
    return numba.carray(_pointer(address, types.float32), shape)


@inlined
def int64_at(address, shape):
    return numba.carray(_pointer(address, types.int64), shape)


@inlined
def int32_at(address, shape):
    return numba.carray(_pointer(address, types.int32), shape)
