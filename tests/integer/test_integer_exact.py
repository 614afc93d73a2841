"""The codes of an integer layer against rational arithmetic, for every accumulator that can occur."""

from __future__ import annotations

from fractions import Fraction

import integer_oracle
import oracle
import pytest
import torch

from coarsegrad.integer import layers
from coarsegrad.integer.exact import edges, exact_affine, first_above
from coarsegrad.integer.layers import CannotConvert, Norm, Staircase, integer_layer
from coarsegrad.integer.reference import affine_codes
from coarsegrad.integer.weights import choose_weights, pack_weights, round_weights, unpack_weights

WEIGHT_BITS = (8, 4, 2, 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_norm(channels, g):
    """Gains of both signs, and one that is 0."""
    gain = torch.randn(channels, generator=g)
    gain[1] = 0
    mean, var, shift = (
        torch.randn(channels, generator=g),
        torch.rand(channels, generator=g),
        torch.randn(channels, generator=g),
    )
    return Norm(mean, var, 1e-5, gain, 0.1 * shift)


def codes_of(layer, acc, levels):
    """The codes that an op makes of accumulators [n, C]."""
    if layer.thresholds is None:
        return affine_codes(acc, layer.scale, layer.offset, levels).long()
    return (acc[..., None] >= layer.thresholds).sum(-1)


def check_every_accumulator(weight, bias, step, levels, weight_bits, norm, staircase, most=400):
    layer = integer_layer(weight, bias, step, levels, weight_bits, norm, staircase)
    rows = weight.double().flatten(1)
    integers, scale = choose_weights(rows, weight_bits)
    if layer.thresholds is not None and norm is not None and norm.weight is not None and weight_bits == 2:
        falls, ternary = norm.weight < 0, choose_weights(rows, 2, symmetric=True)
        if bool((integers[falls] == -2).any()):
            integers, scale = torch.where(falls[:, None], ternary[0], integers), torch.where(falls, ternary[1], scale)
    next_levels = 2**staircase.bits - 1
    next_alpha = staircase.alpha.expand(weight.size(0)).tolist()
    stored = torch.tensor(integer_oracle.unpacked(layer.weight, weight_bits, integers.size(1)))
    for n, row in enumerate(integers):
        falls = norm is not None and norm.weight is not None and norm.weight[n] < 0
        flip = falls and layer.thresholds is not None
        assert torch.equal(stored[n], -row if flip else row)
        assert layer.scale[n] <= 0 if falls and not flip else layer.scale[n] >= 0
        low, high = levels * int(stored[n].clamp(max=0).sum()), levels * int(stored[n].clamp(min=0).sum())
        acc = torch.arange(low, high + 1, max(1, (high - low) // most))
        acc = torch.cat([acc, torch.tensor([low, high])])
        got = codes_of(layer, acc[:, None].expand(-1, weight.size(0)), next_levels)[:, n]
        numbers = None
        if norm is not None:
            gain = 1 if norm.weight is None else norm.weight[n].item()
            shift = 0 if norm.bias is None else norm.bias[n].item()
            numbers = (norm.mean[n].item(), norm.var[n].item(), norm.eps, gain, shift)
        wanted = [
            integer_oracle.real_code(
                -a if flip else a, step, scale[n].item(), 0 if bias is None else bias[n].item(), numbers,
                next_alpha[n], staircase.bits, staircase.rounding,
            )
            for a in acc.tolist()
        ]  # fmt: skip
        assert got.tolist() == wanted, f"channel {n}"
    return layer


@pytest.mark.parametrize("normed", (False, True))
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
@pytest.mark.parametrize("bits", (1, 2, 4))
def test_random_layers(bits, weight_bits, rounding, normed):
    g = generator(bits * 100 + weight_bits * 10 + normed)
    weight, bias = torch.randn(5, 6, generator=g), torch.randn(5, generator=g)
    weight[3] = 0
    norm = random_norm(5, g) if normed else None
    check_every_accumulator(
        weight,
        bias,
        Fraction(37, 100),
        2**bits - 1,
        weight_bits,
        norm,
        Staircase(torch.tensor([0.29]), bits, rounding),
        60,
    )


def test_norm_without_affine_and_alpha_per_output_channel():
    g = generator(1)
    norm = Norm(torch.randn(4, generator=g), torch.rand(4, generator=g), 1e-5, None, None)
    staircase = Staircase(0.1 + torch.rand(4, generator=g), 3, "nearest")
    weight = torch.randn(4, 7, generator=g)
    check_every_accumulator(weight, None, Fraction(1, 2), 7, 4, norm, staircase, 100)


@pytest.mark.parametrize("gain", (1.0, -1.0))
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
def test_accumulators_that_lie_on_thresholds(rounding, gain):
    """With powers of two all accumulators that are multiples of 32 are on a threshold, where the lower code wins."""
    weight = torch.tensor([[127.0, 64.0, -32.0, 1.0]]).expand(2, -1) / 128
    assert choose_weights(weight.double(), 8)[1].tolist() == [1 / 128, 1 / 128]
    norm = Norm(torch.zeros(2), torch.full((2,), 0.25), 0.0, torch.tensor([gain, 0.5]), torch.tensor([0.0, 0.25]))
    staircase = Staircase(torch.tensor([0.25]), 3, rounding)
    check_every_accumulator(weight, None, Fraction(1, 2), 7, 8, norm, staircase, 10**6)


def test_constant_channels_have_the_code_of_their_bias():
    weight, bias = torch.zeros(4, 3), torch.tensor([-1.0, 0.0, 0.5, 9.0])
    for rounding in oracle.ROUNDINGS:
        staircase = Staircase(torch.tensor([0.5]), 2, rounding)
        layer = check_every_accumulator(weight, bias, Fraction(1), 3, 8, None, staircase)
        assert layer.scale.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("bits", (4, 8))
def test_affine_form_has_the_codes_of_the_thresholds_on_every_accumulator(bits):
    """Channels of a real size, about 10**6 accumulators each."""
    g = generator(bits)
    integers, scale = choose_weights(torch.randn(8, 512, generator=g).double(), 8)
    low, high = 15 * integers.clamp(max=0).sum(1), 15 * integers.clamp(min=0).sum(1)
    channels = list(layers._channels(Fraction(1, 4), scale, torch.randn(8, generator=g), random_norm(8, g), low, high))
    staircase = Staircase(torch.tensor([6.0 / 2**bits]), bits, "nearest")
    next_alpha = Fraction(staircase.alpha.item())
    rows = torch.tensor([first_above(channel, next_alpha, edges(bits, "nearest")) for channel in channels])
    scale, offset, thresholds = layers._codes_output(channels, staircase, low, high)
    assert thresholds is None
    for n in range(8):
        acc = torch.arange(int(low[n]), int(high[n]) + 1)
        wanted = torch.searchsorted(rows[n], acc, right=True)
        assert torch.equal(affine_codes(acc, scale[n], offset[n], 2**bits - 1).long(), wanted)
        assert len(wanted.unique()) == 2**bits or n == 1  # the gain of channel 1 is 0


def test_exact_affine_finds_a_nudge_or_gives_up():
    levels = 15
    scale, offset = torch.tensor([0.0123]), torch.tensor([0.4567])
    low, high = torch.tensor([-(10**5)]), torch.tensor([10**5])
    acc = torch.arange(-(10**5), 10**5 + 1)[:, None]
    codes = affine_codes(acc, scale, offset, levels).long()[:, 0]
    thresholds = torch.tensor([[int(acc[codes >= k].min()) for k in range(1, levels + 1)]])
    found = exact_affine(torch.nextafter(scale, torch.ones(1)), offset, thresholds, low, high)
    assert found is not None
    assert torch.equal(affine_codes(acc, *found, levels).long()[:, 0], codes)
    thresholds[0, 7] += 1
    assert exact_affine(scale, offset, thresholds, low, high) is None


@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
def test_packing_of_weights(weight_bits):
    g = generator(weight_bits)
    for shape in ((3, 1), (2, 31), (2, 257), (0, 5), (4, 0)):
        weights = integer_oracle.random_weights(shape, weight_bits, g)
        packed = pack_weights(weights, weight_bits)
        assert torch.equal(packed, integer_oracle.packed(weights, weight_bits))
        assert torch.equal(unpack_weights(packed, weight_bits, shape[1]).long(), weights)


@pytest.mark.parametrize("weight_bits, least, top", ((8, -127, 127), (4, -7, 7), (2, -1, 1), (2, -2, 1), (1, -1, 1)))
def test_weights_on_a_grid_are_found(weight_bits, least, top):
    """Weights that are multiples of one number per row lose nothing."""
    g = generator(weight_bits)
    integers = torch.randint(least, top + 1, (6, 40), generator=g)
    integers[:, 0], integers[:, 1] = top, least
    integers = torch.where(integers == 0, 1, integers) if weight_bits == 1 else integers
    step = torch.rand(6, 1, generator=g) + 0.1
    got, scale = choose_weights((integers * step).double(), weight_bits)
    assert torch.equal(got, integers)
    torch.testing.assert_close(scale, step[:, 0])


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
def test_two_bits_hold_no_opposite_of_their_least_integer(rounding):
    """Rows with a negative gain keep -2 and have a negative scale; with thresholds they are ternary."""
    weight = torch.tensor([[-0.5, 0.25, 0, -0.25]]).expand(3, -1) * torch.tensor([[1.0], [2.0], [4.0]])
    norm = Norm(torch.zeros(3), torch.ones(3), 0.0, torch.tensor([-1.0, 1.0, -0.3]), torch.tensor([0.5, 0.1, 0.2]))
    staircase = Staircase(torch.tensor([0.25]), 2, rounding)
    layer = check_every_accumulator(weight, None, Fraction(1, 3), 3, 2, norm, staircase)
    stored = integer_oracle.unpacked(layer.weight, 2, 4)
    if rounding == "hwgq":
        assert stored == [[1, -1, 0, 1], [-2, 1, 0, -1], [1, -1, 0, 1]]
    else:
        assert stored == [[-2, 1, 0, -1]] * 3 and (layer.scale < 0).tolist() == [True, False, True]
    layer = integer_layer(weight, None, Fraction(1, 3), 3, 2, norm)
    assert integer_oracle.unpacked(layer.weight, 2, 4) == [[-2, 1, 0, -1]] * 3


def test_round_weights_is_what_an_integer_layer_stores():
    for shape in ((4, 6), (4, 3, 5), (4, 3, 2, 5)):
        weight = torch.randn(shape, generator=generator(len(shape)))
        rows = weight.movedim(1, -1)
        layer = integer_layer(rows, None, Fraction(1), 1, 4)
        integers = torch.tensor(integer_oracle.unpacked(layer.weight, 4, rows[0].numel()))
        rounded = (integers * layer.scale.double()[:, None]).view(rows.shape).movedim(-1, 1)
        assert torch.equal(round_weights(weight, 4), rounded)


def test_fewer_bits_have_a_greater_error():
    weight = torch.randn(8, 200, generator=generator(0)).double()
    errors = []
    for weight_bits in WEIGHT_BITS:
        integers, scale = choose_weights(weight, weight_bits)
        assert integers.abs().max() <= {8: 127, 4: 7, 2: 2, 1: 1}[weight_bits] and integers.max() != 2
        errors.append(float((weight - scale.double()[:, None] * integers).square().mean()))
    assert errors == sorted(errors)
    # The optima for a unit Gaussian: Max 1960 (4 levels 0.1175, 3 levels 0.190, 2 levels 0.363; 15 levels 0.0134).
    assert errors[0] < 2e-4 and errors[1] < 0.016 and errors[2] < 0.18 and errors[3] < 0.42


def test_what_cannot_be_converted():
    weight, step, staircase = torch.ones(2, 3), Fraction(1, 2), Staircase(torch.ones(1), 4, "ceil")
    with pytest.raises(CannotConvert, match="not all finite"):
        integer_layer(weight / 0, None, step, 15, 8, None, staircase)
    with pytest.raises(CannotConvert, match="exceed 32 bits"):
        integer_layer(torch.ones(1, 70_000), None, step, 255, 8, None, staircase)
    norm = Norm(torch.zeros(2), torch.tensor([0.5, -1.0]), 1e-5, None, None)
    with pytest.raises(CannotConvert, match="variance <= 0"):
        integer_layer(weight, None, step, 15, 8, norm, staircase)
    with pytest.raises(CannotConvert, match="do not fit into float32"):
        integer_layer(1e300 * weight.double(), None, step, 15, 8)
