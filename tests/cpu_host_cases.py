"""Cases of all CPU kernels, for the program that tests/cpp/cpu_host.cpp makes, and what the reference says of each."""

from __future__ import annotations

import functools
import itertools

import torch
from cuda_host import MASKS, ROUNDINGS, Case
from host_cases import (
    alpha_tensor,
    backward_case,
    backward_cases,
    backward_from_slopes_cases,
    dequantize_case,
    dequantize_cases,
    forward_case,
    make_grad,
    make_x,
)
from host_cases_signed import given_cases, group_cases, hadamard_cases

from coarsegrad import reference
from coarsegrad._types import WEIGHT_BITS, wide_dtype

# Less than a vector, than a block; two chunks of sums and a part of a block.
SIZES = (3, 33, 64 * 5 + 21)


def norm_cases(dtype):
    """RMSNorm and LayerNorm of rows shorter than a vector, not of whole vectors, and longer than all lanes of sums."""
    for n, (length, centred) in enumerate(itertools.product((3, 70, 1100), (False, True))):
        x = torch.randn(5, length, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
        weight, bias = (torch.linspace(low, 2, length).to(wide_dtype(dtype)) for low in (-1, 0.3))
        made = reference.norm_qsigned(
            x, weight, bias, 1e-5, centred, False, n % 3 == 0, None, None, None, True, False
        )  # fmt: skip
        names = ("out", *(("mean",) if centred else ()), "inverse")
        expected = {name: made[{"out": 0, "mean": 4, "inverse": 5}[name]].reshape(-1) for name in names}
        inputs = {"x": x.reshape(-1), "weight": weight, "bias": bias}
        flags = ("rounds_twice",) if n % 3 == 0 else ()
        yield Case("norm", dtype, 0, x.numel(), inputs, expected, channels=5, inner=length, flags=flags, scale=1e-5,
                   expected=expected)  # fmt: skip


def weight_cases(dtype):
    for n, (length, bits) in enumerate(itertools.product((9, 700), WEIGHT_BITS)):
        rows = torch.randn(3, length, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
        expected = {"alpha": reference.weight_scale(rows, bits, 0)}
        inputs = {"x": rows.flatten()}
        yield Case("weight_scale", dtype, bits, rows.numel(), inputs, expected, channels=3, expected=expected)


def channel_cases(dtype):
    """An alpha for each channel, now and then one that is not regular: innermost, and in short and long runs."""
    irregular = 1e-310 if dtype == torch.float64 else 4e-8 if dtype == torch.float16 else 1e-40
    for n, (rounding, (channels, inner), bits) in enumerate(
        itertools.product(ROUNDINGS, ((32, 1), (5, 1), (4, 9), (2, 150)), (2, 4))
    ):
        alpha = [0.3, 0.5, 1.7, 41.0][: min(channels, 4)] * -(-channels // 4)
        alpha = alpha_tensor(alpha[:channels] if n % 6 else [irregular, *alpha[1:channels]], dtype)
        rows = 300 // (channels * inner) + 9
        x = torch.stack([make_x(dtype, a.item(), bits, rounding, rows * inner, n + i).view(rows, inner)
                         for i, a in enumerate(alpha)], 1).reshape(-1)  # fmt: skip
        yield forward_case(x, alpha, bits, rounding, MASKS[n % len(MASKS)], n % 2 == 0, shape=(rows, channels, inner))


def forward_cases(dtype):
    for n, (rounding, bits, codes) in enumerate(itertools.product(ROUNDINGS, range(1, 9), (False, True))):
        alpha = alpha_tensor([(0.5, 0.3, 0.0154)[n % 3]], dtype)
        x = make_x(dtype, alpha.item(), bits, rounding, SIZES[n % 7 % 3 - 1], n)
        settings = {"y": not codes or n % 3 > 0, "in_place": codes and n % 3 == 1, "offset": n % 2}
        yield forward_case(x, alpha, bits, rounding, MASKS[n % len(MASKS)], codes, **settings)
    for n, (rounding, bits) in enumerate(itertools.product(ROUNDINGS, range(1, 9))):  # a block for each level: a search
        x = make_x(dtype, 0.3, bits, rounding, (64 << bits) + 21, n)
        yield forward_case(x, alpha_tensor([0.3], dtype), bits, rounding, MASKS[n % len(MASKS)], n % 2 == 0)


def level_cases(dtype):
    """Codes enough for a table of levels, many of which are ties in bfloat16."""
    for n, bits in enumerate((1, 2, 4, 8)):
        alpha = alpha_tensor([257 / 2048], dtype)
        codes = reference.qrelu_codes(
            make_x(dtype, alpha.item(), bits, "ceil", 64 * 65 + 37, n), alpha, bits, "ceil", None
        )
        yield dequantize_case(codes, alpha, bits, (64 * 65 + 37,), dtype, None)


def column_cases(dtype):
    """Gradients of alphas that are innermost, in whole blocks. In every third channel dy is infinite where it adds
    nothing."""
    for n, (rule, channels) in enumerate(itertools.product(("exact", "three_valued"), (64, 192))):
        alpha = alpha_tensor([(0.3, 0.5, 1.7)[i % 3] for i in range(channels)], dtype)
        x = make_x(dtype, 0.5, 2, "ceil", 19 * channels, n)
        dy = make_grad(dtype, x.numel(), n).view(19, channels)
        dy[:, ::3] = dy[:, ::3].masked_fill(x.view(19, channels)[:, ::3] <= 0, torch.inf)
        yield backward_case(x, dy.flatten(), alpha, 2, "clipped_relu", "ceil", rule, shape=(19, channels, 1))


@functools.cache
def cases_of(dtype):
    return [
        *forward_cases(dtype),
        *channel_cases(dtype),
        *level_cases(dtype),
        *column_cases(dtype),
        *dequantize_cases(dtype, SIZES[1:]),
        *backward_from_slopes_cases(dtype, SIZES[1:]),
        *backward_cases(dtype, SIZES[2:], (1, 2, 5), ROUNDINGS[:1]),
        *given_cases(dtype, (33, 341)),
        *group_cases(dtype, (2, 8), (((7, 9), 3), ((9, 32), 8), ((3, 96), 32), ((3, 101), 101))),
        *hadamard_cases(dtype, (2, 8, 64, 128)),
        *norm_cases(dtype),
        *weight_cases(dtype),
    ]
