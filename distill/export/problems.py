"""What can't be exported, told from a model's class and config alone, before anything is computed."""

from collections.abc import Collection
from importlib.util import find_spec

from transformers import PretrainedConfig, PreTrainedModel

from distill.errors import InputError, nearest_name
from distill.export.int8 import quantizable_layers
from distill.export.record import ENGINES, FORMATS
from distill.models.replacements import is_quantized
from distill.tasks.kinds import targets_of
from distill.tasks.outputs import plain_model

_PACKAGES = {
    "onnxruntime": ("onnx", ("onnxruntime",), ("onnx", "onnxscript")),
    "openvino": ("openvino", ("openvino",), ("onnx", "onnxscript", "onnxruntime")),
}
"""For each engine the extra that brings what it needs: to compute, and besides that to export."""

_LARGEST_FILE = 2**31 - 1  # bytes of a protocol buffer


def export_problems(
    model: PreTrainedModel,
    engine: str,
    format: str,
    *,
    float_layers: Collection[str] = (),
    parent: str | None = None,
    runs: bool = True,
) -> list[str]:
    """What is wrong with exporting a model, one sentence each; its weights may lie on meta.

    Args:
        float_layers: of int8: names of the layers that shall stay in float.
        parent: the float model that a quantized one was made from, if it is known.
        runs: whether it is exported here and now, with packages that must be there.
    """
    problems = [
        f"{key}: {given!r} is none; {nearest_name(str(given), known)}"
        for key, given, known in (("engine", engine, ENGINES), ("format", format, FORMATS))
        if given not in known
    ]
    problems += missing_packages(engine) if runs else []
    model = plain_model(model)
    if is_quantized(model.config):
        problems.append(_quantized(model.config, parent))
    try:
        targets = targets_of(model)
    except InputError as error:
        return [*problems, *(f"model: {problem}" for problem in error.problems)]
    if targets.inputs_are_labels:
        problems.append(f"model: {type(model).__name__} generates text, and only models that read are exported")
    if format in ("int8", "int4"):
        try:
            layers = quantizable_layers(model)
            unknown = [name for name in float_layers if name not in layers]
            problems += [f"float_layers: {name!r} is none; {nearest_name(name, layers)}" for name in unknown]
        except InputError as error:
            problems += [
                f"format: {format} is for layers in transformer blocks; {problem}" for problem in error.problems
            ]
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    if size > _LARGEST_FILE:
        problems.append(f"model: its weights take {size / 1e9:.1f} GB in float32, and one ONNX file holds 2.1 GB")
    return problems


def missing_packages(engine: str, *, to_run: bool = False) -> list[str]:
    """What is to be installed for an engine, as one problem; none where all is there.

    Args:
        to_run: an exported model, and not to export one.
    """
    if engine not in _PACKAGES:
        return []
    extra, runs, exports = _PACKAGES[engine]
    missing = [name for name in (runs if to_run else (*runs, *exports)) if find_spec(name) is None]
    if not missing:
        return []
    return [
        f"engine: {engine} needs {', '.join(missing)}, not installed here; pip install 'distill-transformers[{extra}]'"
    ]


def _quantized(config: PretrainedConfig, parent: str | None) -> str:
    method = getattr(config.quantization_config, "quant_method", None) or "another package"
    which = f"the float model that it was made from, {parent}" if parent else "the float model that it was made from"
    return f"model: its weights are quantized already ({method}), and no engine reads them so; export {which}"
