"""Distil, quantize and measure Hugging Face encoders. Importing this makes quantized folders loadable."""

from distill.data import DataOptions, load_data
from distill.errors import InputError
from distill.quantize import quantize_model
from distill.student import build_student
from distill.trainer import DistillationConfig, DistillationTrainer

__all__ = [
    "DataOptions",
    "DistillationConfig",
    "DistillationTrainer",
    "InputError",
    "build_student",
    "load_data",
    "quantize_model",
]
