"""Distil, quantize and measure Hugging Face encoders. Importing this makes quantized folders loadable."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # first: else a line at its import, and one a layer and call

from distill.compression.quantization.formats import QuantizationSettings
from distill.compression.quantization.quantize import quantize_model
from distill.compression.student import build_student
from distill.data.load import DataOptions, load_data
from distill.errors import InputError
from distill.training.config import DistillationConfig
from distill.training.trainer import DistillationTrainer

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
