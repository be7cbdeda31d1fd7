"""Makes Triton's interpreter compute what the GPU computes.

Under ``TRITON_INTERPRET=1`` Triton runs kernels in NumPy, one program after the other. Triton 3.6 to 3.9 get some of
the arithmetic wrong, or raise where a kernel is right. :func:`install` mends what follows and leaves the rest alone; it
is called before the first backend in Triton is loaded:

* bfloat16 is held in uint16 arrays. Arithmetic, comparisons, products, clamps, reductions and casts work on the bits
  as if they were integers, and float32 is cut off rather than rounded to nearest even.
* NumPy warns of overflow and of ``inf - inf``, in masked lanes too, where a GPU is silent. Only interpreted kernels
  are silenced, not the code around them.
* A maximum or minimum of nothing but NaN warns; ``tl.maximum`` hands on a NaN that the hardware drops (3.6).
* ``tl.umulhi`` of signed integers multiplies them as signed (3.6).
* A loop bound that is a tensor goes through a conversion that NumPy deprecates (3.6); ``bool`` arguments and bfloat16
  constants raise (3.6).
* Every call of a jit helper patches ``triton.language`` anew, which takes most of the time of a small kernel, and
  leaves it patched when the kernel is over, which breaks a later compilation in the same process. Once a launch is
  enough, and undone at its end.
* Overflow checks of integer arithmetic are computed and then dropped, because ``debug`` is off.
* Launches from several threads share one grid position and one patched ``triton.language``: they take turns.

float8 is left as Triton has it, and ``atomic_add`` on bfloat16 still raises. On a GPU, or without Triton, nothing is
changed.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from iokernels.runtime.scoped import Scoped

__all__ = ["active", "install", "shuffled_blocks"]


def active() -> bool:
    """Whether Triton is installed and interprets the kernels that are decorated from now on."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


@functools.cache
def install() -> None:
    """Mend the interpreter for the rest of the process. Does nothing where Triton compiles, or a second time."""
    if not active():
        return
    from triton.runtime import interpreter

    _mend_casts(interpreter)
    _mend_arithmetic(interpreter)
    _mend_reductions(interpreter)
    _mend_arguments(interpreter)
    _mend_launches(interpreter)


@contextmanager
def shuffled_blocks(seed: int) -> Iterator[None]:
    """Run the thread blocks of every launch inside in a random order, as a GPU may: each once, another order a launch.

    The interpreter runs one block after the other, in the order of the grid, so a kernel that needs blocks to finish in
    that order would pass there, and a merge whose bits depend on who came last would look deterministic.

    Raises:
        RuntimeError: Triton compiles its kernels (``TRITON_INTERPRET`` was not set), or is not installed.
    """
    if not active():
        raise RuntimeError("only interpreted kernels have an order: set TRITON_INTERPRET=1 before Triton is imported")
    with _shuffled.set(random.Random(seed)):
        yield


@functools.cache
def _true_order() -> tuple[Callable[..., None], Callable[..., None]]:
    from triton.runtime import interpreter

    return interpreter.interpreter_builder.set_grid_dim, interpreter.interpreter_builder.set_grid_idx


def _shuffle(numbers: random.Random | None) -> None:
    """Have the interpreter take blocks in an order by these random numbers; in that of the grid if None."""
    from triton.runtime import interpreter

    builder: Any = interpreter.interpreter_builder
    set_grid, set_block = _true_order()
    order = list[int]()

    def set_shuffled_grid(*grid: int) -> None:
        assert numbers is not None
        order[:] = range(grid[0] * grid[1] * grid[2])
        numbers.shuffle(order)
        set_grid(*grid)

    def set_shuffled_block(x: int, y: int, z: int) -> None:
        _, ny, nz = builder.grid_dim
        rest, z = divmod(order[(x * ny + y) * nz + z], nz)
        set_block(*divmod(rest, ny), z)

    if numbers is None:
        builder.set_grid_dim, builder.set_grid_idx = set_grid, set_block
    else:
        builder.set_grid_dim, builder.set_grid_idx = set_shuffled_grid, set_shuffled_block


