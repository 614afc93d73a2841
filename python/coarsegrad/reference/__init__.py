"""All ops in plain torch, straight from the definition: the oracle of every backend, and the backend of last resort.

Functions have the signatures of the ops of the same name (_ops.py); an option may also be given by name. Products,
thresholds, quotients and sums are float32, or float64 if x is float64.
"""

from .bits import from_memory_order, pack, unpack
from .norm import norm_qsigned
from .signed import (
    group_alphas,
    hadamard,
    qsigned_backward,
    qsigned_dequantize,
    qsigned_forward,
    signed_levels,
    signed_scale,
)
from .staircase import (
    _codes,
    backward_from_slopes,
    dequantize,
    levels,
    lsq_scale,
    number_of_scale,
    per_element,
    qrelu_backward,
    qrelu_codes,
    qrelu_forward,
    qrelu_forward_,
    thresholds,
)
from .weights import WEIGHT_GRIDS, weight_scale

__all__ = [
    "WEIGHT_GRIDS",
    "_codes",
    "backward_from_slopes",
    "dequantize",
    "from_memory_order",
    "group_alphas",
    "hadamard",
    "levels",
    "lsq_scale",
    "norm_qsigned",
    "number_of_scale",
    "pack",
    "per_element",
    "qrelu_backward",
    "qrelu_codes",
    "qrelu_forward",
    "qrelu_forward_",
    "qsigned_backward",
    "qsigned_dequantize",
    "qsigned_forward",
    "signed_levels",
    "signed_scale",
    "thresholds",
    "unpack",
    "weight_scale",
]
