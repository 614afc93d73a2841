"""A norm and the signed staircase after it as a Triton kernel: checks, allocation, launches."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .._checks import check_norm
from .._types import CODE_WIDTH, wide_dtype
from . import norm_kernels
from .qrelu import BLOCK, OPTIONS, new_packed, on_device
from .signed import hadamard, pack_bytes, qsigned_forward

# Of the sums (docs/spec.md): the most columns of a tile.
_LANES = 1024


def norm_qsigned(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool, shifted: bool, rounds_twice: bool,
    bits: int | None, group: int | None, rotation: int | None, output: bool, codes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """In one kernel, unless a rotation, or a group that is no row, does not fit in a tile: then the staircase is
    another's, of the norm's output."""
    group = check_norm(x, weight, bias, bits, group, rotation, output)
    dense, length = x.contiguous(), x.size(-1)
    columns = min(triton.next_power_of_2(max(8, length)), _LANES)
    fits = bits is None or (max(_tile_of(group, length), rotation or 1) <= columns)
    wide, shape = wide_dtype(x.dtype), (*x.shape[:-1], 1)
    rows = math.prod(shape)
    normed = torch.empty_like(dense) if output or not fits else None
    mean = x.new_empty(shape, dtype=wide) if centred else None
    inverse = x.new_empty(shape, dtype=wide)
    y = alpha = packed = None
    if bits is not None and fits:
        y, alpha = torch.empty_like(dense), x.new_empty((*x.shape[:-1], length // group), dtype=torch.bfloat16)
        packed = new_packed(dense, x.numel(), CODE_WIDTH[bits] * codes)
    width = CODE_WIDTH[bits or 8]
    # A byte with codes of two rows is packed afterwards.
    shared = packed is not None and length * width % 8 != 0
    written = torch.empty_like(dense, dtype=torch.uint8) if shared else packed
    if rows:
        block = BLOCK[x.element_size()]
        tile = max(1, block // columns)
        with on_device(x):
            norm_kernels.norm_qsigned_kernel[(triton.cdiv(rows, tile),)](
                dense, weight if weight is None else weight.contiguous(), bias if bias is None else bias.contiguous(),
                normed, y, alpha, written, mean, inverse, rows, length,
                EPS=eps, SHIFTED=shifted, TWICE=rounds_twice,
                BITS=bits if y is not None else 0, GROUP=0 if group is None or group == length else group,
                STAGES=rotation.bit_length() - 1 if rotation and y is not None else 0,
                SCALE=math.sqrt(1 / rotation) if rotation else 1.0, CODE_WIDTH=8 if shared else width,
                ROWS=tile, COLUMNS=columns, FOLDS=columns.bit_length() - 1, LONG=length > columns, **OPTIONS,
            )  # fmt: skip
            if shared:
                pack_bytes(written, packed, width)
    none = x.new_empty(0)
    if not fits:
        assert normed is not None
        rotated = normed if rotation is None else hadamard(normed, rotation)
        y, alpha, _, packed = qsigned_forward(rotated, None, bits, group, False, codes, None)
    return (
        normed if output else none,
        none if y is None else y,
        x.new_empty(0, dtype=torch.uint8) if packed is None else packed,
        x.new_empty(0, dtype=torch.bfloat16) if alpha is None else alpha,
        x.new_empty(0, dtype=wide) if mean is None else mean,
        inverse,
    )


def _tile_of(group: int, length: int) -> float:
    """The columns that a group takes: 1 for a row, which may have any number."""
    return 1 if group == length else group if group & (group - 1) == 0 else math.inf
