"""The kernel of layers on codes: a matrix product of bytes on tensor cores, with the staircase at its end.

A row of weights consists of blocks of 32 bytes that hold 256 / WEIGHT_BITS weights in planes of 32 (docs/spec.md,
section 6). A step of the loop multiplies one plane of a few blocks: weights are unpacked by shifts alone, and codes are
read in runs of 32 bytes. The next step reads the same weight bytes again, from a cache, for the next plane.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _plane(packed, plane, WEIGHT_BITS: tl.constexpr):
    """The weights of one plane of packed bytes, int8."""
    if WEIGHT_BITS == 8:
        return packed.to(tl.int8, bitcast=True)
    elif WEIGHT_BITS == 1:
        return ((packed >> plane.to(tl.uint8)) & 1).to(tl.int8) * 2 - 1
    else:  # the sign bit to the top, and back
        top = packed << (8 - (plane + 1) * WEIGHT_BITS).to(tl.uint8)
        return top.to(tl.int8, bitcast=True) >> (8 - WEIGHT_BITS)


@triton.jit
def _affine(acc, scale, offset):
    """float32(float32(acc) * scale) + offset; a product and a sum, as enable_fp_fusion is off."""
    return acc.to(tl.float32) * scale[None, :] + offset[None, :]


@triton.jit
def _ceil_within(v, top):
    """clamp(ceil(v), 0, top), int32. By a comparison, which sees a subnormal v that a ceil may take for 0."""
    v = tl.minimum(tl.maximum(v, 0.0), top)
    below = v.to(tl.int32)
    return below + (v > below.to(tl.float32)).to(tl.int32)


@triton.jit
def integer_layer_kernel(
    codes_ptr, weight_ptr, scale_ptr, offset_ptr, thresholds_ptr, out_ptr,
    rows, outputs, count, row_bytes, levels,
    height, width, channels, group_channels, out_height, out_width, kernel_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    WIDE_CODES: tl.constexpr, WEIGHT_BITS: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS x OUTPUTS of the output, in one group.

    codes: [rows, count], or with WINDOW [N, height, width, channels], of which a row is the window of an output pixel,
    [kh, kw, group_channels]. out: [rows, groups * outputs], float32, or uint8 for codes. WIDE_CODES: codes may exceed
    127; they then enter the product less 128, and 128 times the sum of the weights is added at the end.
    """
    group = tl.program_id(2)
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = n < outputs
    channel = group * outputs + tl.where(inside, n, 0)
    weights = weight_ptr + channel.to(tl.int64) * row_bytes
    if WINDOW:
        top = (m // out_width % out_height).to(tl.int32) * stride_h - padding_h
        left = (m % out_width).to(tl.int32) * stride_w - padding_w
        first = m // out_width // out_height * height * width * channels + group * group_channels
    else:
        first = m * count
    acc = tl.zeros([ROWS, OUTPUTS], dtype=tl.int32)
    sums = tl.zeros([OUTPUTS, BYTES], dtype=tl.int32)
    for step in range(0, tl.cdiv(row_bytes, BYTES) * (8 // WEIGHT_BITS)):
        plane = step % (8 // WEIGHT_BITS)
        byte = step // (8 // WEIGHT_BITS) * BYTES + tl.arange(0, BYTES)
        k = byte // 32 * (256 // WEIGHT_BITS) + plane * 32 + byte % 32
        mask = (m < rows)[:, None] & (k < count)[None, :]
        if WINDOW:
            tap = k // group_channels
            y = top[:, None] + (tap // kernel_width * dilation_h)[None, :]
            x = left[:, None] + (tap % kernel_width * dilation_w)[None, :]
            mask = mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            at = first[:, None] + ((y * width + x) * channels + (k % group_channels)[None, :])
        else:
            at = first[:, None] + k[None, :]
        codes = tl.load(codes_ptr + at, mask=mask, other=0)
        packed = tl.load(weights[:, None] + byte[None, :], mask=(byte < row_bytes)[None, :], other=0)
        weight = _plane(packed, plane, WEIGHT_BITS)
        if WIDE_CODES:
            codes = codes ^ 128
            sums += weight.to(tl.int32)
        acc = tl.dot(codes.to(tl.int8, bitcast=True), tl.trans(weight), acc, out_dtype=tl.int32)
    if WIDE_CODES:
        acc += 128 * tl.sum(sums, 1)[None, :]

    out = out_ptr + m[:, None] * (outputs * tl.num_programs(2)) + channel[None, :]
    mask = (m < rows)[:, None] & inside[None, :]
    if thresholds_ptr is None:
        v = _affine(acc, tl.load(scale_ptr + channel), tl.load(offset_ptr + channel))
        if out_ptr.dtype.element_ty == tl.float32:
            tl.store(out, v, mask=mask)
        else:
            tl.store(out, _ceil_within(v, levels.to(tl.float32)).to(tl.uint8), mask=mask)
    else:
        code = tl.zeros([ROWS, OUTPUTS], dtype=tl.int32)
        row = thresholds_ptr + channel * levels
        for k in range(levels):
            code += (acc >= tl.load(row + k)[None, :]).to(tl.int32)
        tl.store(out, code.to(tl.uint8), mask=mask)
