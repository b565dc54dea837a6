"""Distil, quantize and measure Hugging Face encoders. Importing this makes quantized folders loadable."""

from distill.quantize import quantize_model
from distill.student import build_student
from distill.trainer import DistillationConfig, DistillationTrainer

__all__ = ["DistillationConfig", "DistillationTrainer", "build_student", "quantize_model"]
