"""Every layout of x gives what its contiguous clone gives, in an output of x's memory format."""

from __future__ import annotations

import oracle
import pytest
import torch

import coarsegrad as cg

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice of the batch": lambda x: torch.cat([x, x])[1:],
    "every second column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "an offset of one element": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
    "slice of channels": lambda x: torch.cat([x, x], 1)[:, 2:5],
    "slice of channels_last": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, 1:5],
    "transposed": lambda x: x.transpose(1, 3),
    "transposed inside": lambda x: x.transpose(2, 3),
    "permuted": lambda x: x.permute(3, 1, 0, 2),
    "flipped order of dims": lambda x: x.permute(3, 2, 1, 0),
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded channels": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "expanded scalar": lambda x: x[0, 0, 0, 0].expand(3, 2, 2, 5),
    "3-d": lambda x: x[0],
    "2-d": lambda x: x[0, 0],
    "2-d transposed": lambda x: x[0, 0].t(),
    "2-d column": lambda x: x[0, 0][:, 1:2],
    "1-d": lambda x: x.reshape(-1),
    "1-d strided": lambda x: x.reshape(-1)[::3],
    "1 element": lambda x: x.reshape(-1)[:1],
    "0-d": lambda x: x[1, 1, 1, 1],
    "empty": lambda x: x[:0],
    "empty inside": lambda x: x[:, :, 1:1],
    "empty channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)[:0],
    "1-d empty": lambda x: x.reshape(-1)[:0],
    "one channel": lambda x: x[:, :1],
    "one channel, channels_last": lambda x: x[:, :1].contiguous(memory_format=torch.channels_last),
    "one pixel": lambda x: x[:, :, :1, :1],
    "one pixel, channels_last": lambda x: x[:, :, :1, :1].contiguous(memory_format=torch.channels_last),
    "one row": lambda x: x[:, :, :1],
    "one channel of stride 1": lambda x: x.as_strided((3, 1, 6, 5), (30, 1, 5, 1)),
    "one sample of stride 0": lambda x: x.as_strided((1, 4, 6, 5), (0, 30, 5, 1)),
    "one column of stride 0": lambda x: x.as_strided((3, 4, 6, 1), (24, 6, 1, 0)),
    "one pixel of odd strides": lambda x: x.as_strided((3, 4, 1, 1), (4, 1, 7, 9)),
    "two channels at one address": lambda x: x.as_strided((3, 2, 6, 5), (30, 0, 5, 1)),
    "overlapping windows": lambda x: x.as_strided((20, 9), (1, 1)),
    "one sample, channels_last": lambda x: x[:1].contiguous(memory_format=torch.channels_last),
    "5-d": lambda x: x.unsqueeze(2),
    "channels_last_3d": lambda x: (
        x.repeat_interleave(3, 3).unflatten(3, (5, 3)).contiguous(memory_format=torch.channels_last_3d)
    ),
    "6-d": lambda x: x.unsqueeze(0).unsqueeze(3),
}


def image(dtype=torch.float32):
    return torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


def alpha_for(x, channel_dim):
    count = 1 if channel_dim is None else x.size(channel_dim)
    return oracle.log_uniform(count, 0.1, 1, seed=count) if count else torch.ones(0)


def clone_of(x):
    """A fresh tensor with the same numbers in default order."""
    return x.clone(memory_format=torch.contiguous_format)


def run(x, alpha, dy, **options):
    x, alpha = x.detach().requires_grad_(), alpha.clone().requires_grad_()
    y = cg.qrelu(x, alpha, 2, **options)
    grads = torch.autograd.grad(y, (x, alpha), dy)
    return y, *grads


