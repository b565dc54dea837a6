"""Export a model for an inference engine, and write it only if the engine computes what the model does."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from distill.common.folders import told_of_a_full_disk, unfinished
from distill.errors import InputError
from distill.export.graph import float_copy, float_graph
from distill.export.problems import export_problems
from distill.export.record import ENGINE_FOLDERS, RECORD, Engine, ExportRecord, Format, file_of, write_export
from distill.export.runtime import load_exported
from distill.export.samples import largest_difference, sample_inputs
from distill.models.adapters import has_adapters, merged_copy
from distill.models.replacements import without_replacements
from distill.models.weights import refuse_not_finite

_TOLERANCE = 1e-3
"""Of the float graph, as a share of the largest output: rounding differs by 1e-6, what is wrong by 1e-2 and more."""


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    folder: str | Path,
    *,
    engine: Engine = "onnxruntime",
    format: Format = "fp32",
    batches: Sequence[Mapping[str, Tensor]] = (),
) -> ExportRecord:
    """Export a model, its config and its tokenizer to a folder that `load_exported` loads.

    The graph takes any number of rows and, of texts, of tokens. It is compared with the model at several shapes before
    anything is written. Another export in that folder is replaced, and other files stay.

    Args:
        model: a float model that classifies rows, tokens or images, finds spans or fills masks; of one with adapters a
            copy in which they are merged is exported. It stays as it is.
        tokenizer: or the image processor.
        engine: what will compute it.
        format: of its weights.
        batches: calibration rows: the model's inputs, without labels.

    Returns:
        What `export.json` says.

    Raises:
        InputError: a model, engine or format that can't be had, a package that is missing, or an export that doesn't
            compute what the model does.
    """
    problems = export_problems(model, engine, format)
    if problems:
        raise InputError(*problems)
    refuse_not_finite(model, "model")
    model = float_copy(merged_copy(model) if has_adapters(model) else model)
    folder = Path(folder)
    partial = unfinished(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with told_of_a_full_disk(folder):
            record = _write_float(model, sample_inputs(model, tokenizer, batches), partial, engine)
            write_export(partial, record)
            tokenizer.save_pretrained(partial)
            _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def _write_float(
    model: PreTrainedModel, samples: Sequence[Mapping[str, Tensor]], folder: Path, engine: Engine
) -> ExportRecord:
    """Write a model's graph in float32 with its config, and see that the engine computes what the model does."""
    graph = float_graph(model, samples[0])
    record = ExportRecord(
        engine=engine,
        format="fp32",
        architecture=type(model).__name__,
        file=file_of(engine, "fp32"),
        inputs=[each.name for each in graph.graph.input],
        outputs=[each.name for each in graph.graph.output],
        largest_difference=0.0,
        versions={name: version(name) for name in ("torch", "transformers", "onnx", engine)},
    )
    file = folder / record.file
    file.parent.mkdir(parents=True)
    file.write_bytes(graph.SerializeToString())
    config = without_replacements(model.config)
    config.architectures = [record.architecture]
    config.save_pretrained(folder)
    write_export(folder, record)
    difference = largest_difference(model, load_exported(folder), samples)
    if not difference <= _TOLERANCE:
        raise InputError(
            f"model: {engine} computes other outputs than {record.architecture} does (by {difference:.2g} of the "
            f"largest; {_TOLERANCE:g} is rounding), so nothing was written"
        )
    return replace(record, largest_difference=difference)


def _move(partial: Path, folder: Path) -> None:
    """Put an export in its folder, the record last: without it the folder is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RECORD, *ENGINE_FOLDERS):
        before = folder / name
        shutil.rmtree(before) if before.is_dir() else before.unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == RECORD):
        os.replace(path, folder / path.name)
