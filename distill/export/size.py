"""The bytes of an export's weights, told from a skeleton of the model before anything is computed."""

from collections.abc import Collection

from transformers import PreTrainedModel

from distill.export.record import Format

_SCALE, _ZERO = 4, 1  # bytes, of each output of a layer
_BYTES: dict[Format, int] = {"fp32": 4, "fp16": 2, "int8": 4}


def export_size(
    model: PreTrainedModel, format: Format, *, layers: Collection[str] = (), embeddings: Collection[str] = ()
) -> int:
    """Count the bytes of an export's weights; names and operators of its graph come on top, some kB a block.

    Args:
        model: in float, possibly on meta.
        format: of the export.
        layers: names of the linear layers that compute in int8.
        embeddings: names of the embeddings that are stored in int8. One that an output layer shares stays in float
            there, too.
    """
    weights = {id(parameter): parameter.numel() for parameter in model.parameters()}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    size = _BYTES[format] * sum(weights.values())
    for names, of_a_row in ((layers, _SCALE + _ZERO), (embeddings, _SCALE)):
        for name in names:
            weight = model.get_submodule(name).weight
            size += weight.numel() + of_a_row * len(weight)
            if owners[id(weight)] == 1:
                size -= _BYTES[format] * weight.numel()
    return size
