"""Build a student: which layers, which architecture, and the weights copied from the teacher."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import DistilBertConfig, PretrainedConfig, PreTrainedModel

from distill.common.private_names import model_from_config
from distill.errors import InputError
from distill.models.adapters import has_adapters, merged_copy
from distill.models.replacements import is_quantized, structure_of
from distill.models.structure import find_blocks

logger = logging.getLogger(__name__)

StudentArch = Literal["same", "distilbert"]


@dataclass
class Width:
    """Sizes of a student's blocks; None keeps its source's."""

    hidden_size: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None

    def differs_from(self, config: PretrainedConfig) -> bool:
        """Whether a model of this config has other sizes."""
        return any(size not in (None, getattr(config, name, None)) for name, size in vars(self).items())


# Lists in configs with an entry for each layer; others, as DeBERTa's `pos_att_type`, may merely be as long.
_PER_LAYER = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "no_rope_layers", "kv_source_layers"),
    *("num_attention_heads_per_layer", "intermediate_size", "num_key_value_heads", "activation_sparsity_pattern"),
    *("indexer_types", "layer_rope_theta"),
)

# DistilBERT's names for BERT's weights (Sanh et al. 2019, section 3: same blocks, no token types, no pooler).
_DISTILBERT_NAMES = {
    "bert.embeddings.": "distilbert.embeddings.",
    "bert.encoder.layer.": "distilbert.transformer.layer.",
    "bert.pooler.dense.": "pre_classifier.",
    "attention.self.query.": "attention.q_lin.",
    "attention.self.key.": "attention.k_lin.",
    "attention.self.value.": "attention.v_lin.",
    "attention.output.dense.": "attention.out_lin.",
    "attention.output.LayerNorm.": "sa_layer_norm.",
    "intermediate.dense.": "ffn.lin1.",
    ".output.dense.": ".ffn.lin2.",
    ".output.LayerNorm.": ".output_layer_norm.",
}


@contextmanager
def dropout(model: nn.Module, probability: float | None) -> Iterator[None]:
    """Train with another dropout than the config says; the model has its own again afterwards.

    Args:
        probability: None changes nothing.
    """
    before: list[tuple[nn.Module, str, float]] = []
    for place, module in model.named_modules() if probability is not None else ():
        if "lora_dropout" in place:  # an adapter's own
            continue
        known = ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "dropout" in name]
        before += [(module, name, value) for name in known if isinstance(value := getattr(module, name), float)]
    for module, name, _ in before:
        setattr(module, name, probability)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def build_student(
    teacher: PreTrainedModel | PeftModel,
    *,
    student_arch: StudentArch = "same",
    num_layers: int | None = None,
    layers: Literal["uniform"] | list[int] = "uniform",
    width: Width | None = None,
) -> PreTrainedModel:
    """A smaller model of the teacher's kind, its weights (embeddings and head too) copied from the teacher.

    A narrower feed-forward network keeps the neurons that weigh most. Another hidden size or number of heads leaves no
    weight with its meaning: such a student is freshly initialised (from torch's global generator), and the log says so.

    Args:
        teacher: an encoder whose blocks stand in one `ModuleList`; a BERT for `distilbert`. It stays as it is; of a
            PEFT model the student gets the weights with its active adapters added to them, and none of its own.
        student_arch: the teacher's architecture, or DistilBERT's (no token types; the first is folded into the
            position embeddings, so with all layers it gives the teacher's hidden states on one-segment input).
        num_layers: of the student; by default as many as `layers` names, else all.
        layers: 0-based teacher layers that seed the student's; `uniform` spreads them from first to last.
        width: sizes of the student's blocks where they differ from the teacher's.

    Raises:
        InputError: layers or sizes out of range, or a teacher that is quantized or of another family.
    """
    if has_adapters(teacher):
        teacher = merged_copy(teacher)
    if is_quantized(teacher.config):
        raise InputError("teacher: is quantized, and a student needs float weights; take the model that was quantized")
    width = width or Width()
    chosen = choose_layers(layers, num_layers, teacher.config.num_hidden_layers)
    if structure_of(teacher.config):
        whole = chosen == list(range(teacher.config.num_hidden_layers))
        if student_arch != "same" or not whole or width.differs_from(teacher.config):
            raise InputError(
                "teacher: its layers have other sizes than its config says, so no student is cut from it; keep all of "
                "its layers and sizes, or take the model that it was made from"
            )
        return copy.deepcopy(teacher)
    config = student_config(teacher.config, student_arch, chosen, width)
    if is_fresh(teacher.config, width):
        logger.warning("%s: another hidden size or number of heads, so the student is freshly initialised", width)
        return fresh_model(student_class(teacher, student_arch), config).train(teacher.training)
    weights = _keep_layers(teacher, chosen)
    if width.intermediate_size is not None and width.intermediate_size != teacher.config.intermediate_size:
        weights = _narrow_feed_forward(teacher, weights, width.intermediate_size)
    if student_arch == "distilbert":
        weights = _as_distilbert(weights)
    with torch.device("meta") if teacher.device.type == "meta" else nullcontext():  # a plan asks if it can be made
        student = student_class(teacher, student_arch)(config)
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:  # ModernBERT's first layer has no norm before its attention
        raise InputError(f"layers: {chosen} of {type(teacher).__name__} cannot stand in this order ({error})") from None
    return student.to(teacher.dtype).train(teacher.training)


def student_class(teacher: PreTrainedModel, student_arch: StudentArch) -> type[PreTrainedModel]:
    """The class of a teacher's student: the teacher's own, or for `distilbert` DistilBERT's for the same task.

    Raises:
        AttributeError: transformers has no such class for DistilBERT.
    """
    if student_arch == "same":
        return type(teacher)
    return getattr(transformers, type(teacher).__name__.replace("Bert", "DistilBert", 1))


def is_fresh(config: PretrainedConfig, width: Width) -> bool:
    """Whether a student of these sizes can take no weights from a model of this config.

    Args:
        config: the teacher's.
        width: of which the hidden size and the number of heads count.
    """
    return Width(width.hidden_size, width.num_attention_heads).differs_from(config)


def fresh_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A model with new float32 weights, drawn from torch's global generator as its family draws them.

    Args:
        model_class: the class to make.
        config: stays as it is; its dtype does not count.
    """
    config = copy.deepcopy(config)
    config.dtype = torch.float32
    return model_from_config(model_class, config)


def choose_layers(layers: Literal["uniform"] | list[int], num_layers: int | None, num_teacher_layers: int) -> list[int]:
    """The 0-based teacher layers that seed the student.

    `uniform` spreads them evenly from the first to the last, which for 12 → 6 is DistilBERT's choice
    (0, 2, 4, 7, 9, 11).

    Args:
        layers: `uniform`, or the 0-based teacher layers themselves, in the student's order.
        num_layers: of the student; by default as many as `layers` names, else all.
        num_teacher_layers: how many layers the teacher has.

    Raises:
        InputError: more layers than the teacher has, one out of range, or lists that contradict `num_layers`.
    """
    last = num_teacher_layers - 1
    if layers != "uniform":
        outside = [layer for layer in layers if not 0 <= layer <= last]
        if outside or not layers:
            raise InputError(f"layers: {layers} is out of range; the model has layers 0 to {last}")
        if num_layers is not None and num_layers != len(layers):
            raise InputError(f"num_layers: {num_layers}, but layers names {len(layers)}; leave one of them out")
        return list(layers)
    num_layers = num_teacher_layers if num_layers is None else num_layers
    if not 1 <= num_layers <= num_teacher_layers:
        raise InputError(f"num_layers: {num_layers} is out of range; the model has {num_teacher_layers} layers")
    return [round(index * last / max(num_layers - 1, 1)) for index in range(num_layers)]


def student_config(
    config: PretrainedConfig, student_arch: StudentArch, layers: list[int], width: Width | None = None
) -> PretrainedConfig:
    """The student's config.

    Args:
        config: the teacher's; it stays as it is.
        student_arch: the teacher's architecture, or DistilBERT's.
        layers: 0-based teacher layers that seed the student's, as `choose_layers` gives them.
        width: sizes of the student's blocks where they differ from the teacher's.

    Raises:
        InputError: `distilbert` from a teacher that is no BERT, or sizes that don't fit.
    """
    student = copy.deepcopy(config)
    if width is not None and width.differs_from(config):
        _set_sizes(student, width)
    if student_arch == "distilbert":
        return _distilbert_config(student, len(layers))
    for name in _PER_LAYER:
        value = getattr(student, name, None)
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(student, name, [value[layer] for layer in layers])
    student.num_hidden_layers = len(layers)
    return student


def _set_sizes(config: PretrainedConfig, width: Width) -> None:
    """Write other sizes into a config; its family may name them otherwise."""
    missing = [name for name, size in vars(width).items() if size is not None and getattr(config, name, None) is None]
    if missing:
        raise InputError(f"{missing[0]}: {config.model_type} has no such size in its config; leave it out")
    heads_before = config.num_attention_heads
    for name, size in vars(width).items():
        if size is not None:
            setattr(config, name, size)
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"num_attention_heads: {config.num_attention_heads} heads don't divide a hidden size of "
            f"{config.hidden_size}; say both hidden_size and num_attention_heads"
        )
    key_value_heads = getattr(config, "num_key_value_heads", None)
    if key_value_heads is not None:  # as many queries share a key as before
        config.num_key_value_heads = max(1, key_value_heads * config.num_attention_heads // heads_before)
    if getattr(config, "head_dim", None) is not None:
        config.head_dim = config.hidden_size // config.num_attention_heads


def _narrow_feed_forward(
    teacher: PreTrainedModel, weights: dict[str, torch.Tensor], size: int
) -> dict[str, torch.Tensor]:
    """The weights with only `size` neurons in every feed-forward network: those whose weights are largest.

    A neuron's weight is the product of the norms of its incoming and outgoing weights (how much it can change what the
    block adds; Michel et al. 2019 rank heads alike by what they add).

    Raises:
        InputError: more neurons than there are, or a family whose feed-forward networks are not plain linear layers.
    """
    before = teacher.config.intermediate_size
    if size > before:
        raise InputError(f"intermediate_size: {size} is more than the teacher's {before}")
    prefix = find_blocks(teacher)[0] + "."
    narrowed = dict(weights)
    for number in {name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)}:
        inside = {name: weight for name, weight in weights.items() if name.startswith(f"{prefix}{number}.")}
        axes = {name: [axis for axis, length in enumerate(w.shape) if length == before] for name, w in inside.items()}
        matrices = {name: places[0] for name, places in axes.items() if len(places) == 1 and inside[name].ndim == 2}
        if not {0, 1} <= set(matrices.values()) or any(len(places) > 1 for places in axes.values()):
            raise InputError(
                f"intermediate_size: the feed-forward network of {type(teacher).__name__} is not two plain linear "
                "layers that can be cut; leave it out"
            )
        norms = [inside[name].float().norm(dim=1 - axis) for name, axis in matrices.items()]
        kept = torch.stack(norms).log().sum(0).topk(size).indices.sort().values
        for name, places in axes.items():
            for axis in places:
                narrowed[name] = inside[name].index_select(axis, kept)
    return narrowed


def _keep_layers(teacher: PreTrainedModel, layers: list[int]) -> dict[str, torch.Tensor]:
    """The teacher's weights with only `layers`, renumbered from 0."""
    prefix = find_blocks(teacher)[0] + "."
    kept = {}
    for name, weight in teacher.state_dict().items():
        if not name.startswith(prefix):
            kept[name] = weight
            continue
        index, _, rest = name.removeprefix(prefix).partition(".")
        for position, layer in enumerate(layers):  # a layer may be named twice
            if layer == int(index):
                kept[f"{prefix}{position}.{rest}"] = weight
    return kept


def _distilbert_config(config: PretrainedConfig, num_layers: int) -> DistilBertConfig:
    if config.model_type != "bert":
        raise InputError(f"student_arch: distilbert needs a BERT teacher; this one is {config.model_type} (say same)")
    if config.layer_norm_eps != 1e-12:
        logger.warning("DistilBERT's layer-norm epsilon is 1e-12, the teacher's %g", config.layer_norm_eps)
    return DistilBertConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        n_layers=num_layers,
        n_heads=config.num_attention_heads,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        activation=config.hidden_act,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        initializer_range=config.initializer_range,
        pad_token_id=config.pad_token_id,
        id2label=config.id2label,
        label2id=config.label2id,
        problem_type=config.problem_type,
    )


def _as_distilbert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """BERT's weights under DistilBERT's names."""
    token_types = weights["bert.embeddings.token_type_embeddings.weight"]
    renamed = {}
    for name, weight in weights.items():
        if "token_type_embeddings" in name or name.endswith(("position_ids", "token_type_ids")):
            continue
        if name == "bert.embeddings.position_embeddings.weight":
            weight = weight + token_types[0]
        for old, new in _DISTILBERT_NAMES.items():
            name = name.replace(old, new)
        renamed[name] = weight
    return renamed
