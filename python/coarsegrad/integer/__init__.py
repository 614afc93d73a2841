"""Integer inference: layers that read codes and integer weights, and add exactly."""

from .._types import WEIGHT_BITS
from .checks import check_conv2d, check_linear, check_weight_bits
from .conversion import convert
from .ops import KERNELS, integer_kernels, serving, warn_if_slow
from .report import Converted, ConvertReport, Stayed
from .weights import round_weights

__all__ = [
    "KERNELS",
    "WEIGHT_BITS",
    "ConvertReport",
    "Converted",
    "Stayed",
    "check_conv2d",
    "check_linear",
    "check_weight_bits",
    "convert",
    "integer_kernels",
    "round_weights",
    "serving",
    "warn_if_slow",
]
