"""The same bits on every run and with any number of threads, on inputs that are cut into several chunks."""

from __future__ import annotations

import oracle
import pytest
import torch

import coarsegrad as cg


@pytest.fixture
def threads():
    """Sets the number of threads; put back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


CASES = {
    "per tensor": ((300_007,), torch.float32, None, torch.contiguous_format),
    "per tensor, bfloat16": ((300_007,), torch.bfloat16, None, torch.contiguous_format),
    "per channel, outer": ((7, 43_001), torch.float16, 0, torch.contiguous_format),
    "per channel, images": ((4, 24, 57, 55), torch.float32, 1, torch.contiguous_format),
    "per channel, channels_last": ((4, 24, 57, 55), torch.bfloat16, 1, torch.channels_last),
    "per channel, last dim": ((3001, 101), torch.float64, -1, torch.contiguous_format),
    "per channel, last dim of 96": ((3001, 96), torch.bfloat16, -1, torch.contiguous_format),
    "per channel, last dim of 160": ((3001, 160), torch.float32, -1, torch.contiguous_format),
}


def everything(x, alpha, dy, channel_dim, **options):
    leaf, step = x.detach().requires_grad_(), alpha.clone().requires_grad_()
    y = cg.qrelu(leaf, step, 2, channel_dim=channel_dim, **options)
    y.backward(dy)
    codes = cg.qrelu_codes(x, alpha, 2, channel_dim=channel_dim)
    memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    rebuilt = cg.dequantize(codes, alpha, 2, x.shape, x.dtype, channel_dim=channel_dim, memory_format=memory_format)
    return y.detach(), leaf.grad, step.grad, codes, rebuilt


@pytest.mark.parametrize("alpha_grad", ["exact", "three_valued", "chain"])
@pytest.mark.parametrize("case", CASES)
def test_same_bits_on_every_run_and_any_number_of_threads(backend, threads, case, alpha_grad):
    shape, dtype, channel_dim, memory_format = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    dy = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    alpha = torch.full((1 if channel_dim is None else x.size(channel_dim),), 0.4)
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(everything(x, alpha, dy, channel_dim, alpha_grad=alpha_grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    threads(1)
    y, dx, dalpha, codes, rebuilt = results[0]
    want = oracle.Staircase64(x, alpha, 2, "ceil", channel_dim)
    assert torch.equal(y, oracle.output(x, alpha, 2, "ceil", channel_dim)) and torch.equal(rebuilt, y)
    assert torch.equal(dx.double(), want.grad_x(dy, "clipped_relu"))
    grad, size = want.grad_alpha(dy, "clipped_relu", alpha_grad)
    assert ((dalpha.double() - grad).abs() <= 1e-5 * size).all()
    in_order = torch.empty_like(y, dtype=torch.uint8).copy_(want.code)
    assert torch.equal(oracle.unpack(codes, 2, x.numel()), oracle.memory_order(in_order).long())


@pytest.mark.parametrize("bits, ste", [(2, "clipped_relu"), (8, "reverse_exponential")])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_more_than_the_caches_hold(backend, threads, dtype, bits, ste):
    """8 MiB, which kernels may store past the caches, and sum in longer chunks: its thirds again give the whole."""
    threads(2)
    size = 2**23 * 8 // torch.finfo(dtype).bits + 13
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    alpha = torch.tensor([1.6 / 2**bits])

    def run(x):
        leaf, step = x.detach().requires_grad_(), alpha.clone().requires_grad_()
        y = cg.qrelu(leaf, step, bits, ste=ste, alpha_grad="exact")
        y.backward(x)
        rebuilt = cg.dequantize(cg.qrelu_codes(x, alpha, bits), alpha, bits, x.shape, dtype)
        return y.detach(), leaf.grad, rebuilt, step.grad.double()

    *whole, grad_alpha = run(x)
    *pieces, grad_alphas = zip(*map(run, x.split(size // 3 + 7)), strict=True)
    for got, parts in zip(whole, pieces, strict=True):
        assert torch.equal(got, torch.cat(parts))
    assert torch.equal(whole[0], whole[2])
    assert grad_alpha.item() == pytest.approx(sum(grad_alphas).item(), rel=1e-4)


@pytest.mark.parametrize("ste", ["log_tailed_relu", "reverse_exponential"])
def test_same_bits_of_smooth_gradients(backend, threads, ste):
    x = torch.randn(300_007, generator=torch.Generator().manual_seed(0))
    results = []
    for count in (1, 2, 1):
        threads(count)
        results.append(everything(x, torch.tensor([0.1]), torch.ones_like(x), None, ste=ste, alpha_grad="chain"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_an_elements_value_does_not_depend_on_its_place(backend, dtype):
    """Vector bodies and scalar tails compute the same: cut anywhere, the pieces are the whole."""
    x = torch.randn(70_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    for ste in oracle.STES:
        leaf = x.clone().requires_grad_()
        y = cg.qrelu(leaf, torch.tensor([0.1]), 4, ste=ste)
        y.backward(torch.ones_like(y))
        for start, stop in ((0, 1), (1, 18), (3, 130), (13, 40_000), (32_767, 32_769), (69_990, 70_001)):
            part = x[start:stop].clone().requires_grad_()
            z = cg.qrelu(part, torch.tensor([0.1]), 4, ste=ste)
            z.backward(torch.ones_like(z))
            assert torch.equal(z, y[start:stop]) and torch.equal(part.grad, leaf.grad[start:stop])
