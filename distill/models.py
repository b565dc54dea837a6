"""Load what a recipe calls a model: its config, tokenizer and weights, with the label order of the task."""

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import normalizers
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

from distill.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_of,
    stored_beside_adapters,
    task_of,
    with_stored_adapters,
)
from distill.checkpoints import (
    Fit,
    fit_of,
    load_weights,
    plain_names,
    prefix_note,
    readable_on_meta,
    refuse_not_finite,
    stored_shapes,
    weight_files,
)
from distill.errors import InputError
from distill.sources import locate, reason_of, sha256, snapshot, split_revision
from distill.tasks import OF_LANGUAGE, Task, TaskKind

logger = logging.getLogger(__name__)

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
# By PEFT's names for what is predicted.
_CLASSES_OF_ADAPTERS: dict[str, Any] = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
}
_PADDING_TOKENS = ("[PAD]", "<pad>", "<|pad|>")
# The last layer of a head, among what is stored beside adapters.
_OUTPUT_LAYER = re.compile(r"(?:classifier|score|out_proj|logits_proj)\.weight$")
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")
_WEIGHTS = ("model*.safetensors", ADAPTER_WEIGHTS)


def auto_class(kind: TaskKind) -> Any:
    """The Auto class that loads models for a kind of task."""
    return _AUTO_CLASSES[kind]


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
    base: str | None = None
    """For adapters, the folder of the model that they belong to."""

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
    else:
        folder = snapshot(located, _SMALL_FILES)
        revision = folder.name
    base = None
    if base_of(folder) is not None:
        if not adapters:
            raise InputError(
                f"{reference}: holds adapters, and this starts from a whole model; merge them (peft: merge_and_unload) "
                "and save that"
            )
        base = base_folder(folder)
    if base is not None or revision is None:
        _check_folder(base or folder, weights=weights and (base is None or base_revision(base) is None))
    try:
        config = load_config(str(folder))
    except InputError as error:
        raise InputError(*(f"{reference}: {problem}" for problem in error.problems)) from error
    except Exception as error:  # each config raises its own kinds
        reason = reason_of(error)
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, auto_map, which is not run"
        raise InputError(f"{reference}: its config.json cannot be read ({reason})") from error
    fingerprint = f"{split_revision(reference)[0]}@{revision}" if revision else _folder_fingerprint(folder)
    if base is not None:
        fingerprint += f" on {base_revision(base) or _folder_fingerprint(base)}"
    return ModelSource(reference, str(folder), config, fingerprint, revision, None if base is None else str(base))


def fetch_weights(source: ModelSource) -> None:
    """Have the weights of a model on the Hub beside its config.

    Raises:
        InputError: it has none in safetensors, or they are not to be had.
    """
    if source.revision is not None:
        folder = snapshot(f"{source.hub_id}@{source.revision}", (*_SMALL_FILES, *_WEIGHTS))
        if not weight_files(folder) and not (folder / ADAPTER_WEIGHTS).is_file():
            raise InputError(f"{source.reference}: has no safetensors weights on the Hub; pickled ones are not read")
    if source.base is not None:
        base_folder(Path(source.location), weights=True)


def base_folder(folder: Path, *, weights: bool = False) -> Path | None:
    """Where the model lies that a folder's adapters belong to; None for a folder that holds no adapters.

    Args:
        weights: whether to fetch them, where that model is on the Hub.

    Raises:
        InputError: it is neither a folder here nor on the Hub.
    """
    reference = base_of(folder)
    if reference is None:
        return None
    try:
        located = locate(reference)
        if isinstance(located, Path):
            return located
        return snapshot(located, (*_SMALL_FILES, *_WEIGHTS) if weights else _SMALL_FILES)
    except InputError as error:
        raise InputError(*(f"{folder}: its adapters belong to {problem}" for problem in error.problems)) from None


def base_revision(base: Path) -> str | None:
    """The commit of a base on the Hub; None for a folder here."""
    return base.name if base.parent.name == "snapshots" else None


