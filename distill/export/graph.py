"""A torch model as one ONNX graph in float32: any number of rows and tokens, a mask that quantizes, readable names."""

from __future__ import annotations

import ast
import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.common.sources import causes
from distill.errors import InputError
from distill.models.modes import attention_of
from distill.models.structure import accepted_inputs

if TYPE_CHECKING:
    import onnx

OPSET = 20
"""The first with a Gelu; the runtime of transformers.js reads up to 21."""

MASKED = -1e4
"""What is added to the attention of padding instead of float32's lowest number: as good as that to a softmax, and a
range of numbers that holds it can still be quantized."""


def float_graph(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    """The ONNX graph of a model, for any number of rows and tokens.

    Attention is computed step by step (`eager`), which has no cases for rows without tokens and leaves one mask. Nodes
    are called by the model's modules: `bert.encoder.layer.0.attention.self.query/MatMul`.

    Args:
        model: in float32, in evaluation mode, on the CPU.
        inputs: an example of at least two rows and two tokens.

    Raises:
        InputError: torch can't translate it.
    """
    model.config.use_cache = False
    inputs = accepted_inputs(model, inputs)
    try:
        with attention_of([model], "eager"), torch.no_grad(), _quietly():
            program = torch.onnx.export(
                model,
                kwargs=dict(inputs),
                dynamo=True,
                dynamic_shapes={name: _dynamic(name) for name in inputs},
                output_names=_output_names(model, inputs),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # each stage of the exporter raises its own
        first = " ".join(str(list(causes(error))[-1]).split())[:200]
        raise InputError(f"model: torch.onnx.export can't translate {type(model).__name__} ({first})") from error
    graph: onnx.ModelProto = program.model_proto  # type: ignore[union-attr]
    _name_nodes(graph)
    _soften_masks(graph)
    _merge_weights(graph)
    return graph


def float_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model in float32 on the CPU, in evaluation mode."""
    copied = copy.deepcopy(model).to("cpu").eval().requires_grad_(False)
    for tensor in [*copied.parameters(), *copied.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    copied.config.dtype = torch.float32
    return copied


def _dynamic(name: str) -> dict[int, str]:
    return {0: "batch"} if name == "pixel_values" else {0: "batch", 1: "sequence"}


def _output_names(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[str]:
    with torch.no_grad():
        return list(model(**inputs).keys())


def _name_nodes(graph: onnx.ModelProto) -> None:
    """Name nodes by their modules, and drop what the exporter notes of the files on this machine."""
    counts: Counter[str] = Counter()
    for node in graph.graph.node:
        scopes = next((each.value for each in node.metadata_props if each.key.endswith("name_scopes")), "['']")
        modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]
        name = f"{modules[-1] if modules else 'model'}/{node.op_type}"
        node.name = f"{name}_{counts[name]}" if counts[name] else name
        counts[name] += 1
        del node.metadata_props[:]
    for each in [*graph.graph.initializer, *graph.graph.value_info, *graph.graph.input, *graph.graph.output]:
        del each.metadata_props[:]
    del graph.graph.metadata_props[:]
    del graph.metadata_props[:]
    del graph.graph.value_info[:]  # their shapes are of the graph as it was before it was simplified
    graph.graph.name = "model"


def _merge_weights(graph: onnx.ModelProto) -> None:
    """Store a matrix once that several blocks share; the exporter turns it round anew for each of them."""
    from onnx import numpy_helper  # of an extra

    first: dict[tuple[Any, ...], str] = {}
    merged: dict[str, str] = {}
    for tensor in [each for each in graph.graph.initializer if len(each.dims) > 1]:
        content = (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
        merged[tensor.name] = first.setdefault(content, tensor.name)
    for node in graph.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = merged.get(name, name)
    kept = [each for each in graph.graph.initializer if merged.get(each.name, each.name) == each.name]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)


def _soften_masks(graph: onnx.ModelProto) -> None:
    """Replace float32's lowest number, which stands for "masked", by `MASKED`."""
    from onnx import numpy_helper  # of an extra

    for tensor in _constants(graph):
        values = numpy_helper.to_array(tensor)
        if values.size == 1 and values.dtype == np.float32 and values.item() < MASKED:
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(values, MASKED), tensor.name))


def _constants(graph: onnx.ModelProto) -> Iterator[Any]:
    yield from graph.graph.initializer
    for node in graph.graph.node:
        if node.op_type == "Constant":
            yield from (each.t for each in node.attribute if each.name == "value")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's words on torchvision's operators, names of axes and deprecated calls of its own."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
