"""What `calibrate` knows of the inputs: its error and its alpha beside those of the inputs themselves."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import coarsegrad as cg
from coarsegrad.quantization import METHODS
from coarsegrad.quantization.histogram import Histogram
from coarsegrad.ste import ROUNDINGS

CPU = torch.device("cpu")


def _normal(count: int = 3000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(5))


def _pixels() -> torch.Tensor:
    return (torch.randint(0, 256, (3000,), generator=torch.Generator().manual_seed(6)) / 255 - 0.4) / 0.23


def _background() -> torch.Tensor:
    """Half of it one value among others, as a convolution's output on an empty image."""
    z = _normal()
    return torch.where(z.flip(0) < 0, torch.tensor(0.7371), z)


INPUTS = {
    "saturated": lambda: (5 * _normal()).clamp(max=6.0),
    "clamped": lambda: _normal().clamp(max=0.7),
    "background": _background,
    "levels": lambda: cg.qrelu(_normal(), 0.1666, 4),
    "fine levels": lambda: cg.qrelu(_normal(), 0.0154, 8),
    "pixels": _pixels,
    "one value": lambda: torch.full((100,), 0.37),
    "few": lambda: _normal(10),
    "bfloat16": lambda: (4 * _normal()).round().bfloat16(),
    "float16": lambda: _normal().half(),
    "float64": lambda: (4 * _normal()).round().double() * 0.1,
    "huge": lambda: _normal() * 1e8,
    "tiny": lambda: _normal() * 1e-15,
    "an outlier": lambda: torch.cat([_normal(), torch.tensor([3e4])]),
    "-inf": lambda: torch.where(_normal() < -1, -math.inf, _normal()),
}


def _power(x: torch.Tensor) -> float:
    return x.double().square().sum().item()


def _target(layer: cg.QReLU, x: torch.Tensor) -> torch.Tensor:
    y = x.clamp(0, layer.limit)
    return y.square() if layer.squared else y


def _error(layer: cg.QReLU, x: torch.Tensor, alpha: float) -> float:
    layer.alpha.fill_(alpha)
    return _power(layer(x.clone()).double() - _target(layer, x).double())


def _calibrated(x: torch.Tensor, method: str = "mse", limit: float = math.inf, **settings):
    model = nn.Sequential(cg.QReLU(**settings))
    model[0].limit = limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        [found] = cg.calibrate(model, x.split(1300), method, progress=False).layers
    return model[0], found


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_error_is_that_of_the_inputs_and_no_alpha_is_better_by_two_percent(rounding, bits, kind):
    x, limit = INPUTS[kind](), 6.0 if kind == "saturated" else math.inf
    for method, squared in (*((method, False) for method in METHODS), ("mse", True)):
        layer, found = _calibrated(x, method, limit, bits=bits, rounding=rounding, squared=squared)
        alpha, top = layer.alpha.item(), 2**bits - 1
        assert alpha * top <= limit * (1 + 1e-6)
        error, power = _error(layer, x, alpha), _power(_target(layer, x))
        decibels = 10 * math.log10(power / error) if error else math.inf
        assert found.snr == pytest.approx(decibels, abs=0.5) or min(found.snr, decibels) > 100
        if method == "mse" and decibels < 100:
            largest = min(limit, x.max().item()) / top
            grid = [alpha * 2 ** (i / 32) for i in range(-16, 17)] + [largest * 2 ** (i / 4) for i in range(-24, 5)]
            assert error <= 1.02 * min(_error(layer, x, min(a, limit / top)) for a in grid)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_levels_of_a_staircase_have_no_error(rounding, bits):
    x = cg.qrelu(_normal(), 0.3, bits, rounding=rounding)
    layer, found = _calibrated(x, bits=bits, rounding=rounding)
    assert torch.equal(layer(x), x) and found.snr > 140


def test_relu6_of_wide_inputs_ends_at_six():
    """Where the mass is at the limit; an alpha with the top level past it costs each of these inputs."""
    layer, found = _calibrated(20 * _normal(), limit=6.0, bits=4)
    assert 15 * layer.alpha.item() == pytest.approx(6, rel=0.005) and 15 * layer.alpha.item() <= 6.000001


def test_infinite_inputs_have_a_value_where_there_is_a_limit():
    x = torch.tensor([1.0, math.inf, -math.inf, 3.0])
    layer, found = _calibrated(x, limit=6.0, bits=4, rounding="nearest")
    assert found.zero == 0.25 and 15 * layer.alpha.item() <= 6.000001
    assert layer(x).tolist() == pytest.approx([1, 6, 0, 3], abs=0.2)


class TestHistogram:
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.randoms())
    def test_any_order_any_split_and_any_merging_is_the_same(self, values, random):
        whole, shuffled, parts = Histogram(1, CPU), Histogram(1, CPU), [Histogram(1, CPU), Histogram(1, CPU)]
        whole.add(torch.tensor([values]))
        random.shuffle(values)
        for i, value in enumerate(values):
            shuffled.add(torch.tensor([[value]]))
            parts[i % 2].add(torch.tensor([[value]]))
        self._merge(*parts)
        for other in (shuffled, *parts):
            assert torch.equal(other.top, whole.top)
            for a, b in zip((*other.sums, other.low, other.high), (*whole.sums, whole.low, whole.high)):
                # Offsets of what the windows left below have no edge to be counted from; only their count is read.
                assert torch.equal(a[:, 1:], b[:, 1:])
            assert torch.equal(other.sums[0], whole.sums[0]) and torch.equal(other.high, whole.high)

    @staticmethod
    def _merge(first: Histogram, second: Histogram) -> None:
        """As two processes do: each call of `reduce` meets that of the other."""
        tops = torch.maximum(first.top, second.top)
        mine = {id(first): [], id(second): []}

        def record(histogram):
            def reduce(t, how):
                mine[id(histogram)].append((t, how))
                if how == "max" and t.shape == tops.shape:
                    t.copy_(tops)

            return reduce

        first.merge(record(first))
        second.merge(record(second))
        reduced = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}
        for (a, how), (b, same) in zip(*mine.values()):
            assert how == same
            result = reduced[how](a, b)
            a.copy_(result), b.copy_(result)

    @pytest.mark.parametrize(
        "values", [[1.25] * 7, [1.0, 1.0, 1.0, 1.001], [1.0, 1.00001], [1e-45, 3e38], [0.3] * 99 + [0.3001]]
    )
    def test_one_or_two_values_of_a_bin_are_points(self, values):
        histogram = Histogram(1, CPU)
        histogram.add(torch.tensor([values]))
        [inputs] = histogram.rows(1, torch.float32)
        x = torch.tensor(values).double()
        assert inputs.count == len(values) and inputs.in_points == pytest.approx(1, abs=1e-6)
        middle = x.mean()
        assert inputs.sums_up_to(middle)[0].item() == pytest.approx((x <= middle).sum().item(), abs=0.01)
        assert inputs.totals[1] == pytest.approx(x.sum().item(), rel=1e-6)

    def test_what_is_spread_evenly_is_no_point(self):
        histogram = Histogram(1, CPU)
        histogram.add(torch.linspace(1, 2, 100_000)[None])
        [inputs] = histogram.rows(1, torch.float32)
        assert inputs.in_points < 0.02
        bounds = torch.linspace(1, 2, 777, dtype=torch.float64)
        wanted = torch.stack([(bounds - 1) ** 1, (bounds**2 - 1) / 2, (bounds**3 - 1) / 3], 1) * 100_000
        assert (inputs.sums_up_to(bounds) - wanted).abs().max() < 3
