"""A small network, and a QWeight on a layer."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

import coarsegrad as cg


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def put_on(layer, bits, **settings):
    return parametrize.register_parametrization(layer, "weight", cg.QWeight(bits, **settings))


def original(layer):
    return layer.parametrizations.weight.original
