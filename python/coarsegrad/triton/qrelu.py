"""The ops by the Triton kernels: checks, allocation, launches. Signatures are the reference's.

Nothing here waits for the device or reads from it.

To torch.compile the ops are opaque, on this backend too. torch.library.triton_op and wrap_triton would show it the
kernels, and were tried with Inductor of torch 2.13 on fake CUDA tensors: between two pointwise operations there were as
many launches as with the op, with its option to fuse epilogues too; OPTIONS' enable_fp_fusion was lost, and with it the
bits; and the code for a kernel that has a function passed, as each g' is, was no Python.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from .. import reference
from .._torch_internals import suggest_memory_format
from ..ste import ALPHA_GRADS, BUILT_IN, get_ste, kept
from . import kernels
from . import ste as mirror

# Elements of a program by the bytes of one: two 16-byte packs for each thread of 4 warps.
BLOCK = {2: 2048, 4: 1024, 8: 512}
# A product and a sum are two roundings on every device.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

# Partial sums: of one alpha at most, and programs to aim for where there are many.
_MAX_SUMS, _SUM_PROGRAMS = 1024, 2048
# Partial sums that a program adds at once, and channels of a tile where they are innermost.
_TILE, _TILE_CHANNELS = 1024, 32


def backward_block(item: int, keeps_x: bool) -> int:
    """Elements of a program of the backward. With x there is more to compute, and two packs need too many registers."""
    return BLOCK[item] // 2 if keeps_x else BLOCK[item]


def _on(t: Tensor):
    """Triton launches on the current device."""
    return contextlib.nullcontext() if t.device.type == "cpu" else torch.get_device_module(t.device).device(t.device)


def _channels(dense: Tensor, channel_dim: int | None) -> tuple[int, int]:
    """(channels, elements of one in a row); a dense tensor's stride is the number of elements inside a dimension."""
    if channel_dim is None or dense.size(channel_dim) <= 1:
        return 1, 1
    return dense.size(channel_dim), dense.stride(channel_dim)


def _alphas(channels: int, inner: int) -> str:
    """How many elements in a row are sure to share an alpha."""
    return "one" if channels == 1 else "by octet" if inner % 8 == 0 else "by element"


