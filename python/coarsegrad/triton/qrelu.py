"""The ops as Triton kernels: checks, allocation, launches. Signatures are those of the reference.

Nothing here waits for the device or reads from it.

The ops are opaque to torch.compile. torch.library.triton_op and wrap_triton would expose the kernels, but Inductor of
torch 2.13 gains nothing from them on fake CUDA tensors: it launches as many kernels between two pointwise operations,
even with epilogue fusion; it drops enable_fp_fusion of OPTIONS and with it bit-exactness; and it generates invalid
Python for a kernel with a function argument, such as g'.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from .._checks import check_alpha, check_arguments, check_bits, check_packed, check_slopes, checked_values
from .._torch_internals import suggest_memory_format
from .._types import BUILT_IN, CODE_WIDTH, MASK_WIDTH, AlphaGrad, MaskKind, Rounding, packed_bytes, parse, wide_dtype
from ..reference import number_of_scale
from ..ste import saved, ste_of
from . import kernels
from . import ste as mirror

# Elements per program by their size in bytes: two 16-byte chunks per thread of 4 warps.
BLOCK = {2: 2048, 4: 1024, 8: 512}
# No fma: a product and a sum round twice on every device.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

# Partial sums: the upper bound for one alpha, and the number of programs to aim for with many.
_MAX_SUMS, _SUM_PROGRAMS = 1024, 2048
# Partial sums that a program adds at once, and channels per tile if they are innermost.
_TILE, _TILE_CHANNELS = 1024, 32


def backward_block(item: int, saves_x: bool) -> int:
    """Elements per program of the backward: fewer with x, which needs more registers."""
    return BLOCK[item] // 2 if saves_x else BLOCK[item]


def on_device(t: Tensor):
    """Make t's device current, as Triton launches on the current device."""
    return contextlib.nullcontext() if t.device.type == "cpu" else torch.get_device_module(t.device).device(t.device)


def channels_of(dense: Tensor, channel_dim: int | None) -> tuple[int, int]:
    """(channels, consecutive elements of a channel). A dense tensor's stride counts the elements inside a dimension."""
    if channel_dim is None or dense.size(channel_dim) <= 1:
        return 1, 1
    return dense.size(channel_dim), dense.stride(channel_dim)


def alphas_kind(channels: int, inner: int) -> str:
    """How many consecutive elements are known to share an alpha."""
    return "one" if channels == 1 else "by octet" if inner % 8 == 0 else "by element"


