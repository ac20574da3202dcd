"""What a numeric kernel is here, and the few instructions that kernels share.

A kernel is a function over arrays that numba compiles: it releases the GIL, allocates little, raises nothing, and is
compiled once per installation (numba keeps the machine code beside the source, in __pycache__). A checked wrapper
calls it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

U = np.uint64

_HERE = Path(__file__).parent
_INLINED = tuple(
    (file.stat().st_mtime_ns, file.stat().st_size)
    for file in (_HERE / "kernels.py", _HERE / "rows.py", _HERE / "keys.py", _HERE / "storage" / "index.py")
)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on first call, keep on disk, run without the GIL."""
    try:
        compiled: Any = njit(nogil=True, cache=True)(function)
        # numba looks at a kernel's own file only, but helpers of these are inlined into kernels of others
        kept = compiled._cache._cache_file
        kept._source_stamp = (kept._source_stamp, _INLINED)
        return compiled
    except RuntimeError:  # no place to keep it: a read-only installation, a user without a home. Every start compiles
        return njit(nogil=True)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A helper that becomes part of the kernels that call it."""
    return njit(inline="always")(function)


def _prefetch(typingctx: Any, address: Any) -> Any:
    """Ask the CPU to bring the cache line of an address. No address is wrong: nothing is read.

    LLVM's llvm.prefetch (address, 0 = for reading, 3 = keep in all cache levels, 1 = data cache).
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i8, i32 = ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
        instruction: Any = cgutils.get_or_insert_function  # type: ignore[assignment,unused-ignore]
        builder.call(
            instruction(builder.module, kind, "llvm.prefetch.p0"),
            [builder.inttoptr(args[0], i8.as_pointer()), *(ir.Constant(i32, value) for value in (0, 3, 1))],
        )
        return context.get_dummy_value()

    return types.void(types.uint64), codegen


def _load(typingctx: Any, size: Any, address: Any) -> Any:
    """The little-endian number of 8 * `size` bits (a literal: 1, 2, 4 or 8 bytes) at an address, as uint64."""
    bits = 8 * size.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[1], ir.IntType(bits).as_pointer()))
        value.align = 1
        return builder.zext(value, ir.IntType(64)) if bits < 64 else value

    return types.uint64(size, types.uint64), codegen


def _store_key(typingctx: Any, address: Any, key: Any) -> Any:
    """Write a key's 8 bytes to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], ir.IntType(64).as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), codegen


def _clear(typingctx: Any, address: Any, size: Any) -> Any:
    """Set `size` bytes at an address to zero."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        fill: Any = cgutils.memset  # type: ignore[assignment,unused-ignore]
        fill(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), codegen


# Kernels that move bytes work on addresses (uint64: array.ctypes.data, plus an offset), so that rows of a mapped file
# and rows in memory are the same to them. Whoever passes the arrays in keeps them alive and has checked what points
# where.
prefetch: Any = intrinsic(_prefetch)
load: Any = intrinsic(prefer_literal=True)(_load)
store_key: Any = intrinsic(_store_key)
clear: Any = intrinsic(_clear)


@inlined
def mix(h: np.uint64) -> np.uint64:
    """MurmurHash3's 64-bit finaliser: every input bit reaches every output bit, and no two inputs collide."""
    h ^= h >> U(33)
    h *= U(0xFF51AFD7ED558CCD)
    h ^= h >> U(33)
    h *= U(0xC4CEB9FE1A85EC53)
    return h ^ (h >> U(33))


@inlined
def scaled(h: np.uint64, n: np.uint64) -> np.uint64:
    """floor(h * n / 2**64) for n < 2**32: a hash becomes a number below n without a division (Lemire 2016)."""
    return ((h >> U(32)) * n + (((h & U(0xFFFFFFFF)) * n) >> U(32))) >> U(32)


def warm(kernels: list[Any], run: Callable[[], object], say: Callable[[str], None]) -> None:
    """Run `run`, which calls each of `kernels`, so that no request waits for a compiler; `say` so if one has to run."""
    cold = [k for k in kernels if not (k._cache.cache_path and _is_kept(Path(k._cache.cache_path), k.__name__))]
    if cold:
        say(f"compiling {len(cold)} kernels, once per installation (NUMBA_CACHE_DIR says where they are kept)")
    begin = time.perf_counter()
    run()
    if cold or any(k.stats.cache_misses for k in kernels):  # kept, but for other arguments or older sources
        say(f"compiled in {time.perf_counter() - begin:.1f} s")


def _is_kept(directory: Path, name: str) -> bool:
    """Whether numba's index of a compiled kernel lies in a directory."""
    return any(directory.glob(f"*.{name}-*.nbi"))
