"""An ONNX graph in 8 bit: static scales of activations, a scale for each channel of weights, one for each embedding."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.compression.quantization.formats import quantizable_modules
from distill.compression.quantization.grids import VECTORS, Grid, chosen_vectors, fit_grid
from distill.errors import InputError

if TYPE_CHECKING:
    import onnx

_PRODUCTS = ("MatMul", "Gemm")
_DIVIDED = "_divided"


def quantizable_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that can compute in 8 bit: those in the blocks; heads and the pooler stay in float.

    Raises:
        InputError: a model without blocks.
    """
    return [name for name, module in quantizable_modules(model).items() if not isinstance(module, nn.Embedding)]


def quantizable_embeddings(model: PreTrainedModel) -> list[str]:
    """Names of the embeddings that are worth storing in 8 bit: the words', and others of some size.

    Raises:
        InputError: a model without blocks.
    """
    return [name for name, module in quantizable_modules(model).items() if isinstance(module, nn.Embedding)]


def weights_of_activations(graph: onnx.ModelProto, layers: Iterable[str]) -> dict[str, NDArray]:
    """Collect, for each activation …×C that these layers read, all weights that multiply it, C×O, by its name.

    Args:
        graph: in float32.
        layers: names of the model's modules.
    """
    from onnx import numpy_helper  # of an extra

    tensors = {each.name: each for each in graph.graph.initializer}
    found: dict[str, dict[str, NDArray]] = {}
    for node in products_of(graph, layers):
        weight = numpy_helper.to_array(tensors[node.input[1]])
        found.setdefault(node.input[0], {})[node.input[1]] = weight.T if is_turned(node) else weight
    return {name: np.concatenate(list(weights.values()), axis=1) for name, weights in found.items()}