@pytest.mark.parametrize("alpha_grad", ["exact", "three_valued", "chain"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_to_the_contiguous_clone(backend, layout, alpha_grad):
    """Forward, codes, dx and dalpha, per tensor and per channel along every dim, counted from either end."""
    x = LAYOUTS[layout](image())
    for channel_dim in (None, *range(-x.dim(), x.dim())):
        alpha = alpha_for(x, channel_dim)
        if channel_dim is not None and alpha.numel() == 0:
            continue  # an empty channel dim has its own test
        options = dict(channel_dim=channel_dim, alpha_grad=alpha_grad)
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        y, dx, dalpha = run(x, alpha, dy, **options)
        want_y, want_dx, want_dalpha = run(clone_of(x), alpha, dy, **options)
        assert torch.equal(y, want_y) and torch.equal(dx, want_dx)
        assert torch.equal(y, oracle.output(x, alpha, 2, "ceil", channel_dim))
        assert dalpha.shape == alpha.shape and torch.allclose(dalpha, want_dalpha, rtol=1e-5, atol=1e-5)
        packed = cg.qrelu_codes(x, alpha, 2, channel_dim=channel_dim)
        code = torch.empty_like(y, dtype=torch.int64).copy_(oracle.codes(x, alpha, 2, "ceil", channel_dim))
        assert torch.equal(oracle.unpack(packed, 2, x.numel()), oracle.memory_order(code))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_dtype(backend, layout, dtype):
    x = LAYOUTS[layout](image(dtype))
    alpha = torch.tensor([0.3])
    for ste in ("identity", "clipped_relu", "reverse_exponential"):
        y, dx, _ = run(x, alpha, torch.ones(x.shape, dtype=dtype), ste=ste)
        want_y, want_dx, _ = run(clone_of(x), alpha, torch.ones(x.shape, dtype=dtype), ste=ste)
        assert torch.equal(y, want_y) and torch.equal(dx, want_dx)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_of_the_output(backend, layout):
    """The output is dense: channels-last where x's strides say so, else contiguous; its gradient likewise."""
    x = LAYOUTS[layout](image())
    wanted = torch.empty_like(x, memory_format=torch._prims_common.suggest_memory_format(x)).stride()
    y, dx, _ = run(x, torch.tensor([0.3]), torch.ones(x.shape))
    assert y.stride() == wanted and y.storage_offset() == 0
    assert y.untyped_storage().nbytes() == 4 * y.numel()
    assert dx.shape == x.shape


def test_memory_formats_by_hand(backend):
    """The layouts people have: what goes in comes out."""
    alpha, x = torch.tensor([0.3]), image()
    last = x.contiguous(memory_format=torch.channels_last)
    assert cg.qrelu(x, alpha).is_contiguous()
    assert cg.qrelu(last, alpha).is_contiguous(memory_format=torch.channels_last)
    assert cg.qrelu(last[:, 1:3], alpha).is_contiguous(memory_format=torch.channels_last)
    assert cg.qrelu(x[:, :, ::2], alpha).is_contiguous()
    assert cg.qrelu(x[:1].expand(3, -1, -1, -1), alpha).is_contiguous()
    assert cg.qrelu(x[0, 0].t(), alpha).is_contiguous()
    volume = x.unsqueeze(2).repeat(1, 1, 3, 1, 1).contiguous(memory_format=torch.channels_last_3d)
    assert cg.qrelu(volume, alpha).is_contiguous(memory_format=torch.channels_last_3d)


def test_an_empty_channel_dim(backend):
    """No channels, no alphas, no elements: empty in, empty out."""
    x, alpha = torch.zeros(3, 0, 5), torch.zeros(0)
    y, dx, dalpha = run(x, alpha, torch.zeros(3, 0, 5), channel_dim=1)
    assert y.shape == dx.shape == (3, 0, 5) and dalpha.shape == (0,)


def test_no_elements_give_a_zero_grad_alpha(backend):
    for shape, channel_dim, count in (((0,), None, 1), ((0, 3), None, 1), ((0, 3), 1, 3)):
        for alpha_grad in oracle.ALPHA_GRADS:
            x, alpha = torch.zeros(shape), torch.ones(count)
            _, _, dalpha = run(x, alpha, torch.zeros(shape), channel_dim=channel_dim, alpha_grad=alpha_grad)
            assert torch.equal(dalpha, torch.zeros(count))


@pytest.mark.parametrize("ste", ["clipped_relu", "reverse_exponential"])
def test_alpha_of_any_strides(backend, ste):
    """A slice, and one number expanded over the channels, as alpha."""
    x, dy = image(), torch.ones(3, 4, 6, 5)
    every_second, shared = torch.linspace(0.1, 0.8, 8)[::2], torch.tensor([0.3]).expand(4)
    for alpha in (every_second, shared):
        for alpha_grad in ("exact", "chain"):
            y = cg.qrelu(x, alpha, 2, channel_dim=1)
            assert torch.equal(y, oracle.output(x, alpha, 2, "ceil", 1))
            codes = cg.qrelu_codes(x, alpha, 2, channel_dim=1)
            assert torch.equal(cg.dequantize(codes, alpha, 2, x.shape, x.dtype, channel_dim=1), y)
            leaf = alpha.detach().requires_grad_()
            again = alpha.contiguous().requires_grad_()
            grads = [
                torch.autograd.grad(cg.qrelu(x, a, 2, ste=ste, alpha_grad=alpha_grad, channel_dim=1), a, dy)[0]
                for a in (leaf, again)
            ]
            assert torch.equal(*grads)


def test_a_zero_d_input_stays_zero_d(backend):
    y = cg.qrelu(torch.tensor(0.7), torch.tensor([0.5]), 2)
    assert y.shape == () and y.item() == 1.0
    assert cg.qrelu_codes(torch.tensor(0.7), torch.tensor([0.5]), 2).tolist() == [2]


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 100])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_any_number_of_channels(backend, channels, memory_format):
    """Inner strides around every vector width; per-channel sums must not leak into a neighbour."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, channels, 3, 5, generator=generator).contiguous(memory_format=memory_format)
    dy = torch.randn(2, channels, 3, 5, generator=generator)
    alpha = oracle.log_uniform(channels, 0.1, 1, seed=channels)
    for dtype in oracle.DTYPES:
        y, dx, dalpha = run(x.to(dtype), alpha, dy.to(dtype), channel_dim=1, alpha_grad="exact")
        want = oracle.Staircase64(x.to(dtype), alpha, 2, "ceil", 1)
        assert torch.equal(y, oracle.output(x.to(dtype), alpha, 2, "ceil", 1))
        assert torch.equal(dx.double(), want.grad_x(dy.to(dtype), "clipped_relu"))
        grad, size = want.grad_alpha(dy.to(dtype), "clipped_relu", "exact")
        assert ((dalpha.double() - grad).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every second column", "transposed", "1-d strided"])
def test_in_place_writes_through_the_strides_of_x(backend, layout):
    """In place on any non-overlapping layout: the view is overwritten and what lies between it is not."""
    base = image()
    x = LAYOUTS[layout](base)
    want = oracle.output(x, torch.tensor([0.3]), 2, "ceil")
    strides, pointer = x.stride(), x.data_ptr()
    y = cg.qrelu(x, torch.tensor([0.3]), 2, inplace=True)
    assert y.data_ptr() == pointer and y.stride() == strides and torch.equal(x, want)


def test_in_place_leaves_the_gaps_alone(backend):
    base = torch.full((8, 8), 0.7)
    cg.qrelu(base[::2, 1::3], torch.tensor([0.5]), 2, inplace=True)
    want = torch.full((8, 8), 0.7)
    want[::2, 1::3] = 1.0
    assert torch.equal(base, want)


def test_in_place_on_overlapping_memory_is_refused(backend):
    """Several elements at one address, as torch.relu_ refuses it."""
    x = torch.full((1, 4), 0.7).expand(3, 4)
    with pytest.raises((ValueError, RuntimeError), match="(?i)(single memory location|overlap|expand)"):
        cg.qrelu(x, torch.tensor([0.5]), 2, inplace=True)
    assert (x == 0.7).all()
