"""Networks out of torch: ONNX for runtimes and FPGAs."""

from .onnx import FORMS, OPSETS, FormName, export_onnx
from .translations import onnx_translations

__all__ = ["FORMS", "OPSETS", "FormName", "export_onnx", "onnx_translations"]
