"""The ops in Triton, for GPUs that the native library does not serve. Only this package imports triton."""

from .layers import (
    integer_conv2d,
    integer_conv2d_float,
    integer_dequantize,
    integer_linear,
    integer_linear_float,
    integer_quantize,
)
from .mlp import (
    linear_from_codes,
    linear_from_codes_grad_input,
    linear_from_codes_grad_weight,
    linear_to_codes,
)
from .norm import norm_qsigned
from .qrelu import backward_from_slopes, dequantize, qrelu_backward, qrelu_codes, qrelu_forward, qrelu_forward_
from .signed import hadamard, qsigned_dequantize, qsigned_forward
from .weights import weight_scale

__all__ = [
    "backward_from_slopes",
    "dequantize",
    "hadamard",
    "integer_conv2d",
    "integer_conv2d_float",
    "integer_dequantize",
    "integer_linear",
    "integer_linear_float",
    "integer_quantize",
    "linear_from_codes",
    "linear_from_codes_grad_input",
    "linear_from_codes_grad_weight",
    "linear_to_codes",
    "norm_qsigned",
    "qrelu_backward",
    "qrelu_codes",
    "qrelu_forward",
    "qrelu_forward_",
    "qsigned_dequantize",
    "qsigned_forward",
    "weight_scale",
]