def load_config(location: str) -> PretrainedConfig:
    """A model's config, its labels named by strings from 0 on; an adapter's is that of the model it belongs to.

    Raises:
        InputError: labels whose order is not clear.
    """
    folder = Path(location)
    base = base_folder(folder)
    stored, _ = PretrainedConfig.get_config_dict(location if base is None else str(base))
    names = stored.get("id2label")
    ordered = None if names is None else _names_in_order(names)
    if isinstance(names, list):  # AutoConfig takes mappings alone
        stored["id2label"] = dict(enumerate(ordered or ()))
        config = AutoConfig.for_model(stored.pop("model_type"), **stored)
    else:
        config = AutoConfig.from_pretrained(location if base is None else str(base), trust_remote_code=False)
    if ordered is not None:
        config.id2label = dict(enumerate(ordered))
        config.label2id = {name: index for index, name in enumerate(ordered)}
    if base is not None:
        labels, auto = _labels_of_adapters(folder), _CLASSES_OF_ADAPTERS.get(task_of(folder) or "")
        if labels is not None:
            config.num_labels = labels
        if auto is not None and type(config) in auto._model_mapping:
            config.architectures = [auto._model_mapping[type(config)].__name__]
    return config


def saved_class(location: str, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a model was saved as: the one in its config, or else the first that all its weights fit."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is not None:
        return named
    stored = stored_shapes(weight_files(Path(location))) if readable_on_meta(config) else {}
    for kind in _AUTO_CLASSES if stored else ():
        with contextlib.suppress(InputError):  # a family without models for this kind
            chosen = model_class(config, kind)
            fit = fit_of(stored, chosen, config, plain_names(stored, chosen, config))
            if not (fit.problem or fit.untrained or fit.unread):
                return chosen
    with torch.device("meta"):
        return type(transformers.AutoModel.from_config(config, trust_remote_code=False))


def _names_in_order(id2label: Mapping[Any, Any] | Sequence[Any]) -> list[str]:
    """The names of a config's labels, by their ids, which may count from 1."""
    by_id = dict(enumerate(id2label)) if isinstance(id2label, list) else {int(key): id2label[key] for key in id2label}
    ids = sorted(by_id)
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise InputError(f"id2label in its config.json counts {', '.join(map(str, ids))}; write 0 to {len(ids) - 1}")
    return [str(by_id[index]) for index in ids]


def _labels_of_adapters(folder: Path) -> int | None:
    """How many labels the head has that is stored beside adapters; None where there is none."""
    beside = stored_beside_adapters(folder)
    rows = [shape[0] for name, shape in beside.items() if _OUTPUT_LAYER.search(name) and len(shape) == 2]
    return rows[-1] if rows else None


def load_tokenizer(location: str, max_length: int | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer; `max_length` becomes its `model_max_length`, so `pipeline(truncation=True)` cuts there.

    One without a padding token gets the token of the model's padding id, or else its end token.

    Raises:
        InputError: there is none, or it has no token to pad with.
    """
    base = None if _holds_tokenizer(location) else base_folder(Path(location))
    found = location if base is None else str(base)
    if not _holds_tokenizer(found):
        raise InputError(
            f"{location}: holds no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}); save one beside the model"
        )
    config = load_config(found) if (Path(found) / "config.json").is_file() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(found, config=config, trust_remote_code=False)
    except Exception as error:  # as for the config
        raise InputError(f"{location}: its tokenizer cannot be loaded ({reason_of(error)})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _padding_token(tokenizer, config, location)
    if max_length is not None:
        tokenizer.model_max_length = max_length
    return tokenizer


def _padding_token(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None, where: str) -> str:
    """A token to pad with, for a tokenizer that names none (GPT-2, Llama, one that was trained by hand)."""
    number = getattr(config, "pad_token_id", None)
    if isinstance(number, int) and 0 <= number < len(tokenizer):
        return tokenizer.convert_ids_to_tokens(number)
    if tokenizer.eos_token is not None:
        return tokenizer.eos_token
    known = next((token for token in _PADDING_TOKENS if token in tokenizer.get_vocab()), None)
    if known is None:
        raise InputError(
            f"{where}: its tokenizer has no padding token, nor an end token to pad with; set pad_token and save it"
        )
    return known


def _holds_tokenizer(location: str) -> bool:
    """Whether a folder holds a tokenizer; of a Hub id it is not known yet."""
    folder = Path(location)
    return not folder.is_dir() or any((folder / name).is_file() for name in _TOKENIZER_FILES)


def fit_to_tokenizer(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Let a model pad with its tokenizer's padding token: a causal classifier reads the last token that is none.

    Where positions count from the padding id on, as RoBERTa's do, it belongs to the weights and stays.

    Raises:
        InputError: the tokenizer has tokens that the model has no embeddings for.
    """
    rows, vocabulary = getattr(config, "vocab_size", None), tokenizer.get_vocab()
    if tokenizer.eos_token_id not in {tokenizer.pad_token_id, *tokenizer("")["input_ids"]}:
        vocabulary.pop(tokenizer.eos_token, None)  # some classes bring one that no text becomes (Qwen2's)
    tokens = max(vocabulary.values()) + 1
    if rows is not None and tokens > rows:
        raise InputError(
            f"{where}: its tokenizer has {tokens:,} tokens, but the model embeddings for {rows:,} (vocab_size); resize "
            "them (resize_token_embeddings), or take the tokenizer that belongs to it"
        )
    if config.model_type not in _POSITIONS_AFTER_PADDING:
        config.pad_token_id = tokenizer.pad_token_id


def load_processor(
    location: str, kind: TaskKind | None, max_length: int | None = None
) -> PreTrainedTokenizerBase | BaseImageProcessor:
    """What turns a task's rows into the model's inputs: its tokenizer, or its image processor.

    Raises:
        InputError: there is none.
    """
    if kind == "token-classification":
        return _reading_words(load_tokenizer(location, max_length), location)
    if kind != "image-classification":
        return load_tokenizer(location, max_length)
    try:
        return AutoImageProcessor.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # as for the config
        raise InputError(f"{location}: its image processor cannot be loaded ({reason_of(error)})") from error


def _reading_words(tokenizer: PreTrainedTokenizerBase, location: str) -> PreTrainedTokenizerBase:
    """A tokenizer that reads words given one by one as it reads them in a text.

    A byte-level one (RoBERTa, GPT-2) reads them as if they were one word, unless it puts a space before each.

    Raises:
        InputError: it can't be made to.
    """
    if not tokenizer.is_fast or _reads_words(tokenizer):
        return tokenizer
    spaced = AutoTokenizer.from_pretrained(location, add_prefix_space=True)
    if not _reads_words(spaced):  # one without a class of its own, for which the option does nothing
        spaces = normalizers.Prepend(" ")
        known = spaced.backend_tokenizer.normalizer
        spaced.backend_tokenizer.normalizer = spaces if known is None else normalizers.Sequence([known, spaces])
    if not _reads_words(spaced):
        raise InputError(
            f"{location}: its tokenizer reads words given one by one as one word; save it with add_prefix_space=True "
            f"(AutoTokenizer.from_pretrained({location!r}, add_prefix_space=True).save_pretrained(…))"
        )
    spaced.pad_token, spaced.model_max_length = tokenizer.pad_token, tokenizer.model_max_length
    return spaced


def _reads_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a word by itself becomes the tokens that it becomes in a text."""
    alone = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    in_text = tokenizer("a a", add_special_tokens=False)["input_ids"]
    word = alone[len(alone) // 2 :]
    return in_text[-len(word) :] == word


def load_classifier(
    location: str,
    task: Task,
    *,
    label_map: Mapping[str, str] | None = None,
    dtype: torch.dtype | str = "auto",
    merge: bool = False,
) -> PreTrainedModel:
    """A trained classification (or regression) model whose outputs stand in the order of the task's labels.

    Args:
        location: folder or Hub id.
        label_map: the model's label names → the task's, where they differ.
        dtype: of the weights; the stored one by default.
        merge: add adapters to the weights, so that layers can be taken from it.

    Raises:
        InputError: the labels differ, the weights are not those of its config or not finite, or the head has none.
    """
    config = load_config(location)
    order = label_order(config, task, label_map, where=location)
    _read_tokenizer(config, location, task.kind)
    base = base_folder(Path(location), weights=True)
    model, fit = load_weights(str(base or location), model_class(config, task.kind), config, dtype)
    if base is not None:
        model = with_stored_adapters(model, Path(location), merge=merge)
        fit = _with_head_of_adapters(fit, Path(location))
    problems = fit_problems(fit, task.kind, new_head=False)
    if problems:
        raise InputError(*(f"{location}: {problem}" for problem in problems))
    refuse_not_finite(model, location)
    if order is not None:
        _permute_head(model, order)
    set_labels(model.config, task)
    return model.eval()


def load_for_finetuning(location: str, task: Task, *, from_scratch: bool = False) -> PreTrainedModel:
    """A pretrained model with a head for the task in float32; a head that is missing or of another shape is new.

    What is new is drawn from torch's global generator: seed it first.

    Args:
        from_scratch: all of it is new.

    Raises:
        InputError: the weights are not those of its config, its head aside, or not finite.
    """
    config = load_config(location)
    set_labels(config, task)
    _read_tokenizer(config, location, task.kind)
    if from_scratch:
        return from_config(config, task.kind)
    model, fit = load_weights(location, model_class(config, task.kind), config, torch.float32)
    problems = fit_problems(fit, task.kind, new_head=True)
    if problems:
        raise InputError(*(f"{location}: {problem}" for problem in problems))
    for note in fit.notes:
        logger.warning("%s: %s", location, note)
    refuse_not_finite(model, location)
    return model


def _read_tokenizer(config: PretrainedConfig, location: str, kind: TaskKind) -> None:
    """Fit a config to the tokenizer that lies beside it, if one does."""
    if kind != "image-classification" and _holds_tokenizer(location):
        fit_to_tokenizer(config, load_tokenizer(location), location)


def model_class(config: PretrainedConfig, kind: TaskKind) -> type[PreTrainedModel]:
    """The class of models of this config for a kind of task.

    Raises:
        InputError: its family has none.
    """
    try:
        with torch.device("meta"):
            return type(from_config(config, kind))
    except ValueError as error:
        raise InputError(f"{config.model_type} makes no model for {kind} ({reason_of(error)})") from error


# --- whether stored weights are those of the config -----------------------------------------------------------------


def stored_fit(source: ModelSource, task: Task, *, new_head: bool) -> tuple[Fit | None, list[str]]:
    """How a model's stored weights stand to its config, by their files' headers alone, and what is to be said of it.

    None of those that are still on the Hub, or that another package quantized.

    Args:
        new_head: whether the model gets the task's head; a head of another shape is then drawn anew.

    Raises:
        InputError: files that are broken, or a family without models for the task.
    """
    config, files = source.config, weight_files(Path(source.base or source.location))
    if not files or not readable_on_meta(config):
        return None, []
    if new_head:
        config = type(config).from_dict(config.to_dict())
        set_labels(config, task)
    chosen, stored = model_class(config, task.kind), stored_shapes(files)
    names = plain_names(stored, chosen, config)
    fit = fit_of(stored, chosen, config, names)
    if source.base is not None:
        fit = _with_head_of_adapters(fit, Path(source.location))
    note = prefix_note(names)
    notes = [*([note] if note is not None else []), *(fit.notes if new_head else [])]
    return fit, [f"{source.reference}: {each}" for each in notes]


def fit_problems(fit: Fit, kind: TaskKind, *, new_head: bool) -> list[str]:
    """What is wrong with stored weights.

    Args:
        new_head: whether the head may be new; where it may not, a pooler that nothing reads still may.
    """
    if fit.problem is not None:
        return [fit.problem]
    per_token = kind in ("token-classification", "question-answering", *OF_LANGUAGE)
    untrained = fit.new_head if per_token else fit.untrained
    if new_head or (not untrained and not fit.reshaped_head):
        return []
    if fit.reshaped_head:
        return [replace(fit, reshaped=fit.reshaped_head).problem or ""]
    return [no_head_message(sorted(untrained))]


def has_head(source: ModelSource, task: Task) -> bool:
    """Whether a model was saved with a head for a kind of task: by the name of its class, and by its weights."""
    architecture = (source.config.architectures or [""])[0]
    endings = [auto_class(task.kind).__name__.removeprefix("AutoModel")]
    endings += ["LMHeadModel"] if task.kind == "causal-lm" else []
    named = any(architecture.endswith(ending) for ending in endings)
    of_another_kind = not named and ("For" in architecture or architecture.endswith("LMHeadModel"))
    fit, _ = stored_fit(source, task, new_head=False)
    if fit is None:
        return named or not architecture  # it is looked at again when its weights are here
    return not of_another_kind and not (fit.new_head or fit.reshaped_head)


def _with_head_of_adapters(fit: Fit, folder: Path) -> Fit:
    """A base's fit, less what is stored beside its adapters."""
    beside = stored_beside_adapters(folder)
    return replace(
        fit,
        new_head=tuple(name for name in fit.new_head if name not in beside),
        new_pooler=tuple(name for name in fit.new_pooler if name not in beside),
        reshaped_head=tuple(each for each in fit.reshaped_head if each[0] not in beside),
    )


# --- configs and labels ---------------------------------------------------------------------------------------------


def from_config(config: PretrainedConfig, kind: TaskKind) -> PreTrainedModel:
    """A float32 model of this config with new weights (from torch's global generator)."""
    plain = config.to_dict()
    plain.pop("quantization_config", None)
    copied = type(config).from_dict(plain)
    copied.architectures = copied.architectures or []  # DeiT has two heads, and `from_config` looks here which is meant
    return auto_class(kind).from_config(copied, dtype=torch.float32, trust_remote_code=False)


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

    Names that are the same are taken first; the others are compared without case, and with spaces and hyphens as
    underscores.

    Raises:
        InputError: the label sets differ, differ by case alone in a way that leaves several readings, or the model only
            has `LABEL_0`-like names.
    """
    if task.kind not in PROBLEM_TYPES:
        return None
    if task.kind == "regression":
        if config.num_labels != 1:
            raise InputError(f"{where}: has {config.num_labels} outputs, but {task.name} is a regression with one")
        return None
    wanted = list(task.label_names or ())
    names = [config.id2label[index] for index in range(config.num_labels)]
    mapped = [(label_map or {}).get(name, name) for name in names]
    if sorted(map(_normalise, mapped)) == sorted(map(_normalise, wanted)):
        order = _matched(wanted, mapped, where)
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


def _matched(wanted: list[str], names: list[str], where: str) -> list[int]:
    """For each wanted name the position of the name that it is, of two lists that are alike but for case."""
    found = {name: names.index(name) for name in wanted if names.count(name) == wanted.count(name) == 1}
    rest = [index for index in range(len(names)) if index not in found.values()]
    forms = Counter(_normalise(names[index]) for index in rest)
    alike = [names[index] for index in rest if forms[_normalise(names[index])] > 1]
    if alike:
        raise InputError(
            f"{where}: its labels {', '.join(map(repr, alike))} differ by case or spaces alone, and are not exactly "
            f"the task's ({', '.join(map(repr, wanted))}); say which is which in teacher_label_map (label_map for "
            "eval and quantize)"
        )
    by_form = {_normalise(names[index]): index for index in rest}
    return [found[name] if name in found else by_form[_normalise(name)] for name in wanted]


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
    if weights and not weight_files(folder):
        pickled = [path.name for path in folder.glob("*.bin")]
        hint = "; from_scratch: true starts from its config alone"
        if pickled:
            hint = f"; {pickled[0]} is pickled and not read: save it with save_pretrained"
        raise InputError(f"{folder}: a model folder without weights (no model.safetensors){hint}")


def size_on_disk(folder: Path) -> int:
    """Bytes of a model folder's weight files; an adapter counts with the model it belongs to, if that lies here."""
    size = sum(path.stat().st_size for path in [*weight_files(folder), *folder.glob(ADAPTER_WEIGHTS)])
    base = base_of(folder)
    return size + (size_on_disk(Path(base)) if base is not None and Path(base).is_dir() else 0)


def _folder_fingerprint(folder: Path) -> str:
    files = [folder / "config.json", *weight_files(folder), *(folder / name for name in _TOKENIZER_FILES)]
    files += [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS]
    return " ".join(sha256(path) for path in files if path.is_file())
