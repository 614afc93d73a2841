"""The signed staircase once more: what every backend is compared with. Nothing here imports coarsegrad."""

from __future__ import annotations

import math

import oracle
import torch


def levels(alpha: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """L[c, k + p], shape [C, 2 p + 1], of dtype."""
    p = 2 ** (bits - 1) - 1
    k = torch.arange(-p, p + 1, dtype=oracle.wide(dtype))
    return (k * alpha.detach().to(oracle.wide(dtype)).reshape(-1, 1)).to(dtype)


def thresholds(alpha: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The midpoints, shape [C, 2 p], wide."""
    level = levels(alpha, bits, dtype).to(oracle.wide(dtype))
    return (level[:, :-1] + level[:, 1:]) / 2


def codes_of_rows(rows: torch.Tensor, alpha: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of [C, n], a row for each alpha: how many thresholds lie below."""
    edges = thresholds(alpha, bits, rows.dtype)
    above = rows.to(edges.dtype)[:, :, None] > edges[:, None, :]
    code = above.sum(2)
    no_stairs = rows.isnan() | ~(alpha.to(edges.dtype).reshape(-1, 1) > 0)
    return code.masked_fill(no_stairs, 2 ** (bits - 1) - 1)


def output_of_rows(rows: torch.Tensor, alpha: torch.Tensor, bits: int) -> torch.Tensor:
    y = levels(alpha, bits, rows.dtype).gather(1, codes_of_rows(rows, alpha, bits))
    return torch.where(rows.isnan(), rows, y)


def group_alphas(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The least bfloat16 that is not below the quotient max|x| / p, group by group."""
    largest = x.to(oracle.wide(x.dtype)).abs().reshape(*x.shape[:-1], -1, group).amax(-1)
    quotient = largest / (2 ** (bits - 1) - 1)
    alpha = quotient.to(torch.bfloat16)
    alpha = torch.where(alpha < quotient, torch.nextafter(alpha, torch.full_like(alpha, math.inf)), alpha)
    return torch.where(alpha.isfinite(), alpha, torch.nan)


def dynamic(x: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, codes, alphas)"""
    alpha = group_alphas(x, bits, group)
    rows, wide = x.reshape(-1, group), alpha.to(oracle.wide(x.dtype)).flatten()
    codes = codes_of_rows(rows, wide, bits).reshape(x.shape)
    return output_of_rows(rows, wide, bits).reshape(x.shape), codes, alpha


def hadamard_matrix(size: int) -> torch.Tensor:
    """Sylvester's, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def rotated(x: torch.Tensor, size: int) -> torch.Tensor:
    """The butterfly, a number at a time but for the rows."""
    v = [column.to(oracle.wide(x.dtype)) for column in x.reshape(-1, size).unbind(1)]
    distance = 1
    while distance < size:
        for i in range(size):
            if not i & distance:
                v[i], v[i + distance] = v[i] + v[i + distance], v[i] - v[i + distance]
        distance *= 2
    factor = torch.tensor(1 / size, dtype=torch.float64).sqrt().to(oracle.wide(x.dtype))
    return (torch.stack(v, 1) * factor).to(x.dtype).reshape(x.shape)
