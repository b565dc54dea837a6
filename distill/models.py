"""Load what a recipe calls a model: its config, tokenizer and weights, with the label order of the task."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill.adapters import ADAPTER_WEIGHTS, base_of
from distill.errors import InputError
from distill.sources import locate, reason_of, sha256, snapshot, split_revision
from distill.tasks import Task, TaskKind

# transformers' names for our kinds.
PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "image-classification": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
    "token-classification": None,
}
_AUTO_CLASSES: dict[TaskKind, Any] = {
    "classification": transformers.AutoModelForSequenceClassification,
    "multi-label": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "causal-lm": transformers.AutoModelForCausalLM,
    "image-classification": transformers.AutoModelForImageClassification,
}
_DEFAULT_LABEL = re.compile(r"LABEL_\d+")
# RoBERTa and what came from it: the first token's position is the padding's id + 1.
_POSITIONS_AFTER_PADDING = {
    *("camembert", "data2vec-text", "ibert", "lilt", "longformer", "markuplm", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tokenizer.model"),
)
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")
_WEIGHTS = ("model*.safetensors",)


def auto_class(kind: TaskKind) -> Any:
    """The Auto class that loads models for a kind of task."""
    return _AUTO_CLASSES[kind]


def has_head(config: PretrainedConfig, kind: TaskKind) -> bool:
    """Whether a model was saved with a head for a kind of task."""
    endings = [auto_class(kind).__name__.removeprefix("AutoModel")]
    endings += ["LMHeadModel"] if kind == "causal-lm" else []
    return any((config.architectures or [""])[0].endswith(ending) for ending in endings)


@dataclass(frozen=True)
class ModelSource:
    """A model outside the recipe: a folder, a folder in an installed package, or a Hub id."""

    reference: str
    """As the user wrote it."""
    location: str
    """The folder that `from_pretrained` takes; one in the Hub's cache lacks the weights until `fetch_weights`."""
    config: PretrainedConfig
    fingerprint: str
    """Changes with the weights, the config and the tokenizer."""
    revision: str | None = None
    """The commit, of a model on the Hub."""

    @property
    def hub_id(self) -> str | None:
        """The name of a model on the Hub."""
        return split_revision(self.reference)[0] if self.revision else None


def find_model(reference: str, *, weights: bool = True, adapters: bool = False) -> ModelSource:
    """Look a model up without loading its weights.

    Args:
        weights: whether it must have some; one that starts from scratch needs none.
        adapters: whether a folder of adapters will do, whose model lies here.

    Raises:
        InputError: no such model, no config, no safetensors weights, or a digest that differs.
    """
    located = locate(reference)
    if isinstance(located, Path):
        folder, revision = located, None
        base = base_of(folder) if adapters else None
        _check_folder(folder if base is None else Path(base), weights=weights)
    else:
        folder = snapshot(located, _SMALL_FILES)
        revision = folder.name
    try:
        config = load_config(str(folder))
    except Exception as error:  # each config raises its own kinds
        raise InputError(f"{reference}: its config.json cannot be read ({reason_of(error)})") from error
    fingerprint = f"{split_revision(reference)[0]}@{revision}" if revision else _folder_fingerprint(folder)
    return ModelSource(reference, str(folder), config, fingerprint, revision)


def fetch_weights(source: ModelSource) -> None:
    """Have the weights of a model on the Hub beside its config.

    Raises:
        InputError: it has none in safetensors, or they are not to be had.
    """
    if source.revision is not None:
        folder = snapshot(f"{source.hub_id}@{source.revision}", (*_SMALL_FILES, *_WEIGHTS))
        if not _weight_files(folder):
            raise InputError(f"{source.reference}: has no safetensors weights on the Hub; pickled ones are not read")


def load_config(location: str) -> PretrainedConfig:
    """A model's config; an adapter's is that of the model it belongs to."""
    return AutoConfig.from_pretrained(base_of(location) or location)


