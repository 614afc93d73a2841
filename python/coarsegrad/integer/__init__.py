"""Integer inference: layers that read codes and integer weights, and add exactly."""

from .._types import WEIGHT_BITS
from .checks import check_conv2d, check_linear, check_weight_bits
from .conversion import batched, check_model, convert, exported_graph, refusal
from .exact import first_sums
from .flow import CodeFlow, normalize
from .moves import arguments
from .ops import KERNELS, integer_kernels, serving, warn_if_slow
from .report import Converted, ConvertReport, Stayed
from .weights import round_weights, unpack_weights

__all__ = [
    "KERNELS",
    "WEIGHT_BITS",
    "CodeFlow",
    "ConvertReport",
    "Converted",
    "Stayed",
    "arguments",
    "batched",
    "check_conv2d",
    "check_linear",
    "check_model",
    "check_weight_bits",
    "convert",
    "exported_graph",
    "first_sums",
    "integer_kernels",
    "normalize",
    "refusal",
    "round_weights",
    "serving",
    "unpack_weights",
    "warn_if_slow",
]
