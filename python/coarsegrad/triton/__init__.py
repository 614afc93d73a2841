"""The ops in Triton, for GPUs that the native library does not serve. Only this package imports triton."""

from .qrelu import backward_from_slopes, dequantize, qrelu_backward, qrelu_codes, qrelu_forward, qrelu_forward_

__all__ = ["dequantize", "qrelu_backward", "qrelu_codes", "qrelu_forward", "qrelu_forward_", "backward_from_slopes"]
