"""An exported model as an object that transformers takes for a model: a config, a device, a call that gives logits."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import ModelOutput

from distill.errors import InputError
from distill.export.problems import missing_packages
from distill.export.record import ExportRecord, read_export
from distill.models.folders import fetch_folder

Compute = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
"""Inputs by name → outputs in the record's order."""


class ExportedModel:
    """A model that an inference engine computes.

    `load_exported` makes it, under the name of its class in transformers, by which pipelines and `distill` know what it
    predicts.

    Args:
        config: of the model that was exported.
        record: what was exported.
        compute: the engine.
        threads: the engine's; None for its own choice.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    training = False

    def __init__(self, config: PretrainedConfig, record: ExportRecord, compute: Compute, folder: Path, threads: Any):
        self.config = config
        self.record = record
        self.threads = threads
        self.name_or_path = str(folder)
        self._compute = compute

    def __call__(self, **inputs: Tensor | np.ndarray) -> ModelOutput:
        """Logits of a batch (`start_logits` and `end_logits` of spans), in float32 on the CPU.

        Args:
            inputs: those of the model. `attention_mask` is ones and `token_type_ids` zeros where it is left out; a
                model that has no token types takes none, whatever they are.

        Raises:
            InputError: one is missing or unknown.
        """
        outputs = self._compute(self._arrays(inputs))
        named = zip(self.record.outputs, outputs, strict=True)
        return ModelOutput({name: torch.from_numpy(np.asarray(values, dtype=np.float32)) for name, values in named})

    forward = __call__

    def reorder_labels(self, order: Sequence[int]) -> None:
        """Let logits B×C stand in another order of labels from now on.

        Args:
            order: for each place the present one of what stands there.
        """
        compute = self._compute
        self._compute = lambda arrays: [outputs[..., list(order)] for outputs in compute(arrays)]

    def to(self, *args: Any, **kwargs: Any) -> ExportedModel:
        """Itself: it stays on the CPU."""
        return self

    def eval(self) -> ExportedModel:
        """Itself: it does nothing else than evaluate."""
        return self

    def can_generate(self) -> bool:
        """It can't."""
        return False

    def _arrays(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        known = self.record.inputs
        arrays = {name: np.asarray(value) for name, value in inputs.items() if name in known}
        if known[0] not in arrays:
            raise InputError(f"{self.name_or_path}: {known[0]} is missing")
        unknown = [name for name in inputs if name not in known and name not in _LEFT_OUT]
        if unknown:
            raise InputError(f"{self.name_or_path}: takes {', '.join(known)}, not {', '.join(unknown)}")
        for name in known:
            if name not in arrays:
                arrays[name] = _DEFAULTS[name](arrays[known[0]])
        return {name: arrays[name] if name == "pixel_values" else arrays[name].astype(np.int64) for name in known}


_DEFAULTS = {"attention_mask": np.ones_like, "token_type_ids": np.zeros_like}
_LEFT_OUT = ("token_type_ids", "attention_mask")
"""What tokenizers give whether a model reads it or not."""


def load_exported(folder: str | Path, *, threads: int | None = None) -> ExportedModel:
    """Load an exported model into its engine.

    Args:
        folder: as `export_model` wrote it, or the Hub id of one that was pushed.
        threads: of the engine; its own choice by default.

    Raises:
        InputError: it is no exported folder, it is not to be had, or its engine is not installed.
    """
    folder = fetch_folder(str(folder))
    record = read_export(folder)
    problems = missing_packages(record.engine, to_run=True)
    if problems:
        raise InputError(*problems)
    file = folder / record.file
    compute = (_onnxruntime if record.engine == "onnxruntime" else _openvino)(file, record, threads)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    named = type(record.architecture, (ExportedModel,), {"forward": _forward_of(record.inputs)})
    return named(config, record, compute, folder, threads)


def _forward_of(inputs: list[str]) -> Callable[..., ModelOutput]:
    """`forward` with the inputs in its signature, where transformers and `distill` look for them."""

    def forward(self: ExportedModel, **values: Any) -> ModelOutput:
        return self(**values)

    kinds = inspect.Parameter
    parameters = [kinds(name, kinds.KEYWORD_ONLY, default=None) for name in inputs]
    forward.__signature__ = inspect.Signature([kinds("self", kinds.POSITIONAL_ONLY), *parameters])  # type: ignore[attr-defined]
    return forward


def _onnxruntime(file: Path, record: ExportRecord, threads: int | None) -> Compute:
    import onnxruntime  # of an extra

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(record.outputs, arrays)


def _openvino(file: Path, record: ExportRecord, threads: int | None) -> Compute:
    openvino = import_openvino()
    options: dict[str, Any] = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    if record.format == "fp32":  # CPUs with bfloat16 would compute in that
        options["INFERENCE_PRECISION_HINT"] = "f32"
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(file), "CPU", options)
    request = compiled.create_infer_request()

    def compute(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        outputs = request.infer(arrays)
        return [np.array(outputs[name]) for name in record.outputs]

    return compute


def import_openvino() -> Any:
    """OpenVINO, without the package by which it tells its makers of its use."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino  # of an extra

    return openvino
