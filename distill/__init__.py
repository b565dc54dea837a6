"""Distil, quantize and measure Hugging Face encoders. Importing this makes quantized folders loadable.

The public names are imported when they are first asked for (PEP 562), and bitsandbytes when a quantized model is made
or loaded.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from distill.compression.registration import register_when_needed

if TYPE_CHECKING:
    from distill.compression.factorization.factorize import factorize_model
    from distill.compression.pruning.prune import prune_model
    from distill.compression.quantization.formats import QuantizationSettings
    from distill.compression.quantization.quantize import quantize_model
    from distill.compression.share import share_layers
    from distill.compression.student import build_student
    from distill.compression.vocabulary import trim_vocabulary
    from distill.data.load import DataOptions, load_data
    from distill.errors import InputError
    from distill.export.export import export_model
    from distill.export.runtime import load_exported
    from distill.training.config import DistillationConfig
    from distill.training.trainer import DistillationTrainer

__all__ = [
    "DataOptions",
    "DistillationConfig",
    "DistillationTrainer",
    "InputError",
    "QuantizationSettings",
    "build_student",
    "export_model",
    "factorize_model",
    "load_data",
    "load_exported",
    "prune_model",
    "quantize_model",
    "share_layers",
    "trim_vocabulary",
]

_MODULES = {
    "DataOptions": "distill.data.load",
    "DistillationConfig": "distill.training.config",
    "DistillationTrainer": "distill.training.trainer",
    "InputError": "distill.errors",
    "QuantizationSettings": "distill.compression.quantization.formats",
    "build_student": "distill.compression.student",
    "export_model": "distill.export.export",
    "factorize_model": "distill.compression.factorization.factorize",
    "load_data": "distill.data.load",
    "load_exported": "distill.export.runtime",
    "prune_model": "distill.compression.pruning.prune",
    "quantize_model": "distill.compression.quantization.quantize",
    "share_layers": "distill.compression.share",
    "trim_vocabulary": "distill.compression.vocabulary",
}
"""Where each public name is defined."""

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else a line at its import, and one a layer and call
register_when_needed()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
