"""Export a model for an inference engine, and write it only if the engine computes what the model does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from distill.common.folders import told_of_a_full_disk, unfinished
from distill.compression.quantization.grids import SimulatedGrids
from distill.compression.quantization.mixed import calibration_logits
from distill.errors import InputError
from distill.export.choice import Closeness, Limits, choose_layers, closeness
from distill.export.files import write_graph
from distill.export.graph import float_copy, float_graph
from distill.export.int4 import int4_weights, with_int4_embeddings, with_int4_layers
from distill.export.int8 import (
    activation_grids,
    grids_of_layers,
    quantizable_embeddings,
    quantizable_layers,
    weights_of_activations,
    with_int8_embeddings,
    with_int8_layers,
)
from distill.export.problems import export_problems
from distill.export.record import ENGINE_FOLDERS, RECORD, Engine, ExportRecord, Format, file_of, write_export
from distill.export.runtime import load_exported
from distill.export.samples import largest_difference, sample_inputs
from distill.export.web import say_format, web_problems
from distill.models.adapters import has_adapters, merged_copy
from distill.models.description import describe
from distill.models.replacements import structure_of, without_replacements
from distill.models.structure import accepted_inputs
from distill.models.weights import refuse_not_finite
from distill.tasks.kinds import targets_of

if TYPE_CHECKING:
    import onnx

_TOLERANCE = 1e-3
"""Of the float graph, as a share of the largest output: rounding differs by 1e-6, what is wrong by 1e-2 and more."""
_TOLERANCE_OF_HALF = 3e-2
"""Of float16, or of bfloat16, in which OpenVINO computes where a CPU has it."""


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    folder: str | Path,
    *,
    engine: Engine = "onnxruntime",
    format: Format = "fp32",
    batches: Sequence[Mapping[str, Tensor]] = (),
    embeddings: Literal["int8", "int4", "same"] = "int8",
    float_layers: Collection[str] | None = None,
    agreement: float = 0.99,
    divergence: float = 1.5e-3,
    grids: SimulatedGrids | None = None,
    web: bool = False,
) -> ExportRecord:
    """Export a model, its config and its tokenizer to a folder that `load_exported` loads.

    The graph takes any number of rows and, of texts, of tokens. It is compared with the model at several shapes before
    anything is written. Another export in that folder is replaced, and other files stay.

    In int8 the linear layers of the blocks compute in 8 bit with scales that are fixed on calibration rows; heads, the
    pooler, norms and softmaxes stay in float. Where the float model's predictions on these rows are not kept, those
    layers that hurt most stay in float too, as few as possible. In int4 the same layers have 4-bit weights and compute
    in float.

    Args:
        model: a float model that classifies rows, tokens or images, finds spans or fills masks; of one with adapters a
            copy in which they are merged is exported. It stays as it is.
        tokenizer: or the image processor.
        engine: what will compute it.
        format: of its weights.
        batches: calibration rows: the model's inputs, without labels; int8 and int4 need them.
        embeddings: of int8 and int4: whether they are stored in 8 bit, with a scale for each row, or in 4 bit, with one
            for each 32 numbers of a row.
        float_layers: of int8 and int4: names of the layers that stay in float; None to choose them by what they cost.
        agreement: of int8 and int4: the least share of the calibration rows' predictions that are the float model's.
        divergence: of int8 and int4: the most of the mean KL from the float model's predictions, in nats.
        grids: of int8: those that the model was trained with (`simulated_grids` of its folder), for either engine.
            These layers and embeddings and no others compute in 8 bit, on these grids, and nothing is chosen; batches
            are only measured on, and may be left out.
        web: whether transformers.js has to read it, too; config.json then says which file it takes by itself.

    Returns:
        What `export.json` says.

    Raises:
        InputError: a model, engine or format that can't be had, a package that is missing, or an export that doesn't
            compute what the model does.
    """
    problems = export_problems(model, engine, format, float_layers=float_layers or ())
    if format in ("int8", "int4") and not batches and grids is None:
        problems.append(f"batches: {format} needs calibration rows, batches of the model's inputs")
    if grids is not None and (format != "int8" or float_layers is not None):
        given = f"format: {format}" if format != "int8" else "float_layers"
        problems.append(f"grids: say which layers compute in int8, and on what scales; leave them or {given} out")
    if web:
        problems += web_problems(model, tokenizer, engine)
    if problems:
        raise InputError(*problems)
    refuse_not_finite(model, "model")
    model = float_copy(merged_copy(model) if has_adapters(model) else model)
    inputs = [{name: each.cpu() for name, each in accepted_inputs(model, batch).items()} for batch in batches]
    samples = sample_inputs(model, tokenizer, inputs)
    folder = Path(folder)
    partial = unfinished(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with told_of_a_full_disk(folder):
            graph = float_graph(model, samples[0])
            record = _write_float(graph, model, samples, partial, engine)
            if format == "fp16":
                record = _write_half(graph, model, samples, partial, record)
            elif format in ("int8", "int4"):
                limits = Limits(agreement, divergence, values=targets_of(model).distributions is None)
                if grids is None:
                    record = _write_quantized(
                        graph, model, inputs, partial, record, format, embeddings, float_layers, limits
                    )
                else:
                    record = _write_trained(graph, model, inputs, partial, record, grids)
            if web:
                record = replace(record, web=True)
                say_format(partial, format)
            write_export(partial, record)
            tokenizer.save_pretrained(partial)
            _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def _write_float(
    graph: onnx.ModelProto,
    model: PreTrainedModel,
    samples: Sequence[Mapping[str, Tensor]],
    folder: Path,
    engine: Engine,
) -> ExportRecord:
    """Write a model's graph in float32 with its config, and see that the engine computes what the model does."""
    record = ExportRecord(
        engine=engine,
        format="fp32",
        architecture=type(model).__name__,
        file=file_of(engine, "fp32"),
        inputs=[each.name for each in graph.graph.input],
        outputs=[each.name for each in graph.graph.output],
        largest_difference=0.0,
        versions={name: version(name) for name in ("torch", "transformers", "onnx", engine)},
        structure=describe(structure).to_dict() if (structure := structure_of(model.config)) else None,
    )
    write_graph(graph, folder / record.file, engine)
    config = without_replacements(model.config)
    config.architectures = [record.architecture]
    config.save_pretrained(folder)
    write_export(folder, record)
    return _checked(record, model, samples, folder, _TOLERANCE)