def _prepared(alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """alpha as the kernels read it. They make NaN of a bad value; on a CPU it is an error here."""
    wide = reference.wide_dtype(dtype)
    alpha = reference.checked_values(alpha, wide) if alpha.device.type == "cpu" else alpha.detach().to(wide)
    return alpha.contiguous()


def _packed(like: Tensor, count: int, width: int) -> Tensor | None:
    return like.new_empty((count * width + 7) // 8, dtype=torch.uint8) if width else None


def _check_packed(packed: Tensor | None, argument: str, count: int, width: int, device: torch.device) -> None:
    size = (count * width + 7) // 8
    if packed is None or packed.dtype != torch.uint8 or packed.device != device or packed.shape != (size,):
        got = "nothing" if packed is None else f"{packed.dtype} of shape {list(packed.shape)} on {packed.device}"
        raise ValueError(
            f"{argument} must be a uint8 tensor of {size} bytes on {device} for {count} elements of {width} bits,"
            f" got {got}"
        )


def _forward(
    dense: Tensor, y: Tensor | None, alpha: Tensor, bits: int, rounding: str, mask: str, codes: bool,
    channel_dim: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(mask, codes) of a dense x; writes y, if there is one."""
    reference.check_arguments(dense, alpha, bits, rounding, channel_dim)
    reference.check_word("mask", mask, tuple(reference.MASK_WIDTH))
    alpha = _prepared(alpha, dense.dtype)
    count, width = dense.numel(), reference.CODE_WIDTH[bits]
    kept_mask = _packed(dense, count, reference.MASK_WIDTH[mask])
    kept_codes = _packed(dense, count, width if codes else 0)
    if count:
        channels, inner = _channels(dense, channel_dim)
        block = BLOCK[dense.element_size()]
        with _on(dense):
            kernels.qrelu_forward_kernel[(triton.cdiv(count, block),)](
                dense, alpha, y, kept_mask, kept_codes, count, channels, inner,
                BITS=bits, CODE_WIDTH=width, ROUNDING=rounding, MASK=mask, ALPHAS=_alphas(channels, inner), BLOCK=block,
                **OPTIONS,
            )  # fmt: skip
    return tuple(dense.new_empty(0, dtype=torch.uint8) if t is None else t for t in (kept_mask, kept_codes))


def qrelu_forward(
    x: Tensor, alpha: Tensor, bits: int, rounding: str, mask: str, codes: bool, channel_dim: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    memory_format = suggest_memory_format(x)
    dense = x.contiguous(memory_format=memory_format)
    y = torch.empty_like(dense, memory_format=memory_format)
    return y, *_forward(dense, y, alpha, bits, rounding, mask, codes, channel_dim)


def qrelu_forward_(
    x: Tensor, alpha: Tensor, bits: int, rounding: str, mask: str, codes: bool, channel_dim: int | None
) -> tuple[Tensor, Tensor]:
    dense = x.contiguous(memory_format=suggest_memory_format(x))
    result = _forward(dense, dense, alpha, bits, rounding, mask, codes, channel_dim)
    if dense is not x:
        x.copy_(dense)
    return result


def qrelu_codes(x: Tensor, alpha: Tensor, bits: int, rounding: str, channel_dim: int | None) -> Tensor:
    dense = x.contiguous(memory_format=suggest_memory_format(x))
    return _forward(dense, None, alpha, bits, rounding, "nothing", True, channel_dim)[1]


def dequantize(
    codes: Tensor,
    alpha: Tensor,
    bits: int,
    shape: list[int],
    dtype: torch.dtype,
    channel_dim: int | None,
    memory_format: torch.memory_format,
) -> Tensor:
    reference.check_bits(bits)
    y = torch.empty(shape, dtype=dtype, device=codes.device, memory_format=memory_format)
    alpha, channel_dim = reference.check_alpha(alpha, channel_dim, y.shape, dtype, codes.device)
    count, width = y.numel(), reference.CODE_WIDTH[bits]
    _check_packed(codes, "codes", count, width, y.device)
    alpha = _prepared(alpha, dtype)
    if count:
        channels, inner = _channels(y, channel_dim)
        block = BLOCK[y.element_size()]
        with _on(y):
            kernels.dequantize_kernel[(triton.cdiv(count, block),)](
                codes.contiguous(), alpha, y, count, channels, inner,
                CODE_WIDTH=width, ALPHAS=_alphas(channels, inner), BLOCK=block, **OPTIONS,
            )  # fmt: skip
    return y


def times_slopes(grad_y: Tensor, codes: Tensor, slopes: Tensor, bits: int) -> Tensor:
    reference.check_slopes(slopes, grad_y, bits)
    memory_format = suggest_memory_format(grad_y)
    dense = grad_y.contiguous(memory_format=memory_format)
    dx = torch.empty_like(dense, memory_format=memory_format)
    count, width, block = dense.numel(), reference.CODE_WIDTH[bits], BLOCK[dense.element_size()]
    _check_packed(codes, "codes", count, width, dense.device)
    if count:
        with _on(dense):
            kernels.times_slopes_kernel[(triton.cdiv(count, block),)](
                dense, codes.contiguous(), slopes.contiguous(), dx, count,
                BITS=bits, CODE_WIDTH=width, BLOCK=block, **OPTIONS,
            )  # fmt: skip
    return dx


def sum_channels(count: int, channels: int, inner: int, block: int) -> tuple[tuple[int, int], dict[str, object]]:
    """The grid of the sums per channel, channels by slices, and the tile of a program, of `block` elements."""
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
    ste: str,
    rounding: str,
    alpha_grad: str,
    alpha_scale: float,
    channel_dim: int | None,
    need_grad_x: bool,
    need_grad_alpha: bool,
) -> tuple[Tensor, Tensor]:
    reference.check_bits(bits)
    reference.check_word("alpha_grad", alpha_grad, ALPHA_GRADS)
    row, memory_format = get_ste(ste), suggest_memory_format(grad_y)
    gprime = mirror.STES[ste] if ste in BUILT_IN else row.triton
    if gprime is None:
        raise ValueError(f"ste {ste!r} has no Triton form")
    mask_kind, keeps_codes, keeps_x = kept(ste, rounding, alpha_grad if need_grad_alpha else None, need_grad_x)
    dense = grad_y.contiguous(memory_format=memory_format)
    count, width = dense.numel(), reference.CODE_WIDTH[bits]
    channels, inner = _channels(dense, channel_dim)
    if keeps_x:
        if x is None or alpha is None or x.shape != grad_y.shape or x.dtype != grad_y.dtype:
            raise ValueError(f"x, of grad_y's shape and dtype, and alpha must be given for ste {ste!r}, {alpha_grad!r}")
        reference.check_arguments(x, alpha, bits, rounding, channel_dim)
        x, alpha = x.contiguous(memory_format=memory_format), _prepared(alpha, dense.dtype)
    if mask_kind != "nothing":
        _check_packed(mask, "mask", count, reference.MASK_WIDTH[mask_kind], dense.device)
    if keeps_codes:
        _check_packed(codes, "codes", count, width, dense.device)
    tensors = (
        dense,
        x if keeps_x else None,
        alpha if keeps_x else None,
        mask if mask_kind != "nothing" else None,
        codes if keeps_codes else None,
    )
    switches = {
        "BITS": bits, "CODE_WIDTH": width, "GPRIME": gprime, "ROUNDING": rounding, "MASK": mask_kind,
        "NEEDS": row.needs if need_grad_x or keeps_x else "nothing",
        "RULE": mirror.ALPHA_GRADS[alpha_grad] if need_grad_alpha else None,
    }  # fmt: skip

    dx = torch.empty_like(dense, memory_format=memory_format) if need_grad_x else None
    wide = reference.wide_dtype(dense.dtype)
    wanted = 0 if not need_grad_alpha else 1 if channel_dim is None else grad_y.size(channel_dim)
    grad_alpha = (dense.new_empty if count else dense.new_zeros)(wanted, dtype=wide)
    if count:
        block = backward_block(dense.element_size(), keeps_x)
        programs = triton.cdiv(count, block)
        partial = None
        with _on(dense):
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
                    **switches, ALPHAS=_alphas(channels, inner), BLOCK=block, **OPTIONS,
                )  # fmt: skip
            if partial is not None:
                columns = 1 if channels == 1 else _TILE_CHANNELS
                alpha_scale = reference.number_of_scale(alpha_scale, grad_y, bits)
                # A number that is passed to a kernel is a float32.
                scale = 1.0 if wide == torch.float64 else float(alpha_scale)
                kernels.sum_slices_kernel[(triton.cdiv(channels, columns),)](
                    partial, grad_alpha, scale, partial.size(0), channels,
                    ROWS=_TILE // columns, COLUMNS=columns, **OPTIONS,
                )  # fmt: skip
                if wide == torch.float64:
                    grad_alpha.mul_(alpha_scale)
    return dense.new_empty(0) if dx is None else dx, grad_alpha
