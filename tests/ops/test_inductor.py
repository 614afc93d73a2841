"""The code that Inductor makes of a qrelu of which nothing is saved: no call of the op, and the oracle's bits."""

from __future__ import annotations

import itertools
import re

import oracle
import pytest
import torch
from torch import nn

import coarsegrad as cg

inductor = pytest.importorskip("torch._inductor.utils")
ROUNDINGS = ("ceil", "nearest", "hwgq")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def test_caches_of_compiled_code_know_how_these_ops_are_compiled():
    """torch's keys have the names of ops, but neither how they are lowered nor the pass over the joint graph."""
    torch._dynamo.reset()
    torch.compile(cg.QReLU(2), fullgraph=True)(torch.randn(8))
    assert re.search(r"coarsegrad-[0-9a-f]{16}", torch.compiler.config.cache_key_tag)
    before = torch.compiler.config.cache_key_tag
    torch.compile(cg.QReLU(3), fullgraph=True)(torch.randn(8))
    assert torch.compiler.config.cache_key_tag == before  # once


def same(got, want):
    return torch.equal(got.nan_to_num(-1.0), want.nan_to_num(-1.0)) and torch.equal(got.isnan(), want.isnan())


def every_number(dtype, alpha, bits):
    """All numbers of a 16-bit dtype; of a wider one the levels, the middles, what is next to them, and the extremes."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    infinity = torch.tensor(float("inf"), dtype=dtype)
    levels = torch.arange(2**bits + 1, dtype=dtype) * alpha.to(dtype)
    edges = torch.cat([levels, (levels[1:] + levels[:-1]) / 2])
    tiny = torch.finfo(dtype).smallest_normal
    extremes = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), tiny, tiny / 4, -tiny], dtype=dtype)
    return torch.cat([edges, edges.nextafter(infinity), edges.nextafter(-infinity), -edges, extremes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bits(dtype):
    """Also if the output never leaves the kernel: its consumer gets the rounded number."""
    settings = list(itertools.product((1, 2, 4), ROUNDINGS))

    def function(xs, alpha):
        ys = [cg.qrelu(xs[bits] * 1, alpha, bits, rounding=rounding) for bits, rounding in settings]
        return ys, [y == y.to(torch.float64).to(dtype) for y in ys], [y.to(torch.float64) * 3 for y in ys]

    for i, value in enumerate((0.3, 0.1, 1.7e-3)):
        alpha = torch.tensor([value])
        xs = {bits: every_number(dtype, alpha, bits) for bits, _ in settings}
        if i == 0:
            run = torch.compile(function, fullgraph=True)
            got, code = inductor.run_and_get_code(run, xs, alpha)
            assert "coarsegrad.qrelu" not in "".join(code)
        else:
            got = run(xs, alpha)
        for (bits, rounding), y, tripled in zip(settings, got[0], got[2], strict=True):
            want = oracle.output(xs[bits], alpha, bits, rounding)
            assert same(y, want) and same(tripled, want.to(torch.float64) * 3)


def test_per_channel_and_any_batch():
    alpha = torch.tensor([0.1, 0.3, 0.7])
    run = torch.compile(lambda x: cg.qrelu(x, alpha, 2, channel_dim=1) + 1, fullgraph=True, dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 4, 4).to(memory_format=torch.channels_last)
        assert torch.equal(run(x), cg.qrelu(x, alpha, 2, channel_dim=1) + 1)


@pytest.mark.parametrize("arch", (80, 90, 100))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gpu_selects_stored_levels(dtype, arch, tmp_path):
    """Compiled ahead of time: the kernel of the staircase compares and selects. Nothing is computed that could be
    contracted, or that a flush of subnormals could reach. Its bits: triton_inductor.py."""
    pytest.importorskip("triton")
    from inductor_without_gpu import kernels, ptx, source

    def function(x, alpha):
        return (torch.ops.coarsegrad.qrelu_forward.default(x, alpha, 2, 0, 0, False, None)[0],)

    x = torch.empty(2**12, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    levels, staircase = kernels(source(function, x, torch.empty(1)), tmp_path).values()
    texts = [
        ptx(levels, {"in_ptr0": "*fp32", "out_ptr0": f"*{dtype}"}, arch, tmp_path),
        ptx(staircase, {"in_ptr0": f"*{dtype}", "in_ptr1": f"*{dtype}", "out_ptr0": f"*{dtype}"}, arch, tmp_path),
    ]
    assert set(re.findall(r"\b(?:mul|add|sub|fma|div)\.\S*f32", texts[0])) == {"mul.f32"}
    assert re.search(r"setp\.gt\S*\.b?f(?:16|32)", texts[1]) and re.search(r"selp\.[bf]\d+", texts[1])
    assert not re.search(r"\b(?:mul|add|sub|fma|div|max|min)\.\S*f32|ftz", texts[1])


def test_more_bits_call_the_op():
    x = torch.randn(64)
    y, code = inductor.run_and_get_code(torch.compile(lambda x: cg.qrelu(x + 1, 0.1, 5)), x)
    assert "coarsegrad.qrelu_forward" in "".join(code)
    assert torch.equal(y, cg.qrelu(x + 1, 0.1, 5))


def test_what_is_saved_is_made_by_the_op():
    model = nn.Sequential(nn.Linear(8, 8), cg.QReLU(2, alpha=0.25), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    run = torch.compile(model, fullgraph=True)
    with torch.enable_grad():
        _, code = inductor.run_and_get_code(lambda: run(x).sum().backward())
    assert "coarsegrad.qrelu_forward" in code[0] and "coarsegrad.qrelu_backward" in code[1]
    torch.testing.assert_close(run(x), model(x))


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_an_illegal_alpha_gives_nan(value):
    run = torch.compile(lambda x, alpha: cg.qrelu(x, alpha, 2), fullgraph=True)
    assert run(torch.randn(16), torch.tensor([value])).isnan().all()


@pytest.mark.costly
@pytest.mark.parametrize("integers", [False, True])
def test_a_package_of_aotinductor(tmp_path, integers):
    """2 bits are fused, 5 are a call of the op, and so are layers on codes."""
    torch.manual_seed(0)
    hidden = [part for bits in (2, 5) for part in (nn.Linear(16, 16), cg.QReLU(bits))]
    model, x = nn.Sequential(*hidden, nn.Linear(16, 4)).eval(), torch.randn(8, 16)
    model = cg.convert(model, (x,)) if integers else model
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=package)
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x))
