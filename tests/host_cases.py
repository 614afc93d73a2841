"""Cases of qrelu's kernels run by themselves, and what the reference says of each."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from cuda_host import ALPHA_GRADS, MASKS, ROUNDINGS, STES, Case
from saved_for import saved_for

from coarsegrad import reference
from coarsegrad._types import MaskKind, wide_dtype
from coarsegrad.testing import hard_inputs, ulps_apart

SIZES = (0, 1, 31, 32, 33, 255, 4097, 100_003)
ALPHAS = (0.5, 0.3, 1.7, 0.0154, 41.0, 3e-5)
# (channels, inner, rows): the innermost dimension, by element and by pack; short runs, runs of whole packs and blocks;
# one row; one channel.
CHANNELS = (
    *((5, 1, 67), (70, 1, 9), (8, 1, 67), (264, 1, 9)),
    *((3, 5, 61), (2, 49, 7), (4, 64, 9), (2, 3000, 2), (40, 8, 1), (1, 3, 20)),
)
# Not regular in these dtypes: levels that collapse or overflow, or a reciprocal that does.
IRREGULAR = {
    torch.float32: (1e-40, 1e38),
    torch.bfloat16: (1e-40, 1e38),
    torch.float16: (4e-8, 3e4),
    torch.float64: (1e-310, 1e307),
}
# g' of these has a quotient or an exponential, which are not rounded alike everywhere.
X_STES = ("log_tailed_relu", "reverse_exponential")
ULPS = {torch.float32: 6, torch.float64: 12, torch.bfloat16: 1, torch.float16: 1}

# In what is asked for again and again.
hard_inputs = functools.cache(hard_inputs)


def make_x(dtype, alpha, bits, rounding, count, seed, finite=False):
    """Numbers on and beside the thresholds first, as many as there is room for, then random ones; shuffled."""
    generator = torch.Generator().manual_seed(seed)
    hard = hard_inputs(alpha, bits, rounding, dtype)
    hard = hard[torch.randperm(hard.numel(), generator=generator)][: count // 2]
    spread = alpha * 2**bits
    random = (torch.randn(count - hard.numel(), generator=generator, dtype=torch.float64) * spread).to(dtype)
    x = torch.cat([hard, random])[torch.randperm(count, generator=generator)]
    return torch.where(x.abs() < 1e30, x, 1.0).to(dtype) if finite else x


def make_grad(dtype, count, seed):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def alpha_tensor(values, dtype):
    return torch.tensor(values, dtype=wide_dtype(dtype))


def forward_case(x, alpha, bits, rounding, mask, codes, *, y=True, in_place=False, shape=None, **settings):
    """A forward of 1-d x; with `shape`, of [rows, channels, inner] with an alpha for each channel."""
    channel_dim = None if shape is None else 1
    shaped = x if shape is None else x.view(shape)
    out_y, out_mask, out_codes = reference.qrelu_forward(shaped, alpha, bits, rounding, mask, codes, channel_dim)
    expected = {"x" if in_place else "y": out_y.reshape(-1)} if y else {}
    if mask != "nothing":
        expected["mask"] = out_mask
    if codes:
        expected["codes"] = out_codes
    if shape is not None:
        settings |= {"channels": shape[1], "inner": shape[2]}
    return Case(
        "forward", x.dtype, bits, x.numel(), {"alpha": alpha, "x": x}, expected, rounding=rounding, mask=mask,
        expected=expected, **settings,
    )  # fmt: skip


def dequantize_case(codes, alpha, bits, shape, dtype, channel_dim, **settings):
    y = reference.dequantize(codes, alpha, bits, list(shape), dtype, channel_dim, torch.contiguous_format).reshape(-1)
    if channel_dim is not None:
        settings |= {"channels": shape[1], "inner": shape[2]}
    return Case(
        "dequantize", dtype, bits, y.numel(), {"alpha": alpha, "codes": codes}, {"y": y}, expected={"y": y}, **settings
    )


def backward_case(x, grad_y, alpha, bits, ste, rounding, alpha_grad, need_grad_x=True, *, shape=None, **settings):
    """A backward from what `saved` lists; expected holds grad_x, grad_alpha and grad_alpha's error bound."""
    channel_dim = None if shape is None else 1
    scale = 0.37
    mask_kind, saves_codes, saves_x = saved_for(ste, rounding, alpha_grad, need_grad_x)
    shaped = [t if shape is None else t.view(shape) for t in (x, grad_y)]
    _, mask, codes = reference.qrelu_forward(shaped[0], alpha, bits, rounding, mask_kind, saves_codes, channel_dim)
    inputs = {"grad_y": grad_y}
    if saves_x:
        inputs |= {"x": x, "alpha": alpha}
    if mask_kind != MaskKind.nothing:
        inputs["mask"] = mask
    if saves_codes:
        inputs["codes"] = codes

    def gradients(dy):
        return reference.qrelu_backward(
            dy, alpha if saves_x else None, shaped[0] if saves_x else None,
            mask if mask_kind != MaskKind.nothing else None, codes if saves_codes else None, bits, ste, rounding,
            alpha_grad or "exact", scale, channel_dim, need_grad_x, alpha_grad is not None,
        )  # fmt: skip

    grad_x, grad_alpha = gradients(shaped[1])
    expected, outputs = {}, {}
    if need_grad_x:
        expected["grad_x"] = outputs["grad_x"] = grad_x.reshape(-1)
    if alpha_grad is not None:
        expected["grad_alpha"] = outputs["grad_alpha"] = grad_alpha
        if x.numel():
            # Every term is at most |dy| times this, under chain with u g'(u) beside the code.
            u = x.double().abs().max() / alpha.double().min()
            most = 2**bits + (u if alpha_grad == "chain" else 0)
            size = scale * grad_y.double().abs().view(shape or (1, 1, -1)).sum((0, 2)) * most
        else:
            size = torch.zeros(alpha.numel(), dtype=torch.float64)
        expected["bound"] = size * (1e-14 if x.dtype == torch.float64 else 1e-6) + 1e-300
    if shape is not None:
        settings |= {"channels": shape[1], "inner": shape[2]}
    return Case(
        "backward", x.dtype, bits, x.numel(), inputs, outputs, rounding=rounding, mask=MASKS[mask_kind], ste=ste,
        alpha_grad=alpha_grad or "exact", scale=scale, expected=expected, **settings,
    )  # fmt: skip


