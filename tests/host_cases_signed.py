"""Cases of the kernels of the signed staircase and of the Hadamard rotation run by themselves, and what the reference
says of each."""

from __future__ import annotations

import itertools
import math

import torch
from cuda_host import Case
from host_cases import ALPHAS, CHANNELS, alpha_tensor

from coarsegrad import reference
from coarsegrad._types import wide_dtype
from coarsegrad.reference.signed import group_alphas, signed_levels

SIZES = (0, 1, 31, 32, 33, 255, 4097)
BITS = range(2, 9)
# (shape, group): any groups; groups of whole chunks within a warp, some more and some less than a tile of them; and
# longer ones, a power of two and not, for a block of threads once over and several times.
GROUPS = (
    *(((0, 64), 32), ((5, 7), 1), ((7, 9), 3), ((3, 100), 100), ((3, 1001), 1001), ((2, 66), 2)),
    *(((9, 32), 8), ((3, 96), 32), ((70, 64), 64), ((41, 128), 128), ((33, 256), 256)),
    *(((2, 96), 96), ((5, 1024), 512), ((3, 3000), 1000), ((2, 20_008), 20_008)),
)


def hard_inputs(alpha, bits, dtype):
    """Every level and threshold with both neighbours in dtype, and all special values."""
    levels = signed_levels(torch.tensor([alpha], dtype=wide_dtype(dtype)), bits, dtype)[0]
    on = torch.cat([levels, (levels[1:] + levels[:-1]) / 2]).to(dtype)
    neighbours = [torch.nextafter(on, torch.full_like(on, end)) for end in (-math.inf, math.inf)]
    finite = torch.finfo(dtype)
    special = torch.tensor([0.0, finite.max, math.inf, finite.smallest_normal, finite.smallest_normal * finite.eps])
    special = torch.cat([special, -special, torch.tensor([math.nan])]).to(dtype)
    return torch.cat([on, *neighbours, special])


