"""The ops on Triton, for the GPUs that the native library does not serve. The only place where triton is imported."""

from triton import knobs

from .qrelu import dequantize, qrelu_backward, qrelu_backward_own, qrelu_codes, qrelu_forward, qrelu_forward_

# Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 as triton was imported.
INTERPRETED = knobs.runtime.interpret

__all__ = ["INTERPRETED", "dequantize", "qrelu_backward", "qrelu_backward_own", "qrelu_codes", "qrelu_forward", "qrelu_forward_"]
