"""The ops on Triton, for the GPUs that the native library does not serve. The only place where triton is imported."""

from .qrelu import dequantize, qrelu_backward, qrelu_codes, qrelu_forward, qrelu_forward_, times_slopes

__all__ = ["dequantize", "qrelu_backward", "qrelu_codes", "qrelu_forward", "qrelu_forward_", "times_slopes"]
