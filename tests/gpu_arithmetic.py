"""float32 in Triton's interpreter as an NVIDIA GPU computes it.

Compiled, some operations become instructions that take subnormals for 0, or that round less well than numpy, by which
the interpreter computes. Here they are evaluated as the manual of PTX describes them, with errors of every size that it
allows. test_sass.py compiles `every_operation`, and compares its instructions with those of `MODELS`. Float64 and what
is not listed stays numpy's; operations that are not described yet are refused.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import triton
import triton.language as tl

TINY, MAX = np.finfo(np.float32).tiny, np.finfo(np.float32).max
_SIGN = np.int32(-(2**31))
_LOG2_E = np.float32(1.4426950408889634)


def flushed(v: np.ndarray) -> np.ndarray:
    """v with zeros of its sign for subnormals."""
    return np.where(np.abs(v) < TINY, np.copysign(np.float32(0), v), v)


def off(result: np.ndarray, most: int, *operands: np.ndarray) -> np.ndarray:
    """float32 numbers up to `most` ulps beside a result in float64. The error depends on the operands' bits alone."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(result).astype(np.float32)
        mixed = sum(np.asarray(v, np.float32).view(np.uint32) for v in operands) * np.uint32(2654435761)
    error = (mixed >> 20).astype(np.int64) % (2 * most + 1) - most
    word = rounded.view(np.int32)
    moved = np.clip((word & ~_SIGN) + error, 0, MAX.view(np.int32)).astype(np.int32)
    return np.where((rounded != 0) & np.isfinite(rounded), (moved | (word & _SIGN)).view(np.float32), rounded)


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Within 2 ulps. A divisor known to the compiler, here any that a whole block shares, may be replaced by such an
    inverse of it."""
    inverse = off(np.divide(1, b, dtype=np.float64), 2, b)
    if np.size(b) and np.all(b == np.ravel(b)[0]) and TINY <= np.abs(inverse).max() <= MAX:
        return a * inverse
    return off(np.divide(a, b, dtype=np.float64), 2, a, b)


def power_of_two(v: np.ndarray) -> np.ndarray:
    return off(np.exp2(v, dtype=np.float64), 2, v)


class Model(NamedTuple):
    instructions: tuple[str, ...]  # those that flush or approximate
    function: Callable[..., np.ndarray]


MODELS = {  # by the name of the interpreter's operation, create_...
    "ceil": Model(("cvt.rpi.ftz.f32.f32",), lambda v: np.ceil(flushed(v))),
    "floor": Model(("cvt.rmi.ftz.f32.f32",), lambda v: np.floor(flushed(v))),
    "fdiv": Model(("div.full.f32", "div.approx.f32"), divided),
    "exp": Model(("ex2.approx.f32",), lambda v: power_of_two(v * _LOG2_E)),
    "exp2": Model(("ex2.approx.ftz.f32",), lambda v: flushed(power_of_two(flushed(v)))),
    "sqrt": Model(("sqrt.approx.ftz.f32",), lambda v: off(np.sqrt(flushed(v), dtype=np.float64), 1, v)),
    "rsqrt": Model(("rsqrt.approx.ftz.f32",), lambda v: off(1 / np.sqrt(flushed(v), dtype=np.float64), 1, v)),
}
REFUSED = ("approx_divf", "log", "log2", "sin", "cos", "erf")


@triton.jit
def every_operation(x_ptr, y_ptr, out_ptr):
    """One of each that MODELS holds."""
    at = tl.arange(0, 128)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    out = out_ptr + at
    tl.store(out, tl.ceil(x))
    tl.store(out + 128, tl.floor(x))
    tl.store(out + 256, x / y)
    tl.store(out + 384, x / 3)
    tl.store(out + 512, tl.exp(x))
    tl.store(out + 640, tl.exp2(x))
    tl.store(out + 768, tl.sqrt(x))
    tl.store(out + 896, tl.rsqrt(x))


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Triton's interpreter computes by MODELS, and where they are taken out, as it does without.

    It leaves out what takes most of its time: it replaces the functions of triton.language by its own once, not anew in
    each launch and call of a function; looks for no overflow of integers, of which it tells no one unless asked to
    debug; and makes the table of dtypes, the type of a block and the shape of a tensor once, not anew for each tensor.
    """
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def modelled(name: str) -> Callable:
        own = getattr(InterpreterBuilder, f"create_{name}")

        def create(builder, *arguments):
            model = MODELS.get(name)
            if model is None or arguments[0].data.dtype != np.float32:
                return own(builder, *arguments)
            with np.errstate(all="ignore"):
                return TensorHandle(model.function(*(each.data for each in arguments)), arguments[0].dtype.scalar)

        return create

    def refused(name: str) -> Callable:
        def create(builder, *arguments):
            raise NotImplementedError(f"{name} has no entry in gpu_arithmetic.MODELS")

        return create

    of_scalar = functools.cache(interpreter._get_np_dtype)

    def numpy_dtype(of: tl.dtype) -> np.dtype:
        return np.dtype(np.uint64) if of.scalar.is_ptr() else of_scalar(of.scalar)

    block_types: dict[tuple, tl.block_type] = {}
    make_block_type, broadcast = tl.block_type.__init__, TritonSemantic.broadcast_impl_value

    def block_type(new: tl.block_type, element_ty: tl.dtype, shape: Iterable) -> None:
        key = element_ty.name, *(each.value if isinstance(each, tl.constexpr) else each for each in shape)
        if key not in block_types:
            make_block_type(new, element_ty, shape)
            block_types[key] = new
        new.__dict__ = block_types[key].__dict__

    @functools.cache
    def shape_of(*sizes: int) -> tuple[tl.tuple, tl.constexpr]:
        return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))

    def tensor(new: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
        new.handle, new.type, new.dtype = handle, type, type.scalar
        new.shape, new.numel = shape_of(*(type.shape if type.is_block() else ()))

    def broadcast_unless_alike(semantic: TritonSemantic, a: tl.tensor, b: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        return (a, b) if a.shape is b.shape else broadcast(semantic, a, b)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(tl.block_type, "__init__", block_type))
        stack.enter_context(mock.patch.object(tl.tensor, "__init__", tensor))
        stack.enter_context(mock.patch.object(TritonSemantic, "broadcast_impl_value", broadcast_unless_alike))
        for name in MODELS:
            stack.enter_context(mock.patch.object(InterpreterBuilder, f"create_{name}", modelled(name)))
        for name in REFUSED:
            stack.enter_context(mock.patch.object(InterpreterBuilder, f"create_{name}", refused(name)))
        replaced = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        stack.callback(replaced.restore)
        nothing = SimpleNamespace(restore=lambda: None)
        stack.enter_context(mock.patch.object(interpreter, "_patch_lang", lambda function: nothing))
        options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        stack.enter_context(mock.patch.object(interpreter.interpreter_builder, "options", options))
        stack.enter_context(mock.patch.object(interpreter, "_get_np_dtype", numpy_dtype))
        yield