def activation_grids(
    graph: onnx.ModelProto, weights: Mapping[str, NDArray], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Grid]:
    """The grid of each activation that 8 bits represent with the least error in what is computed from it.

    Args:
        graph: in float32.
        weights: for each activation …×C all that multiply it, C×O, by the name of the activation.
        batches: of the model's inputs; what stands at padding doesn't count.
    """
    import onnxruntime  # of an extra
    from onnx import helper

    names = list(weights)
    shown = type(graph)()
    shown.CopyFrom(graph)
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = [each.name for each in graph.graph.input]
    seen: dict[str, list[NDArray]] = {name: [] for name in names}
    per_batch = max(1, VECTORS // len(batches))
    for batch in batches:
        arrays = {name: np.asarray(batch[name]) for name in inputs}
        for name, values in zip(names, session.run(names, arrays), strict=True):
            seen[name].append(chosen_vectors(values, batch.get("attention_mask"), per_batch))
    return {name: fit_grid(np.concatenate(seen[name]), weights[name]) for name in names}


def grids_of_layers(graph: onnx.ModelProto, grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """The grid of each activation, from those that a training computed on.

    Args:
        graph: in float32.
        grids: by name of the layer that reads the activation; one object for all that read the same.

    Raises:
        InputError: they are another model's, or layers that read one activation have several grids.
    """
    found: dict[str, Grid] = {}
    sizes = {each.name: each.dims for each in graph.graph.initializer}
    layers = set()
    for node in products_of(graph, grids):
        layer = module_of(node.name)
        width = sizes[node.input[1]][1 if is_turned(node) else 0]
        if grids[layer].factors.size not in (1, width):
            raise InputError(f"grids: {layer} reads {width} channels and they have {grids[layer].factors.size} factors")
        if found.setdefault(node.input[0], grids[layer]) is not grids[layer]:
            raise InputError(f"grids: {layer} reads what others read on another grid, and a graph rounds it once")
        layers.add(layer)
    missing = [name for name in grids if name not in layers]
    if missing:
        raise InputError(f"grids: {missing[0]} is no such layer of this model; export it with its own, or without any")
    return found


def with_int8_layers(graph: onnx.ModelProto, layers: Iterable[str], grids: Mapping[str, Grid]) -> onnx.ModelProto:
    """A copy of a float graph in which some linear layers compute in 8 bit.

    Weights have 7 of the 8 bits (−64 to 64), symmetric, with a scale for each output: products of two of them with
    unsigned activations fit into 16 bits, where CPUs without VNNI add them up; with all 8 these would saturate without
    a word. Activations are unsigned, with one scale and zero point each, so a row's result depends on no other row.

    Args:
        layers: names of the model's modules.
        grids: of the activations that they read.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType  # of an extra
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import DEQUANT_OUTPUT_SUFFIX

    copied = type(graph)()
    copied.CopyFrom(graph)
    _divide_channels(copied, layers, grids)
    products = list(products_of(copied, layers))
    if not products:
        return copied
    read = {node.input[0]: grids[node.input[0].removesuffix(_DIVIDED)] for node in products}
    known = {name: (np.float32(grid.low), np.float32(grid.high)) for name, grid in read.items()}
    with _quietly():
        quantizer = QDQQuantizer(
            copied,
            per_channel=True,
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, known),
            nodes_to_quantize=[node.name for node in products],
            nodes_to_exclude=[],
            op_types_to_quantize=list(_PRODUCTS),
            extra_options={"OpTypesToExcludeOutputQuantization": list(_PRODUCTS)},
        )
        quantizer.quantize_model()
    quantized = quantizer.model.model
    rounded = {f"{name}{DEQUANT_OUTPUT_SUFFIX}": name for name in read}
    multiplied = {node.name for node in products}
    for node in quantized.graph.node:
        if node.name not in multiplied:  # what is added to what the layers give, as residuals are, stays in float
            node.input[:] = [rounded.get(name, name) for name in node.input]
    return quantized


def with_int8_embeddings(graph: onnx.ModelProto, embeddings: Iterable[str]) -> onnx.ModelProto:
    """Copy a graph, with embeddings stored in 8 bit, symmetric, with a scale for each row.

    Only the rows that a batch has are looked up and multiplied; as quantized tensors of ONNX, which share a scale or
    have one a column, the whole table would be expanded at each call.

    Args:
        graph: in float32; it stays as it is.
        embeddings: names of the model's modules.
    """
    from onnx import TensorProto, helper, numpy_helper  # of an extra

    copied = type(graph)()
    copied.CopyFrom(graph)
    chosen, weights = set(embeddings), {each.name: each for each in copied.graph.initializer}
    nodes = []
    for node in copied.graph.node:
        if node.op_type != "Gather" or module_of(node.name) not in chosen or node.input[0] not in weights:
            nodes.append(node)
            continue
        table, ids = node.input
        rows, scales = int8_rows(numpy_helper.to_array(weights[table]))
        if f"{table}_int8" not in weights:
            new = [numpy_helper.from_array(rows, f"{table}_int8"), numpy_helper.from_array(scales, f"{table}_scales")]
            copied.graph.initializer.extend(new)
            weights |= {each.name: each for each in new}
        found, scale, cast = (f"{node.output[0]}_{part}" for part in ("int8", "row_scale", "float"))
        nodes += [
            helper.make_node("Gather", [f"{table}_int8", ids], [found], name=node.name),
            helper.make_node("Gather", [f"{table}_scales", ids], [scale], name=f"{node.name}_scales"),
            helper.make_node("Cast", [found], [cast], name=f"{node.name}_float", to=TensorProto.FLOAT),
            helper.make_node("Mul", [cast, scale], [node.output[0]], name=f"{node.name}_scaled"),
        ]
    del copied.graph.node[:]
    copied.graph.node.extend(nodes)
    drop_unread(copied)
    return copied


def int8_rows(table: NDArray) -> tuple[NDArray, NDArray]:
    """Rows V×D as int8 from −127 to 127, and their scales V×1."""
    scales = np.abs(table).max(-1, keepdims=True) / np.float32(127)
    scales = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
    return np.round(table / scales).astype(np.int8), scales


def drop_unread(graph: onnx.ModelProto) -> None:
    """Drop weights that no node reads any more."""
    read = {name for node in graph.graph.node for name in node.input}
    kept = [each for each in graph.graph.initializer if each.name in read]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)


def _divide_channels(graph: onnx.ModelProto, layers: Iterable[str], grids: Mapping[str, Grid]) -> None:
    """Divide the channels of activations by the factors of their grids, and multiply these layers' weights by them."""
    from onnx import helper, numpy_helper  # of an extra

    tensors = {each.name: each for each in graph.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in products_of(graph, layers):
        if not grids[node.input[0]].plain:
            readers.setdefault(node.input[0], []).append(node)
    added: dict[str, onnx.NodeProto] = {}
    for name, nodes in readers.items():
        factors = grids[name].factors
        inverse = numpy_helper.from_array((1 / factors).astype(np.float32), f"{name}_inverse_factors")
        graph.graph.initializer.append(inverse)
        added[nodes[0].name] = helper.make_node(
            "Mul", [name, inverse.name], [name + _DIVIDED], name=f"{nodes[0].name}_divided"
        )
        for node in nodes:
            scaled = f"{node.input[1]}_of_{name}"
            if scaled not in tensors:
                weight = numpy_helper.to_array(tensors[node.input[1]])
                weight = weight * (factors[None, :] if is_turned(node) else factors[:, None])
                tensors[scaled] = numpy_helper.from_array(weight, scaled)
                graph.graph.initializer.append(tensors[scaled])
            node.input[0], node.input[1] = name + _DIVIDED, scaled
    ordered = [each for node in graph.graph.node for each in (added.get(node.name), node) if each is not None]
    del graph.graph.node[:]
    graph.graph.node.extend(ordered)
    drop_unread(graph)


def is_turned(product: onnx.NodeProto) -> bool:
    """Whether a product reads its weights as O×C."""
    return any(each.name == "transB" and each.i for each in product.attribute)


def products_of(graph: onnx.ModelProto, layers: Iterable[str]) -> Iterator[onnx.NodeProto]:
    """The products with weights of some layers; one that several blocks share has several."""
    chosen, weights = set(layers), {each.name for each in graph.graph.initializer}
    for node in graph.graph.node:
        reads = node.op_type in _PRODUCTS and node.input[1] in weights and node.input[0] not in weights
        if reads and module_of(node.name) in chosen:
            yield node


def module_of(node: str) -> str:
    """The name of the model's module that a node of its graph comes from."""
    return node.rpartition("/")[0]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without advice to run ONNX Runtime's own preparation first, which would write fused operators of its own."""
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
