"""The machine code of the matrix products of `qrelu_mlp`, for every architecture, and the tiles to choose from."""

from __future__ import annotations

import re

import pytest
from test_sass import TRITON_LISTED
from tools.sass import triton_kernels
from tools.sass.gate import ARCHS
from tools.sass.ptx import listed

pytestmark = pytest.mark.skipif(not triton_kernels.installed(), reason="triton is not installed")

# Of bfloat16, and of float16.
_MATRIX_PRODUCTS = {
    "sm_80": r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.{0}\.{0}",
    "sm_90": r"wgmma\.mma_async\S*\.f32\.{0}\.{0}",
    "sm_100": r"tcgen05\.mma\S*kind::f16",
    "sm_120": r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.{0}\.{0}",
}
_MLP = (  # op, bits, dtype, ste, squared, factors
    ("linear_to_codes", 4, "bfloat16", "clipped_relu", False, 1),
    ("linear_to_codes", 2, "float16", "relu", False, 1),
    ("linear_from_codes", 4, "bfloat16", "clipped_relu", False, 1),
    ("linear_from_codes", 1, "float16", "clipped_relu", True, 1),
    ("linear_from_codes", 4, "bfloat16", "clipped_relu", False, 2),
    ("linear_from_codes_grad_input", 4, "bfloat16", "clipped_relu", True, 1),
    ("linear_from_codes_grad_input", 2, "bfloat16", "relu", False, 1),
    ("linear_from_codes_grad_input", 4, "bfloat16", "clipped_relu", False, 2),
    ("linear_from_codes_grad_weight", 8, "bfloat16", "clipped_relu", False, 1),
    ("linear_from_codes_grad_weight", 4, "float16", "clipped_relu", True, 1),
    ("linear_from_codes_grad_weight", 2, "bfloat16", "relu", False, 2),
)


@pytest.mark.costly
@pytest.mark.parametrize("arch", ARCHS)
def test_mlps_in_triton(tools, arch, tmp_path):
    """Tensor cores, no stack, nothing read byte by byte; no fused or flushed step that moves a code. Tiles go round."""
    from coarsegrad.triton.mlp import TILES

    for i, (op, bits, dtype, *rest) in enumerate(_MLP):
        tile = (i + ARCHS.index(arch)) % len(TILES)
        made = triton_kernels.compiled(triton_kernels.mlp(op, tile, bits, dtype, *rest), arch, tmp_path)
        ptx = made.asm["ptx"]
        case = op, bits, dtype, rest, TILES[tile]
        assert re.search(_MATRIX_PRODUCTS[arch].format("bf16" if dtype == "bfloat16" else "f16"), ptx), case
        assert listed(ptx) <= set(TRITON_LISTED), case
        assert "fma.rn" not in ptx and not re.search(r"ld\.global\S*\.b8", ptx), case
        assert triton_kernels.binaries([made])[0].stack == 0, case


def test_the_fastest_tile_is_chosen_by_the_sizes():
    """Of all of them, and for the sizes by which a launch names them."""
    from coarsegrad.triton.mlp import _KERNELS, TILES

    for name, kernel in _KERNELS.items():
        tiles = [(c.kwargs["ROWS"], c.kwargs["COLUMNS"], c.kwargs["STEP"], c.num_warps, c.num_stages)
                 for c in kernel.configs]  # fmt: skip
        assert tuple(tiles) == TILES, name
        assert len(kernel.keys) == 3 and set(kernel.keys) <= set(kernel.fn.arg_names) and kernel.cache_results, name
