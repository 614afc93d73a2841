"""The integer ops once more: loops over Python integers, and numpy's float32 where the specification rounds.

Nothing here imports coarsegrad.
"""

from __future__ import annotations

import decimal
import itertools
import math
from fractions import Fraction

import numpy as np
import torch

WEIGHT_RANGE = {8: (-127, 127), 4: (-8, 7), 2: (-2, 1), 1: (-1, 1)}


def random_weights(shape, weight_bits, generator):
    low, high = WEIGHT_RANGE[weight_bits]
    values = torch.randint(low, high + 1, shape, generator=generator)
    return torch.where(values == 0, 1, values) if weight_bits == 1 else values


def pack_row(row, weight_bits):
    """Weight 32 p + j of a block of 32 bytes sits in its byte j at shift p * weight_bits."""
    per_block = 32 * 8 // weight_bits
    packed = bytearray(32 * math.ceil(len(row) / per_block))
    for i, value in enumerate(row):
        block, inside = divmod(i, per_block)
        plane, byte = divmod(inside, 32)
        field = (value > 0) if weight_bits == 1 else value % 2**weight_bits
        packed[32 * block + byte] |= field << (plane * weight_bits)
    return list(packed)


def packed(weights, weight_bits):
    """Integer weights [C, ...] as the ops take them; a convolution's row is [kh, kw, C_in / groups]."""
    if weights.dim() == 4:
        weights = weights.permute(0, 2, 3, 1)
    rows = [pack_row(row, weight_bits) for row in weights.flatten(1).tolist()]
    size = len(pack_row([1] * math.prod(weights.shape[1:]), weight_bits))
    return torch.tensor(rows, dtype=torch.uint8).reshape(len(rows), size)


def linear(codes, weights):
    """Accumulators [N][C] of codes [N, K] and weights [C, K]."""
    rows = weights.tolist()
    return [[sum(c * w for c, w in zip(row, other)) for other in rows] for row in codes.tolist()]


def conv2d(codes, weights, stride, padding, dilation, groups):
    """Accumulators [N][C][H][W]."""
    n, channels, height, width = codes.shape
    outputs, inputs, kh, kw = weights.shape
    size = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip((height, width), (kh, kw), stride, padding, dilation)
    ]
    image, filters = codes.tolist(), weights.tolist()
    acc = torch.zeros(n, outputs, *size, dtype=torch.int64)
    for i, o, y, x in itertools.product(*map(range, acc.shape)):
        first, total = o // (outputs // groups) * inputs, 0
        for c, ky, kx in itertools.product(range(inputs), range(kh), range(kw)):
            row, column = y * stride[0] - padding[0] + ky * dilation[0], x * stride[1] - padding[1] + kx * dilation[1]
            if 0 <= row < height and 0 <= column < width:
                total += image[i][first + c][row][column] * filters[o][c][ky][kx]
        acc[i, o, y, x] = total
    return acc.tolist()


def affine(acc, scale, offset):
    """float32(float32(acc) * scale) + offset, as a Python float."""
    return float(np.float32(np.float32(np.float32(acc) * np.float32(scale)) + np.float32(offset)))


def code(acc, scale, offset, thresholds, levels):
    if thresholds is not None:
        return sum(acc >= threshold for threshold in thresholds)
    return min(max(math.ceil(affine(acc, scale, offset)), 0), levels)


def unpacked(packed, weight_bits, count):
    """The inverse of `packed`, rows of Python ints."""
    per_block = 32 * 8 // weight_bits
    rows = []
    for row in packed.tolist():
        values = []
        for i in range(count):
            block, inside = divmod(i, per_block)
            plane, byte = divmod(inside, 32)
            field = row[32 * block + byte] >> (plane * weight_bits) & (2**weight_bits - 1)
            wraps = weight_bits > 1 and field >= 2 ** (weight_bits - 1)
            values.append(2 * field - 1 if weight_bits == 1 else field - 2**weight_bits * wraps)
        rows.append(values)
    return rows


def _is_above(left, right, square):
    """left > right * sqrt(square), in rational numbers where the root is one, else in 120 digits."""
    numerator, denominator = math.isqrt(square.numerator), math.isqrt(square.denominator)
    if Fraction(numerator, denominator) ** 2 == square:
        return left > right * Fraction(numerator, denominator)
    with decimal.localcontext() as context:
        context.prec = 120
        root = (decimal.Decimal(square.numerator) / decimal.Decimal(square.denominator)).sqrt()
        product = decimal.Decimal(right.numerator) / decimal.Decimal(right.denominator) * root
        return decimal.Decimal(left.numerator) / decimal.Decimal(left.denominator) > product


def real_code(acc, alpha, scale, bias, norm, next_alpha, bits, rounding):
    """#{k : v > T[k]} of the real number v of an accumulator. norm: (mean, var, eps, gain, shift) or None."""
    x = Fraction(alpha) * Fraction(scale) * acc + Fraction(bias)
    mean, var, eps, gain, shift = map(Fraction, norm or (0, 1, 0, 1, 0))
    count = 0
    for k in range(1, 2**bits):
        threshold = Fraction(2 * k - (2 if rounding == "ceil" else 1), 2) * Fraction(next_alpha)
        if rounding == "hwgq" and k == 1:
            threshold = Fraction(0)
        count += _is_above(gain * (x - mean), threshold - shift, var + eps)
    return count


def values(codes, step):
    """step * code as an array of rationals."""
    return codes.numpy().astype(object) * Fraction(step)


def averages(x, kernel, stride=None, padding=0, divisor=None):
    """Averages of windows of [..., H, W] rationals, padded by zeros."""
    stride = stride or kernel
    x = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(padding, padding)] * 2)
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[-2:], kernel, stride))
    out = np.empty((*x.shape[:-2], rows, columns), dtype=object)
    for i, j in itertools.product(range(rows), range(columns)):
        top, left = i * stride[0], j * stride[1]
        window = x[..., top : top + kernel[0], left : left + kernel[1]]
        out[..., i, j] = window.sum((-2, -1)) / Fraction(divisor or math.prod(kernel))
    return out
