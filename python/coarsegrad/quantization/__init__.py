"""From a float model to a low-bit one: `quantize_` inserts QReLUs, `calibrate` sets their alphas, `stats` reports."""

from ..blocks import Staircase
from .calibration import METHODS, CalibratedLayer, CalibrationReport, calibrate
from .code_stats import LayerStats, LiveStats, StatsReport, live_stats, stats
from .description import check_description, describe, is_converted, loaded_tensors, rebuild_
from .inputs import InputHistogram
from .quantize import ON_QUANTIZE, check_arguments, quantize_
from .report import QuantizedWeight, QuantizeReport, Replaced, Skipped

__all__ = [
    "METHODS",
    "ON_QUANTIZE",
    "CalibratedLayer",
    "CalibrationReport",
    "InputHistogram",
    "LayerStats",
    "LiveStats",
    "QuantizeReport",
    "QuantizedWeight",
    "Replaced",
    "Skipped",
    "Staircase",
    "StatsReport",
    "calibrate",
    "check_arguments",
    "check_description",
    "describe",
    "is_converted",
    "live_stats",
    "loaded_tensors",
    "quantize_",
    "rebuild_",
    "stats",
]
