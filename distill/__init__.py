"""Distil, quantize and measure Hugging Face encoders. Importing this makes quantized folders loadable."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # first: else a line at its import, and one a layer and call

from distill.config import DistillationConfig
from distill.data import DataOptions, load_data
from distill.errors import InputError
from distill.formats import QuantizationSettings
from distill.quantize import quantize_model
from distill.student import build_student
from distill.trainer import DistillationTrainer

__all__ = [
    "DataOptions",
    "DistillationConfig",
    "DistillationTrainer",
    "InputError",
    "QuantizationSettings",
    "build_student",
    "load_data",
    "quantize_model",
]
