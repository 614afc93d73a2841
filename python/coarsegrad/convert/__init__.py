"""From a float model to a low-bit one: `quantize_` inserts QReLUs, `calibrate` sets their alphas, `stats` reports."""

from .calibration import METHODS, CalibrationReport, calibrate
from .code_stats import StatsReport, stats
from .quantize import quantize_
from .report import QuantizeReport

__all__ = ["METHODS", "CalibrationReport", "QuantizeReport", "StatsReport", "calibrate", "quantize_", "stats"]
