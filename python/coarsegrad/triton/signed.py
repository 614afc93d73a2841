"""The signed staircase and the Hadamard rotation as Triton kernels: checks, allocation, launches."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .._checks import check_alpha, check_bits, check_hadamard, check_signed
from .._torch_internals import suggest_memory_format
from .._types import CODE_WIDTH, top_level, wide_dtype
from . import signed_kernels
from .qrelu import BLOCK, OPTIONS, alphas_kind, channels_of, fill_from_codes, new_packed, on_device, prepared

# The largest tile, in blocks of 4 warps.
_MOST_BLOCKS = 4
# The least consecutive elements of a row in a tile of a rotation that is larger than a tile.
_COLUMNS = 32


def qsigned_forward(
    x: Tensor, alpha: Tensor | None, bits: int, group: int | None, mask: bool, codes: bool, channel_dim: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alpha, group, channel_dim = check_signed(x, alpha, bits, group, channel_dim)
    memory_format = torch.contiguous_format if alpha is None else suggest_memory_format(x)
    dense = x.contiguous(memory_format=memory_format)
    y = torch.empty_like(dense, memory_format=memory_format)
    count = dense.numel()
    packed_mask, packed_codes = new_packed(dense, count, int(mask)), new_packed(dense, count, CODE_WIDTH[bits] * codes)
    if alpha is None:
        found = x.new_empty((*x.shape[:-1], x.size(-1) // group), dtype=torch.bfloat16)
        _quantize_groups(dense, y, found, packed_codes, bits, group)
        if packed_mask is not None:
            _fill_with_ones(packed_mask, count)
    else:
        found = x.new_empty(0, dtype=torch.bfloat16)
        _quantize(dense, y, prepared(alpha, x.dtype), packed_mask, packed_codes, bits, channel_dim)
    return y, found, *(x.new_empty(0, dtype=torch.uint8) if t is None else t for t in (packed_mask, packed_codes))


def _quantize(
    dense: Tensor, y: Tensor, alpha: Tensor, mask: Tensor | None, codes: Tensor | None, bits: int,
    channel_dim: int | None,
) -> None:  # fmt: skip
    if not dense.numel():
        return
    channels, inner = channels_of(dense, channel_dim)
    block = BLOCK[dense.element_size()]
    with on_device(dense):
        signed_kernels.qsigned_forward_kernel[(triton.cdiv(dense.numel(), block),)](
            dense, alpha, y, mask, codes, dense.numel(), channels, inner,
            BITS=bits, CODE_WIDTH=CODE_WIDTH[bits], ALPHAS=alphas_kind(channels, inner), BLOCK=block, **OPTIONS,
        )  # fmt: skip


def _quantize_groups(dense: Tensor, y: Tensor, alphas: Tensor, codes: Tensor | None, bits: int, group: int) -> None:
    if not dense.numel():
        return
    groups, width, block = alphas.numel(), CODE_WIDTH[bits], BLOCK[dense.element_size()]
    # A byte with codes of two groups is packed afterwards.
    shared = codes is not None and group * width % 8 != 0
    written = torch.empty_like(dense, dtype=torch.uint8) if shared else codes
    columns = min(triton.next_power_of_2(group), _MOST_BLOCKS * block)
    rows = max(1, block // columns)
    with on_device(dense):
        signed_kernels.qsigned_groups_kernel[(triton.cdiv(groups, rows),)](
            dense, y, alphas, written, groups, group,
            BITS=bits, CODE_WIDTH=8 if shared else width, ROWS=rows, COLUMNS=columns, LONG=group > columns,
            **_options(rows * columns, block),
        )  # fmt: skip
        if shared:
            pack_bytes(written, codes, width)


def pack_bytes(written: Tensor, packed: Tensor, width: int) -> None:
    """Codes of a byte each to `width` bits."""
    signed_kernels.pack_kernel[(triton.cdiv(written.numel(), BLOCK[2]),)](
        written, packed, written.numel(), WIDTH=width, BLOCK=BLOCK[2], **OPTIONS
    )


def _options(tile: int, block: int) -> dict[str, object]:
    """As many warps as `tile` elements take."""
    return {**OPTIONS, "num_warps": OPTIONS["num_warps"] * max(1, tile // block)}


def _fill_with_ones(mask: Tensor, count: int) -> None:
    mask.fill_(255)
    if count % 8:
        mask[-1] = 2 ** (count % 8) - 1


def qsigned_dequantize(
    codes: Tensor,
    alpha: Tensor,
    bits: int,
    group: int | None,
    shape: list[int],
    dtype: torch.dtype,
    channel_dim: int | None,
    memory_format: torch.memory_format,
) -> Tensor:
    check_bits(bits)
    y = torch.empty(shape, dtype=dtype, device=codes.device, memory_format=memory_format)
    if group is None:
        alpha, channel_dim = check_alpha(alpha, channel_dim, y.shape, dtype, codes.device)
        alpha, (channels, inner) = prepared(alpha, dtype), channels_of(y, channel_dim)
    else:
        alpha, channels, inner = alpha.contiguous(), alpha.numel(), group
        if channels * group != y.numel() and y.numel():
            raise ValueError(
                f"alpha must have {y.numel() // group} values, one for each group of {group}, got {channels}"
            )
    fill_from_codes(y, codes, alpha, bits, top_level(bits), channels, inner, dynamic=group is not None)
    return y


def hadamard(x: Tensor, size: int) -> Tensor:
    """Of a size that no tile holds, by several kernels, with sums in the wide dtype between them."""
    check_hadamard(x, size)
    source, count, distance = x.contiguous(), x.numel(), 1
    if not count:
        return torch.empty_like(source)
    while True:
        block = BLOCK[source.element_size()]
        most = _MOST_BLOCKS * block
        sums = min(size // distance, most if distance == 1 else most // _COLUMNS)
        columns = 1 if distance == 1 else most // sums
        tile = max(sums * columns, block)
        done = distance * sums == size
        result = torch.empty_like(source, dtype=x.dtype if done else wide_dtype(x.dtype))
        with on_device(x):
            signed_kernels.hadamard_kernel[(triton.cdiv(count, tile),)](
                source, result, count, distance,
                STAGES=sums.bit_length() - 1, SCALE=math.sqrt(1 / size) if done else None, COLUMNS=columns, BLOCK=tile,
                **_options(tile, block),
            )  # fmt: skip
        if done:
            return result
        source, distance = result, distance * sums