def load_tokenizer(location: str, max_length: int | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer; `max_length` becomes its `model_max_length`, so `pipeline(truncation=True)` cuts there.

    Raises:
        InputError: there is none.
    """
    if Path(location).is_dir() and not any((Path(location) / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(
            f"{location}: holds no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}); save one beside the model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
    except Exception as error:  # as for the config
        raise InputError(f"{location}: its tokenizer cannot be loaded ({reason_of(error)})") from error
    if tokenizer.pad_token is None:  # GPT-2, Llama; padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    if max_length is not None:
        tokenizer.model_max_length = max_length
    return tokenizer


def load_processor(
    location: str, kind: TaskKind | None, max_length: int | None = None
) -> PreTrainedTokenizerBase | BaseImageProcessor:
    """What turns a task's rows into the model's inputs: its tokenizer, or its image processor.

    Raises:
        InputError: there is none.
    """
    if kind != "image-classification":
        return load_tokenizer(location, max_length)
    try:
        return AutoImageProcessor.from_pretrained(location)
    except Exception as error:  # as for the config
        raise InputError(f"{location}: its image processor cannot be loaded ({reason_of(error)})") from error


def load_classifier(
    location: str,
    task: Task,
    *,
    label_map: Mapping[str, str] | None = None,
    dtype: torch.dtype | str = "auto",
) -> PreTrainedModel:
    """A trained classification (or regression) model whose outputs stand in the order of the task's labels.

    Args:
        location: folder or Hub id.
        label_map: the model's label names → the task's, where they differ.
        dtype: of the weights; the stored one by default.

    Raises:
        InputError: the labels differ, or the head has no trained weights.
    """
    config = load_config(location)
    order = label_order(config, task, label_map, where=location)
    with _loading(location):
        model, info = auto_class(task.kind).from_pretrained(
            location, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    if info["missing_keys"]:
        raise InputError(f"{location}: {no_head_message(sorted(info['missing_keys']))}")
    if order is not None:
        _permute_head(model, order)
    set_labels(model.config, task)
    return model.eval()


def load_for_finetuning(location: str, task: Task, *, from_scratch: bool = False) -> PreTrainedModel:
    """A pretrained model with a head for the task in float32; a head that is missing or of another shape is new.

    What is new is drawn from torch's global generator: seed it first.

    Args:
        from_scratch: all of it is new.
    """
    config = AutoConfig.from_pretrained(location)
    set_labels(config, task)
    if task.kind != "image-classification" and config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id  # as the tokenizer pads
    if from_scratch:
        return from_config(config, task.kind)
    with _loading(location):
        return auto_class(task.kind).from_pretrained(
            location, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True
        )


def from_config(config: PretrainedConfig, kind: TaskKind) -> PreTrainedModel:
    """A float32 model of this config with new weights (from torch's global generator)."""
    plain = config.to_dict()
    plain.pop("quantization_config", None)
    copied = type(config).from_dict(plain)
    copied.architectures = copied.architectures or []  # DeiT has two heads, and `from_config` looks here which is meant
    return auto_class(kind).from_config(copied, dtype=torch.float32)


def set_labels(config: PretrainedConfig, task: Task) -> None:
    """Write the task's label names and problem type into the model's config, where the task has labels."""
    if task.kind not in PROBLEM_TYPES:
        return
    names = task.label_names or ("score",)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = PROBLEM_TYPES[task.kind]


def label_order(
    config: PretrainedConfig, task: Task, label_map: Mapping[str, str] | None = None, *, where: str
) -> list[int] | None:
    """For each label of the task, the model's id of it; None where both agree.

    Names are compared without case, and with spaces and hyphens as underscores.

    Raises:
        InputError: the label sets differ, or the model only has `LABEL_0`-like names.
    """
    if task.kind not in PROBLEM_TYPES:
        return None
    if task.kind == "regression":
        if config.num_labels != 1:
            raise InputError(f"{where}: has {config.num_labels} outputs, but {task.name} is a regression with one")
        return None
    wanted = [_normalise(name) for name in task.label_names or ()]
    names = [config.id2label[index] for index in range(config.num_labels)]
    mapped = [_normalise((label_map or {}).get(name, name)) for name in names]
    if sorted(mapped) == sorted(wanted):
        order = [mapped.index(name) for name in wanted]
        return None if order == sorted(order) else order
    shown = ", ".join(task.label_names or ())
    if all(_DEFAULT_LABEL.fullmatch(name) for name in names) and len(names) == len(wanted):
        pairs = ", ".join(f"{name}: {label}" for name, label in zip(names, task.label_names or (), strict=True))
        raise InputError(
            f"{where}: its labels have no names (LABEL_0, …), so their order is unknown; if it is the task's, "
            f"say teacher_label_map (label_map for eval and quantize): {{{pairs}}}"
        )
    raise InputError(f"{where}: its labels ({', '.join(names)}) are not those of the task ({shown})")


def longest_input(config: PretrainedConfig) -> int | None:
    """The most tokens that the model's position embeddings hold; None where they set no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or config.model_type not in _POSITIONS_AFTER_PADDING:
        return positions
    return positions - config.pad_token_id - 1


def no_head_message(missing: list[str]) -> str:
    """What to say of a model without a trained head."""
    return f"has no trained head for this task ({', '.join(missing[:3])} missing); fine-tune it first (run: finetune)"


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' loading report: what it would say of missing weights is checked here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _loading(location: str) -> Iterator[None]:
    try:
        with quiet_loading():
            yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # none there, other shapes, or broken files
        raise InputError(f"{location}: its weights cannot be loaded ({str(error).strip().splitlines()[0]})") from error


def _normalise(label: str) -> str:
    return label.strip().lower().replace("-", "_").replace(" ", "_")


def _permute_head(model: PreTrainedModel, order: list[int]) -> None:
    """Reorder the rows of the last linear layer, so that logits and label names follow `order`."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(order)]
    if not heads:
        raise InputError(f"{type(model).__name__}: no output layer found whose labels could be reordered")
    head = heads[-1]
    with torch.no_grad():
        head.weight.copy_(head.weight[order].clone())
        if head.bias is not None:
            head.bias.copy_(head.bias[order].clone())


def _check_folder(folder: Path, *, weights: bool) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: holds no config.json, so it is no model folder")
    if weights and not _weight_files(folder):
        pickled = [path.name for path in folder.glob("*.bin")]
        hint = "; from_scratch: true starts from its config alone"
        if pickled:
            hint = f"; {pickled[0]} is pickled and not read: save it with save_pretrained"
        raise InputError(f"{folder}: a model folder without weights (no model.safetensors){hint}")


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [path for path in [folder / "model.safetensors"] if path.is_file()]


def size_on_disk(folder: Path) -> int:
    """Bytes of a model folder's weight files; an adapter counts with the model it belongs to, if that lies here."""
    size = sum(path.stat().st_size for path in [*_weight_files(folder), *folder.glob(ADAPTER_WEIGHTS)])
    base = base_of(folder)
    return size + (size_on_disk(Path(base)) if base is not None and Path(base).is_dir() else 0)


def _folder_fingerprint(folder: Path) -> str:
    files = [folder / "config.json", *_weight_files(folder), *(folder / name for name in _TOKENIZER_FILES)]
    return " ".join(sha256(path) for path in files if path.is_file())