def _write_half(
    graph: onnx.ModelProto,
    model: PreTrainedModel,
    samples: Sequence[Mapping[str, Tensor]],
    folder: Path,
    record: ExportRecord,
) -> ExportRecord:
    """Write the graph in float16 instead, and see that it still computes what the model does."""
    record = _instead(record, "fp16", folder)
    write_graph(graph, folder / record.file, record.engine, half=True)
    write_export(folder, record)
    return _checked(record, model, samples, folder, _TOLERANCE_OF_HALF)


def _write_quantized(
    graph: onnx.ModelProto,
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    folder: Path,
    record: ExportRecord,
    format: Literal["int8", "int4"],
    embeddings: str,
    float_layers: Collection[str] | None,
    limits: Limits,
) -> ExportRecord:
    """Write the graph in 8 or 4 bit instead, with as many layers in it as the limits on calibration rows allow."""
    layers, targets = quantizable_layers(model), targets_of(model)
    record = _instead(record, format, folder)
    write_export(folder, record)
    if format == "int4" and len(batches) > 1:  # errors cancel out on the rows that weights are rounded for
        rounded_for, judged_by = batches[::2], batches[1::2]
    else:
        rounded_for = judged_by = batches
    reference = calibration_logits(model, judged_by)
    small = graph
    if embeddings != "same":
        in_bits = with_int8_embeddings if embeddings == "int8" else with_int4_embeddings
        small = in_bits(graph, quantizable_embeddings(model))
    if format == "int8":
        grids = activation_grids(graph, weights_of_activations(graph, layers), batches)
    else:
        weights = int4_weights(model, layers, rounded_for)

    def measure(chosen: Collection[str]) -> Closeness:
        by_format = (
            with_int8_layers(small, chosen, grids) if format == "int8" else with_int4_layers(small, chosen, weights)
        )
        write_graph(by_format, folder / record.file, record.engine)
        return closeness(targets, reference, calibration_logits(load_exported(folder), judged_by))

    possible = [name for name in layers if format == "int8" or name in weights]
    if float_layers is None:
        chosen, _ = choose_layers(possible, measure, limits)
    else:
        chosen = [name for name in possible if name not in float_layers]
    found = measure(chosen)
    return replace(
        record,
        embeddings=embeddings,
        quantized_layers=chosen,
        float_layers=[name for name in layers if name not in chosen],
        calibration_rows=sum(len(next(iter(batch.values()))) for batch in batches),
        agreement=found.agreement,
        divergence=found.divergence,
    )


def _write_trained(
    graph: onnx.ModelProto,
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    folder: Path,
    record: ExportRecord,
    grids: SimulatedGrids,
) -> ExportRecord:
    """Write the graph in 8 bit instead, as the model was trained, and measure it where there are rows."""
    of_layers, layers = grids.of_layers(), quantizable_layers(model)
    small = with_int8_embeddings(graph, grids.embeddings)
    quantized = with_int8_layers(small, list(of_layers), grids_of_layers(graph, of_layers))
    record = _instead(record, "int8", folder)
    write_graph(quantized, folder / record.file, record.engine)
    write_export(folder, record)
    found: Closeness | None = None
    if batches:
        reference, computed = (calibration_logits(each, batches) for each in (model, load_exported(folder)))
        found = closeness(targets_of(model), reference, computed)
    return replace(
        record,
        embeddings="int8" if grids.embeddings else "same",
        quantized_layers=[name for name in layers if name in of_layers],
        float_layers=[name for name in layers if name not in of_layers],
        trained_for=grids.engine,
        calibration_rows=sum(len(next(iter(batch.values()))) for batch in batches) or None,
        agreement=None if found is None else found.agreement,
        divergence=None if found is None else found.divergence,
    )


def _instead(record: ExportRecord, format: Format, folder: Path) -> ExportRecord:
    """The record of another format, whose file takes the place of the one in float32."""
    shutil.rmtree((folder / record.file).parent)
    return replace(record, format=format, file=file_of(record.engine, format))


def _checked(
    record: ExportRecord,
    model: PreTrainedModel,
    samples: Sequence[Mapping[str, Tensor]],
    folder: Path,
    tolerance: float,
) -> ExportRecord:
    """The record with how far the outputs of what was written are from the model's.

    Raises:
        InputError: further than the tolerance.
    """
    difference = largest_difference(model, load_exported(folder), samples)
    if not difference <= tolerance:
        raise InputError(
            f"model: {record.engine} computes other outputs in {record.format} than {record.architecture} does (by "
            f"{difference:.2g} of the largest; {tolerance:g} is rounding), so nothing was written"
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
