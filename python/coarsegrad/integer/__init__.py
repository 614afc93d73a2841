"""Integer inference: layers that read codes and integer weights, and add exactly."""

from .conversion import convert
from .ops import KERNELS, integer_kernels
from .report import Converted, ConvertReport, Stayed
from .weights import WEIGHT_BITS, round_weights

__all__ = [
    "KERNELS",
    "WEIGHT_BITS",
    "ConvertReport",
    "Converted",
    "Stayed",
    "convert",
    "integer_kernels",
    "round_weights",
]
