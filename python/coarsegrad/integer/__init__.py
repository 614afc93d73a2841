"""Integer inference: layers that read codes and integer weights, and add exactly."""

from .ops import KERNELS

__all__ = ["KERNELS"]
