"""From a float model to a low-bit one: `quantize_` inserts QReLUs, `calibrate` sets their alphas, `stats` reports."""

from ..blocks import Staircase
from .calibration import METHODS, CalibratedLayer, CalibrationReport, calibrate
from .code_stats import LayerStats, StatsReport, stats
from .quantize import quantize_
from .report import QuantizedWeight, QuantizeReport, Replaced, Skipped

__all__ = [
    "METHODS",
    "CalibratedLayer",
    "CalibrationReport",
    "LayerStats",
    "QuantizeReport",
    "QuantizedWeight",
    "Replaced",
    "Skipped",
    "Staircase",
    "StatsReport",
    "calibrate",
    "quantize_",
    "stats",
]
