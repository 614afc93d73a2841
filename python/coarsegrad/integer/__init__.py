"""Integer inference: layers that read codes and integer weights, and add exactly."""

from .conversion import convert
from .ops import KERNELS
from .report import Converted, ConvertReport, Stayed

__all__ = ["KERNELS", "ConvertReport", "Converted", "Stayed", "convert"]