def same(a, b):
    """Equal to the bit, but that any NaN equals any NaN."""
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    nan = a.isnan()
    if not torch.equal(nan, b.isnan()):
        return False
    a, b = (torch.cat([t.masked_fill(nan, 0).double(), t.masked_fill(nan, 0).signbit().double()]) for t in (a, b))
    return torch.equal(a, b)


def wrong_outputs(case, result):
    """The names of the outputs that are not what the reference says."""
    wrong = []
    for name, got in result.items():
        want = case.expected[name]
        if name == "grad_alpha":
            right = ((got.double() - want.double()).abs() <= case.expected["bound"]).all()
        elif name == "grad_x" and case.ste in X_STES:
            right = (ulps_apart(got, want) <= ULPS[case.dtype]).all()
        else:
            right = same(got, want)
        if not right:
            wrong.append(name)
    return wrong


def forward_cases(dtype, sizes=SIZES[:-1], all_bits=range(1, 9)):
    """Every kernel of the forward at every number of bits, and at every size, aligned and not."""
    sizes, numbers = itertools.cycle(sizes), itertools.count()
    for rounding, mask, codes, bits in itertools.product(ROUNDINGS, MASKS, (False, True), all_bits):
        for size in (next(sizes), next(sizes)):
            n = next(numbers)
            alpha = alpha_tensor([ALPHAS[n % len(ALPHAS)]], dtype)
            x = make_x(dtype, alpha.item(), bits, rounding, size, n)
            yield forward_case(
                x, alpha, bits, rounding, mask, codes, y=not codes or n % 3 > 0, in_place=codes and n % 3 == 1,
                offset=n % 2 * (1 + n % 3), seed=n,
            )  # fmt: skip


