"""Max pooling of codes in converted networks, against torch's of floats."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import coarsegrad as cg

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d}
POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d}


def pooled(rank, **window):
    """A network that pools codes and hands them on: its convolution multiplies by one."""
    network = nn.Sequential(cg.QReLU(4, alpha=0.5), POOLS[rank](**window), CONVOLUTIONS[rank](6, 6, 1, groups=6))
    nn.init.ones_(network[2].weight)
    nn.init.zeros_(network[2].bias)
    return network.eval()


def check(network, x):
    converted = cg.convert(network, (x,))
    assert [row.name for row in converted.report.converted] == ["2"]
    assert not any("pool" in str(node.target) for node in converted.graph.nodes)
    for inputs in (x, x[:1], x[:0]):
        torch.testing.assert_close(converted(inputs), network(inputs), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(17,), (13, 18)])
@pytest.mark.parametrize(
    "window",
    [
        {"kernel_size": 2},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 4, "stride": 3, "padding": 2, "ceil_mode": True},
        {"kernel_size": 3, "stride": 4, "ceil_mode": True},
        {"kernel_size": 3, "stride": 1, "dilation": 2},
        {"kernel_size": 2, "stride": 5},
    ],
)
def test_windows(shape, window):
    torch.manual_seed(0)
    check(pooled(len(shape), **window), torch.randn(3, 6, *shape))


@pytest.mark.parametrize("size", [11, 12, 28])  # torch's kernel for channels_last refuses uint8 from 12 x 12 on
def test_channels_last(size):
    torch.manual_seed(1)
    x = torch.randn(2, 6, size, size).contiguous(memory_format=torch.channels_last)
    check(pooled(2, kernel_size=(2, 3), stride=(1, 2), padding=(0, 1)), x)


def test_three_dimensions():
    torch.manual_seed(2)
    network = nn.Sequential(cg.QReLU(2), nn.MaxPool3d(2, 1), nn.Flatten(), nn.Linear(4 * 3 * 2 * 4, 5)).eval()
    x = torch.randn(2, 4, 4, 3, 5)
    converted = cg.convert(network, (x,))
    assert [row.name for row in converted.report.converted] == ["3"]
    network[3].weight.data = cg.integer.round_weights(network[3].weight, 8).float()
    torch.testing.assert_close(converted(x), network(x))