def prepared(alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """alpha as the kernels read it. An illegal value becomes NaN in the kernels; on a CPU it is an error here."""
    wide = wide_dtype(dtype)
    alpha = checked_values(alpha, wide) if alpha.device.type == "cpu" else alpha.detach().to(wide)
    return alpha.contiguous()


def new_packed(like: Tensor, count: int, width: int) -> Tensor | None:
    return like.new_empty(packed_bytes(count, width), dtype=torch.uint8) if width else None


def _forward(
    dense: Tensor, y: Tensor | None, alpha: Tensor, bits: int, rounding: int, mask: int, codes: bool,
    channel_dim: int | None, width: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(mask, codes) of a dense x. Writes y unless it is None. width: bits of a packed code, if not the usual."""
    check_arguments(dense, alpha, bits, channel_dim)
    mode, kind = parse("rounding", rounding, Rounding), parse("mask", mask, MaskKind)
    alpha = prepared(alpha, dense.dtype)
    count, width = dense.numel(), width or CODE_WIDTH[bits]
    packed_mask = new_packed(dense, count, MASK_WIDTH[kind])
    packed_codes = new_packed(dense, count, width if codes else 0)
    if count:
        channels, inner = channels_of(dense, channel_dim)
        block = BLOCK[dense.element_size()]
        with on_device(dense):
            kernels.qrelu_forward_kernel[(triton.cdiv(count, block),)](
                dense, alpha, y, packed_mask, packed_codes, count, channels, inner,
                BITS=bits, CODE_WIDTH=width, ROUNDING=mode.name, MASK=kind.name, ALPHAS=alphas_kind(channels, inner),
                BLOCK=block, **OPTIONS,
            )  # fmt: skip
    return tuple(dense.new_empty(0, dtype=torch.uint8) if t is None else t for t in (packed_mask, packed_codes))


def qrelu_forward(
    x: Tensor, alpha: Tensor, bits: int, rounding: int, mask: int, codes: bool, channel_dim: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    memory_format = suggest_memory_format(x)
    dense = x.contiguous(memory_format=memory_format)
    y = torch.empty_like(dense, memory_format=memory_format)
    return y, *_forward(dense, y, alpha, bits, rounding, mask, codes, channel_dim)


def qrelu_forward_(
    x: Tensor, alpha: Tensor, bits: int, rounding: int, mask: int, codes: bool, channel_dim: int | None
) -> tuple[Tensor, Tensor]:
    dense = x.contiguous(memory_format=suggest_memory_format(x))
    result = _forward(dense, dense, alpha, bits, rounding, mask, codes, channel_dim)
    if dense is not x:
        x.copy_(dense)
    return result


def qrelu_codes(x: Tensor, alpha: Tensor, bits: int, rounding: int, channel_dim: int | None) -> Tensor:
    dense = x.contiguous(memory_format=suggest_memory_format(x))
    return _forward(dense, None, alpha, bits, rounding, MaskKind.nothing, True, channel_dim)[1]


def byte_codes(dense: Tensor, alpha: Tensor, bits: int, rounding: int, channel_dim: int | None) -> Tensor:
    """The codes of a dense x, one per byte, in its shape and strides."""
    codes = _forward(dense, None, alpha, bits, rounding, MaskKind.nothing, True, channel_dim, 8)[1]
    return codes.as_strided(dense.size(), dense.stride())


def dequantize(
    codes: Tensor,
    alpha: Tensor,
    bits: int,
    shape: list[int],
    dtype: torch.dtype,
    channel_dim: int | None,
    memory_format: torch.memory_format,
) -> Tensor:
    check_bits(bits)
    y = torch.empty(shape, dtype=dtype, device=codes.device, memory_format=memory_format)
    alpha, channel_dim = check_alpha(alpha, channel_dim, y.shape, dtype, codes.device)
    fill_from_codes(y, codes, prepared(alpha, dtype), bits, 0, *channels_of(y, channel_dim))
    return y


def fill_from_codes(
    y: Tensor, codes: Tensor, alpha: Tensor, bits: int, zero: int, channels: int, inner: int, dynamic: bool = False
) -> None:
    """y = L[c - zero]. inner: consecutive elements of a channel."""
    count, width, block = y.numel(), CODE_WIDTH[bits], BLOCK[y.element_size()]
    check_packed(codes, "codes", count, width, y.device)
    if count:
        with on_device(y):
            kernels.dequantize_kernel[(triton.cdiv(count, block),)](
                codes.contiguous(), alpha, y, count, channels, inner,
                ZERO=zero, CODE_WIDTH=width, ALPHAS=alphas_kind(channels, inner), DYNAMIC=dynamic, BLOCK=block,
                **OPTIONS,
            )  # fmt: skip


def backward_from_slopes(grad_y: Tensor, codes: Tensor, slopes: Tensor, bits: int) -> Tensor:
    check_slopes(slopes, grad_y, bits)
    memory_format = suggest_memory_format(grad_y)
    dense = grad_y.contiguous(memory_format=memory_format)
    dx = torch.empty_like(dense, memory_format=memory_format)
    count, width, block = dense.numel(), CODE_WIDTH[bits], BLOCK[dense.element_size()]
    check_packed(codes, "codes", count, width, dense.device)
    if count:
        with on_device(dense):
            kernels.backward_from_slopes_kernel[(triton.cdiv(count, block),)](
                dense, codes.contiguous(), slopes.contiguous(), dx, count,
                BITS=bits, CODE_WIDTH=width, BLOCK=block, **OPTIONS,
            )  # fmt: skip
    return dx


def sum_channels(count: int, channels: int, inner: int, block: int) -> tuple[tuple[int, int], dict[str, object]]:
    """The grid of the per-channel sums, channels by slices, and a program's tile of `block` elements."""
    innermost = inner == 1
    run, most = (channels, _TILE_CHANNELS) if innermost else (inner, block)
    columns = min(triton.next_power_of_2(run), most)
    rows = block // columns
    outer = count // (channels * inner)
    programs = triton.cdiv(channels, columns) if innermost else channels
    tiles = triton.cdiv(outer, rows) * (1 if innermost else triton.cdiv(inner, columns))
    slices = max(min(_SUM_PROGRAMS // programs, tiles), 1)
    return (programs, slices), {"INNERMOST": innermost, "OCTETS": run % 8 == 0, "ROWS": rows, "COLUMNS": columns}


def qrelu_backward(
    grad_y: Tensor,
    alpha: Tensor | None,
    x: Tensor | None,
    mask: Tensor | None,
    codes: Tensor | None,
    bits: int,
    ste: int | str,
    rounding: int,
    alpha_grad: int,
    alpha_scale: float,
    channel_dim: int | None,
    need_grad_x: bool,
    need_grad_alpha: bool,
) -> tuple[Tensor, Tensor]:
    check_bits(bits)
    row, memory_format = ste_of(ste), suggest_memory_format(grad_y)
    mode, rule = parse("rounding", rounding, Rounding), parse("alpha_grad", alpha_grad, AlphaGrad)
    gprime = mirror.STES[row.name] if row.name in BUILT_IN else row.triton
    if isinstance(gprime, str):
        gprime = getattr(mirror, gprime)
    if gprime is None:
        raise ValueError(f"ste {row.name!r} has no Triton form")
    mask_kind, saves_codes, saves_x = saved(row.needs, mode, rule, need_grad_x, need_grad_alpha)
    dense = grad_y.contiguous(memory_format=memory_format)
    count, width = dense.numel(), CODE_WIDTH[bits]
    channels, inner = channels_of(dense, channel_dim)
    if saves_x:
        if x is None or alpha is None or x.shape != grad_y.shape or x.dtype != grad_y.dtype:
            raise ValueError(
                f"x, of grad_y's shape and dtype, and alpha must be given for ste {row.name!r}, {rule.name!r}"
            )
        check_arguments(x, alpha, bits, channel_dim)
        x, alpha = x.contiguous(memory_format=memory_format), prepared(alpha, dense.dtype)
    if mask_kind != MaskKind.nothing:
        check_packed(mask, "mask", count, MASK_WIDTH[mask_kind], dense.device)
    if saves_codes:
        check_packed(codes, "codes", count, width, dense.device)
    tensors = (
        dense,
        x if saves_x else None,
        alpha if saves_x else None,
        mask if mask_kind != MaskKind.nothing else None,
        codes if saves_codes else None,
    )
    switches = {
        "BITS": bits, "CODE_WIDTH": width, "GPRIME": gprime, "ROUNDING": mode.name, "MASK": MaskKind(mask_kind).name,
        "NEEDS": "nothing" if not (need_grad_x or saves_x) else "x and rounding" if row.by_rounding else row.needs,
        "RULE": mirror.ALPHA_GRADS[rule.name] if need_grad_alpha else None,
    }  # fmt: skip

    dx = torch.empty_like(dense, memory_format=memory_format) if need_grad_x else None
    wide = wide_dtype(dense.dtype)
    wanted = 0 if not need_grad_alpha else 1 if channel_dim is None else grad_y.size(channel_dim)
    grad_alpha = (dense.new_empty if count else dense.new_zeros)(wanted, dtype=wide)
    if count:
        block = backward_block(dense.element_size(), saves_x)
        programs = triton.cdiv(count, block)
        partial = None
        with on_device(dense):
            if wanted and channels > 1:
                grid, tile = sum_channels(count, channels, inner, block)
                partial = dense.new_empty(grid[1], channels, dtype=wide)
                kernels.grad_alpha_channels_kernel[grid](
                    *tensors, partial, count // (channels * inner), channels, inner, **switches, **tile, **OPTIONS
                )
            elif wanted:
                programs = min(programs, _MAX_SUMS)
                partial = dense.new_empty(programs, 1, dtype=wide)
            if dx is not None or wanted and channels == 1:
                kernels.qrelu_backward_kernel[(programs,)](
                    *tensors, dx, partial if channels == 1 else None, count, channels, inner,
                    **switches, ALPHAS=alphas_kind(channels, inner), BLOCK=block, **OPTIONS,
                )  # fmt: skip
            if partial is not None:
                columns = 1 if channels == 1 else _TILE_CHANNELS
                alpha_scale = number_of_scale(alpha_scale, grad_y, bits)
                # A float argument of a kernel is float32.
                scale = 1.0 if wide == torch.float64 else float(alpha_scale)
                kernels.sum_slices_kernel[(triton.cdiv(channels, columns),)](
                    partial, grad_alpha, scale, partial.size(0), channels,
                    ROWS=_TILE // columns, COLUMNS=columns, **OPTIONS,
                )  # fmt: skip
                if wide == torch.float64:
                    grad_alpha.mul_(alpha_scale)
    return dense.new_empty(0) if dx is None else dx, grad_alpha