_shuffled: Scoped[random.Random | None] = Scoped(None, changed=_shuffle)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 numbers held as uint16, exactly."""
    return np.asarray(np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray, *, nearest: bool = True) -> np.ndarray:
    """The bits, uint16, of the nearest bfloat16 numbers, ties to even; or cut off, if not ``nearest``."""
    values = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values))
    bits = values.view(np.uint32)
    # Adding just under half a unit in the last place carries into the exponent, and into infinity, as it should.
    half = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF) if nearest else np.uint32(0)
    # The carry would turn some NaN into infinity or zero.
    rounded = np.where(np.isnan(values), np.uint32(0x7FC00000), bits + half)
    return (rounded >> np.uint32(16)).astype(np.uint16)


def _is_bfloat16(handle: Any) -> bool:
    # Comparisons keep the type of their operands beside boolean data, so the type alone does not tell.
    return handle.dtype.scalar.is_bf16() and handle.data.dtype == np.uint16


def _mend_casts(interpreter: Any) -> None:
    builder, handle, tl = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.tl
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if _is_bfloat16(src):
            src = handle(bfloat16_to_float32(src.data), tl.float32)
        if dst_type.scalar.is_bf16():
            return handle(float32_to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if src.dtype.scalar.is_fp8() or dst_type.scalar.is_fp8():
            return convert(self, src, dst_type, rounding_mode)
        if dst_type.scalar.is_bf16() and rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return handle(float32_to_bfloat16(src.data, nearest=False), tl.bfloat16)
        if src.dtype.scalar.is_bf16() or dst_type.scalar.is_bf16():
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def get_bf16(self: Any, value: float) -> Any:
        return handle(float32_to_bfloat16(np.array([value], dtype=np.float32)), tl.bfloat16)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.get_bf16 = get_bf16


def _mend_arithmetic(interpreter: Any) -> None:
    builder, handle, tl = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.tl

    def widen(operand: Any) -> Any:
        return handle(bfloat16_to_float32(operand.data), tl.float32) if _is_bfloat16(operand) else operand

    def narrow(result: Any) -> Any:
        if result.data.dtype == np.bool_:
            return handle(result.data, tl.int1)
        return handle(float32_to_bfloat16(result.data), tl.bfloat16)

    def through_float32(method: Callable[..., Any], operands: int) -> Callable[..., Any]:
        @functools.wraps(method)
        def mended(self: Any, *args: Any) -> Any:
            if not any(_is_bfloat16(operand) for operand in args[:operands]):
                return method(self, *args)
            return narrow(method(self, *map(widen, args[:operands]), *args[operands:]))

        return mended

    for name, operands in {
        "binary_op": 2,
        "unary_op": 1,
        "create_fma": 3,
        "create_rsqrt": 1,
        "create_clampf": 3,
    }.items():
        setattr(builder, name, through_float32(getattr(builder, name), operands))

    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        return dot(self, widen(a), widen(b), d, *precision)

    multiply_high = builder.create_umulhi

    def create_umulhi(self: Any, lhs: Any, rhs: Any) -> Any:
        signed = lhs.data.dtype
        unsigned = np.dtype(f"u{signed.itemsize}")
        product = multiply_high(self, *(handle(x.data.view(unsigned), x.dtype) for x in (lhs, rhs)))
        return handle(product.data.view(signed), lhs.dtype.scalar)

    builder.create_dot = create_dot
    builder.create_umulhi = create_umulhi
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)

    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=options.debug)


def _mend_reductions(interpreter: Any) -> None:
    reductions, tl = interpreter.ReduceOps, interpreter.tl
    min_max = reductions.min_max
    # The same functions, but NaN for a slice of nothing but NaN, without a warning.
    quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}

    def mended_min_max(self: Any, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        return min_max(self, input, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    def retyped(tensor: Any, data: np.ndarray, dtype: Any) -> Any:
        type = tl.block_type(dtype, list(tensor.shape)) if tensor.shape else dtype
        return tl.core.tensor(interpreter.TensorHandle(data, dtype), type)

    def through_float32(apply_impl: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(apply_impl)
        def mended(self: Any, input: tuple[Any, ...]) -> Any:
            narrow = [_is_bfloat16(tensor.handle) for tensor in input]
            if not any(narrow):
                return apply_impl(self, input)
            wide = tuple(
                retyped(tensor, bfloat16_to_float32(tensor.handle.data), tl.float32) if is_narrow else tensor
                for tensor, is_narrow in zip(input, narrow, strict=True)
            )
            results = apply_impl(self, wide)
            results = results if isinstance(results, (list, tuple)) else [results]
            return [
                retyped(tensor, float32_to_bfloat16(tensor.handle.data), tl.bfloat16) if is_narrow else tensor
                for tensor, is_narrow in zip(results, narrow, strict=True)
            ]

        return mended

    reductions.min_max = mended_min_max
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = through_float32(operation.apply_impl)


def _mend_arguments(interpreter: Any) -> None:
    convert, tl = interpreter._implicit_cvt, interpreter.tl

    def implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, bool):
            return tl.tensor(interpreter.TensorHandle(np.array([arg]), tl.int1), tl.int1)
        return convert(arg)

    interpreter._implicit_cvt = implicit_cvt


class _Launch:
    """What one kernel launch has patched in ``triton.language``."""

    def __init__(self) -> None:
        self.languages: set[int] = set()
        self.scopes: list[Any] = []

    def restore(self) -> None:
        while self.scopes:
            self.scopes.pop().restore()


def _mend_launches(interpreter: Any) -> None:
    tl, executor = interpreter.tl, interpreter.GridExecutor
    patch_lang, call = interpreter._patch_lang, executor.__call__
    launches: list[_Launch] = []
    turn = threading.RLock()  # a launch may come from within one: from a hook, or a tensor's finaliser

    def patch_once(fn: Any) -> Any:
        if not launches:
            return patch_lang(fn)
        launch = launches[-1]
        languages = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if not languages or not languages <= launch.languages:
            scope = patch_lang(fn)
            scope.set_attr(tl.core.tensor, "__index__", lambda self: int(self.handle.data.item()))
            launch.scopes.append(scope)
            launch.languages |= languages
        # The launch restores; the executor, which would restore in the middle of the stack, gets an empty scope.
        return interpreter._LangPatchScope()

    def launch_quietly(self: Any, *args: Any, **kwargs: Any) -> Any:
        with turn:
            launches.append(_Launch())
            try:
                with np.errstate(all="ignore"):
                    return call(self, *args, **kwargs)
            finally:
                launches.pop().restore()

    interpreter._patch_lang = patch_once
    executor.__call__ = launch_quietly