def make_x(dtype, alpha, bits, count, seed):
    """Numbers on and beside the thresholds, as many as there is room for in half of it; and random ones."""
    generator = torch.Generator().manual_seed(seed)
    hard = hard_inputs(alpha, bits, dtype)
    hard = hard[torch.randperm(hard.numel(), generator=generator)][: (count + 1) // 2]
    spread = alpha * 2**bits / 4
    random = (torch.randn(count - hard.numel(), generator=generator, dtype=torch.float64) * spread).to(dtype)
    return torch.cat([hard, random])[torch.randperm(count, generator=generator)]


def make_group(dtype, bits, size, seed):
    """A group with a dynamic alpha, its numbers on and beside the thresholds; every few groups a special one."""
    generator = torch.Generator().manual_seed(seed)
    finite = torch.finfo(dtype)
    scales = (1.0, 0.01, 300.0, 1.0, finite.max, finite.smallest_normal, finite.smallest_normal * finite.eps * 3)
    largest = (torch.rand(1, generator=generator, dtype=torch.float64) * 0.9 + 0.1) * scales[seed % len(scales)]
    largest = largest.to(dtype)
    hard = hard_inputs(group_alphas(largest, bits, 1).item(), bits, dtype)
    hard = torch.where(hard.abs() <= largest, hard, 0)
    group = hard[torch.randint(hard.numel(), (size,), generator=generator)]
    at = torch.randint(size, (2,), generator=generator)
    group[at[0]] = largest if seed % 2 else -largest
    if seed % 11 == 5:
        group.zero_()
        group[at[1]] = -0.0
    elif seed % 11 in (7, 9):
        group[at[1]] = math.nan if seed % 11 == 7 else -math.inf
    return group


def forward_case(x, alpha, bits, mask, codes, *, group=None, shape=None, **settings):
    """alpha: None if dynamic. x is 1-d, or of [rows, channels, inner] with `shape` and an alpha for each channel; of
    [rows, n] for groups."""
    channel_dim = None if shape is None else 1
    shaped = x if shape is None else x.view(shape)
    y, found, out_mask, out_codes = reference.qsigned_forward(shaped, alpha, bits, group, mask, codes, channel_dim)
    expected = {"y": y.reshape(-1)}
    if mask:
        expected["mask"] = out_mask
    if codes:
        expected["codes"] = out_codes
    inputs = {"x": x.reshape(-1)}
    if alpha is None:
        expected["group_alphas"] = found.reshape(-1)
    else:
        inputs["alpha"] = alpha
    if shape is not None:
        settings |= {"channels": shape[1], "inner": shape[2]}
    return Case(
        "signed_forward", x.dtype, bits, x.numel(), inputs, expected, group=group or 0, expected=expected, **settings
    )


def dequantize_case(codes, alpha, bits, shape, dtype, *, group=None, **settings):
    channel_dim = None if group is not None or len(shape) != 3 else 1
    y = reference.qsigned_dequantize(
        codes, alpha, bits, group, list(shape), dtype, channel_dim, torch.contiguous_format
    ).reshape(-1)
    if channel_dim is not None:
        settings |= {"channels": shape[1], "inner": shape[2]}
    inputs = {"codes": codes, "alpha" if group is None else "group_alphas": alpha.reshape(-1)}
    return Case(
        "signed_dequantize", dtype, bits, y.numel(), inputs, {"y": y}, group=group or 0, expected={"y": y}, **settings
    )


def hadamard_case(x, size, **settings):
    y = reference.hadamard(x, size)
    return Case(
        "hadamard", x.dtype, 0, x.numel(), {"x": x}, {"y": y}, group=size, scale=size**-0.5, expected={"y": y},
        **settings,
    )  # fmt: skip


def given_cases(dtype, sizes=SIZES, all_bits=BITS):
    """One alpha: forward and back, at every number of bits and size, aligned and not."""
    sizes, numbers = itertools.cycle(sizes), itertools.count()
    for bits, mask, codes in itertools.product(all_bits, (False, True), (False, True)):
        n, size = next(numbers), next(sizes)
        alpha = alpha_tensor([ALPHAS[n % len(ALPHAS)]], dtype)
        x = make_x(dtype, alpha.item(), bits, size, n)
        case = forward_case(x, alpha, bits, mask, codes, offset=n % 2, seed=n)
        yield case
        if codes:
            yield dequantize_case(case.expected["codes"], alpha, bits, x.shape, dtype, offset=n // 2 % 2, seed=n)


def channel_cases(dtype):
    for n, ((channels, inner, rows), bits) in enumerate(itertools.product(CHANNELS, (2, 5, 8))):
        alpha = alpha_tensor([ALPHAS[(n + i) % 5] for i in range(channels)], dtype)
        shape = (rows, channels, inner)
        x = torch.stack([make_x(dtype, a.item(), bits, rows * inner, n + i).view(rows, inner)
                         for i, a in enumerate(alpha)], 1).reshape(-1)  # fmt: skip
        case = forward_case(x, alpha, bits, n % 2 > 0, True, shape=shape, offset=n % 2, seed=n)
        yield case
        yield dequantize_case(case.expected["codes"], alpha, bits, shape, dtype, offset=n // 2 % 2, seed=n)


def group_cases(dtype, all_bits=BITS, groups=GROUPS):
    """Dynamic alphas: forward and back, all groups at every other number of bits, aligned and not."""
    for n, ((shape, group), bits) in enumerate(itertools.product(groups, all_bits)):
        if n % 2 and len(all_bits) > 1:
            continue
        count = math.prod(shape)
        made = [make_group(dtype, bits, group, n + i) for i in range(count // group)]
        x = torch.cat(made).view(shape) if made else torch.empty(shape, dtype=dtype)
        case = forward_case(x, None, bits, False, n % 3 > 0, group=group, offset=n % 8 // 6, seed=n)
        yield case
        codes = torch.randint(256, (reference.qsigned_forward(x, None, bits, group, False, True, None)[3].numel(),),
                              generator=torch.Generator().manual_seed(n), dtype=torch.uint8)  # fmt: skip
        alphas = case.expected["group_alphas"].view(*shape[:-1], -1) if count else torch.empty(0, dtype=torch.bfloat16)
        yield dequantize_case(codes, alphas, bits, shape, dtype, group=group, offset=n % 8 // 6, seed=n)


def hadamard_cases(dtype, sizes=(1, 2, 4, 8, 16, 64, 128, 256, 1024)):
    for n, (size, blocks) in enumerate(itertools.product(sizes, (1, 3, 33))):
        generator = torch.Generator().manual_seed(n)
        x = torch.randn(size * blocks, generator=generator, dtype=torch.float64).mul(10.0 ** (n % 5)).to(dtype)
        x[:: 7 * size] = math.inf if n % 3 else torch.finfo(dtype).max
        yield hadamard_case(x, size, offset=n % 5 // 4, seed=n)