def dequantize_cases(dtype, sizes=SIZES[:-1]):
    numbers = itertools.count()
    for bits, size in itertools.product(range(1, 9), sizes):
        n = next(numbers)
        alpha = alpha_tensor([ALPHAS[n % len(ALPHAS)]], dtype)
        x = make_x(dtype, alpha.item(), bits, "ceil", size, n)
        codes = reference.qrelu_codes(x, alpha, bits, "ceil", None)
        yield dequantize_case(codes, alpha, bits, (size,), dtype, None, offset=n % 2, seed=n)


def backward_from_slopes_cases(dtype, sizes=SIZES[:-1], all_bits=range(1, 9)):
    """A slope is now and then 0, where dy is infinite too."""
    for n, (bits, size) in enumerate(itertools.product(all_bits, sizes)):
        x = make_x(dtype, 0.3, bits, "ceil", size, n)
        codes = reference.qrelu_codes(x, alpha_tensor([0.3], dtype), bits, "ceil", None)
        slopes = make_grad(wide_dtype(dtype), 2**bits, n)
        slopes[n % 3 :: 3] = 0
        grad_y = make_grad(dtype, size, n + 1)
        grad_y[::7] = math.inf
        grad_x = reference.backward_from_slopes(grad_y, codes, slopes, bits)
        inputs = {"grad_y": grad_y, "codes": codes, "slopes": slopes}
        yield Case(
            "backward_from_slopes", dtype, bits, size, inputs, {"grad_x": grad_x}, expected={"grad_x": grad_x},
            offset=n % 2, seed=n,
        )  # fmt: skip


def backward_cases(dtype, sizes=SIZES[:-1], all_bits=range(1, 9), roundings=ROUNDINGS):
    """Every STE with every rule for alpha, and without; all widths of codes; grad_alpha alone too."""
    numbers = itertools.count()
    for ste, rounding, alpha_grad in itertools.product(STES, roundings, (None, *ALPHA_GRADS)):
        if ste == "identity" and alpha_grad is None:
            continue  # nothing is kept and dx is dy
        for bits in all_bits:
            n = next(numbers)
            size = sizes[n % len(sizes)]
            alpha = alpha_tensor([ALPHAS[n % len(ALPHAS)]], dtype)
            x = make_x(dtype, alpha.item(), bits, rounding, size, n, finite=alpha_grad == "chain")
            yield backward_case(
                x, make_grad(dtype, size, n), alpha, bits, ste, rounding, alpha_grad,
                need_grad_x=alpha_grad is None or n % 5 > 0, offset=n // 2 % 2, seed=n,
            )  # fmt: skip


def channel_cases(dtype, sizes=CHANNELS):
    numbers = itertools.count()
    for (channels, inner, rows), bits, rounding in itertools.product(sizes, (2, 8), ROUNDINGS):
        n = next(numbers)
        alpha = alpha_tensor([ALPHAS[(n + i) % 5] for i in range(channels)], dtype)
        shape, count = (rows, channels, inner), rows * channels * inner
        x = torch.stack([make_x(dtype, a.item(), bits, rounding, rows * inner, n + i).view(rows, inner)
                         for i, a in enumerate(alpha)], 1).reshape(-1)  # fmt: skip
        settings = {"shape": shape, "offset": n % 2, "seed": n}
        yield forward_case(x, alpha, bits, rounding, MASKS[n % len(MASKS)], n % 3 == 0, **settings)
        codes = reference.qrelu_codes(x.view(shape), alpha, bits, rounding, 1)
        yield dequantize_case(codes, alpha, bits, shape, dtype, 1, offset=n % 2, seed=n)
        grad_y = make_grad(dtype, count, n)
        yield backward_case(x, grad_y, alpha, bits, X_STES[n % 2], rounding, None, **settings)
        for alpha_grad in ALPHA_GRADS:
            finite = torch.where(x.abs() < 1e30, x, 1.0).to(dtype) if alpha_grad == "chain" else x
            ste = STES[(n + len(alpha_grad)) % len(STES)]
            yield backward_case(finite, grad_y, alpha, bits, ste, rounding, alpha_grad, n % 5 > 0, **settings)
