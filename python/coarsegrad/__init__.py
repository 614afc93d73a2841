"""coarsegrad: low-bit activations for torch. The staircase ReLU, its coarse gradients, and activations saved in bits.

The function is `qrelu`, the module `QReLU`. `python -m coarsegrad info` reports what runs on this machine.
"""

import importlib.metadata
from typing import Any

from . import integrations, nn
from .backends import backends, use_backend
from .export import export_onnx, onnx_translations
from .functional import dequantize, qrelu, qrelu_codes, qrelu_conv2d, qrelu_linear
from .gated import gated_product
from .integer import convert
from .memory import saved_memory
from .mlp import qrelu_gated_mlp, qrelu_mlp
from .nn import QReLU
from .norms import norm_staircase
from .optim import blended, keep_positive, param_groups
from .packing import pack_activations_, packed_activations
from .parametrization import QWeight
from .quantization import calibrate, quantize_, stats
from .signed import QSigned, hadamard, qsigned, qsigned_codes, rotate_weight_
from .ste import check_ste, register_ste, stes
from .weights import qweight, weight_codes, weight_scale

try:
    __version__ = importlib.metadata.version("coarsegrad")
except importlib.metadata.PackageNotFoundError:  # run from the sources, not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """What needs other packages."""
    if name == "CoarseGradConfig":
        return integrations.CoarseGradConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "QReLU",
    "QSigned",
    "QWeight",
    "backends",
    "blended",
    "calibrate",
    "check_ste",
    "convert",
    "dequantize",
    "export_onnx",
    "gated_product",
    "hadamard",
    "keep_positive",
    "nn",
    "norm_staircase",
    "onnx_translations",
    "pack_activations_",
    "packed_activations",
    "param_groups",
    "qrelu",
    "qrelu_codes",
    "qrelu_conv2d",
    "qrelu_gated_mlp",
    "qrelu_linear",
    "qrelu_mlp",
    "qsigned",
    "qsigned_codes",
    "quantize_",
    "qweight",
    "register_ste",
    "rotate_weight_",
    "saved_memory",
    "stats",
    "stes",
    "use_backend",
    "weight_codes",
    "weight_scale",
]
