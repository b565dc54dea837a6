"""Model folders and their configs: a folder here, one in an installed package, adapters, an export, or the Hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

from distill.common.private_names import class_of_config
from distill.common.records import StepRecord, read_record, read_step
from distill.common.sources import (
    locate,
    reason_of,
    sha256,
    snapshot,
    split_revision,
)
from distill.errors import InputError
from distill.models.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_of,
    stored_beside_adapters,
    task_of,
)
from distill.models.description import entries_of
from distill.models.labels import names_in_order
from distill.models.weights import weight_files

EXPORT_RECORD = "export.json"
"""In the folder of a model that was exported for an inference engine: what it is, and where its model lies."""

TOKENIZER_FILES = (
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
# The last layer of a head, among what is stored beside adapters.
_OUTPUT_LAYER = re.compile(r"(?:classifier|score|out_proj|logits_proj)\.weight$")
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "README.md", ADAPTER_WEIGHTS)
_WEIGHTS = ("model*.safetensors",)


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
        """The name of a model on the Hub; None for a folder here."""
        return split_revision(self.reference)[0] if self.revision else None


def find_model(reference: str, *, weights: bool = True, adapters: bool = False, exports: bool = False) -> ModelSource:
    """Find a model, and read its config, without loading its weights.

    Args:
        reference: a folder, `package:…`, or a Hub id.
        weights: whether it must have some; one that starts from scratch needs none.
        adapters: whether a folder of adapters will do, whose model lies here.
        exports: whether one that was exported for an inference engine will do.

    Raises:
        InputError: no such model, no config, no safetensors weights, or a digest that differs.
    """
    located = locate(reference)
    if isinstance(located, Path):
        folder, revision = located, None
    else:
        folder = snapshot(located, _SMALL_FILES)
        revision = folder.name
    if is_export(folder) and not exports:
        parents = (read_step(folder) or StepRecord()).parents
        raise InputError(f"{reference}: {export_problem(*parents[:1])}")
    base = None
    if base_of(folder) is not None:
        if not adapters:
            raise InputError(
                f"{reference}: holds adapters, and this starts from a whole model; merge them (peft: merge_and_unload) "
                "and save that"
            )
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise InputError(f"{reference}: holds adapters without {ADAPTER_WEIGHTS}; pickled ones are not read")
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
    """Fetch the weights of a model on the Hub, unless they are here.

    Raises:
        InputError: it has none in safetensors, or they are not to be had.
    """
    if source.revision is not None:
        commit = f"{source.hub_id}@{source.revision}"
        folder = snapshot(commit, (*_SMALL_FILES, *_WEIGHTS))
        if is_export(folder):
            names = [path.relative_to(folder).as_posix() for path in export_files(folder)]
            snapshot(commit, names, below=True)
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise InputError(f"{source.reference}: lacks {', '.join(missing)} on the Hub, which export.json names")
        elif not weight_files(folder) and not (folder / ADAPTER_WEIGHTS).is_file():
            raise InputError(f"{source.reference}: has no safetensors weights on the Hub; pickled ones are not read")
    if source.base is not None:
        base_folder(Path(source.location), weights=True)


def fetch_folder(reference: str) -> Path:
    """Find the folder of a model with its weights: one here, or a snapshot of one on the Hub.

    Args:
        reference: a folder, `package:…`, or a Hub id.

    Raises:
        InputError: as `find_model` and `fetch_weights`.
    """
    located = locate(reference)
    if isinstance(located, Path):
        return located
    source = find_model(reference, adapters=True, exports=True)
    fetch_weights(source)
    return Path(source.location)


def is_export(folder: Path) -> bool:
    """Tell whether a folder holds a model that was exported for an inference engine."""
    return (folder / EXPORT_RECORD).is_file()


def export_problem(parent: str | None = None) -> str:
    """Say why nothing is made from an export.

    Args:
        parent: the model that it was made from, if it is known.
    """
    instead = "the model that it was made from" if parent is None else f"{parent}, which it was made from"
    return f"is an export, the end of a chain, from which nothing is made; name {instead}"


def export_files(folder: Path) -> list[Path]:
    """List the files of an exported model: one ONNX file, or OpenVINO's `.bin` of weights and the `.xml` beside it.

    Args:
        folder: which holds an export.

    Raises:
        InputError: its record names no file in it.
    """
    name = read_record(folder, EXPORT_RECORD).get("file")
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{folder / EXPORT_RECORD}: names no file of the folder; export it again")
    file = folder / name
    return [file.with_suffix(".bin"), file] if file.suffix == ".xml" else [file]


def stored_weights(folder: Path) -> list[Path]:
    """List the files of a model folder that hold its weights, of an export too."""
    return [path for path in export_files(folder)[:1] if path.is_file()] if is_export(folder) else weight_files(folder)


def base_folder(folder: Path, *, weights: bool = False) -> Path | None:
    """Find the folder of the model that a folder's adapters belong to; None for a folder that holds no adapters.

    Args:
        folder: which may hold adapters.
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
    """Read the commit of a base on the Hub off its folder; None for a folder that is no snapshot."""
    return base.name if base.parent.name == "snapshots" else None


def load_config(location: str) -> PretrainedConfig:
    """Load a model's config, its labels named by strings from 0 on; of adapters that of the model they belong to.

    Raises:
        InputError: labels whose order is not clear, or modules that a newer version of this package described.
    """
    folder = Path(location)
    base = base_folder(folder)
    stored, _ = PretrainedConfig.get_config_dict(location if base is None else str(base))
    names = stored.get("id2label")
    ordered = None if names is None else names_in_order(names)
    if isinstance(names, list):  # AutoConfig takes mappings alone
        stored["id2label"] = dict(enumerate(ordered or ()))
        config = AutoConfig.for_model(stored.pop("model_type"), **stored)
    else:
        config = AutoConfig.from_pretrained(location if base is None else str(base), trust_remote_code=False)
    entries_of(config)  # raises for a newer version
    if ordered is not None:
        config.id2label = dict(enumerate(ordered))
        config.label2id = {name: index for index, name in enumerate(ordered)}
    if base is not None:
        labels, auto = _labels_of_adapters(folder), _CLASSES_OF_ADAPTERS.get(task_of(folder) or "")
        if labels is not None:
            config.num_labels = labels
        model_class = None if auto is None else class_of_config(auto, config)
        if model_class is not None:
            config.architectures = [model_class.__name__]
    return config


def _labels_of_adapters(folder: Path) -> int | None:
    """How many labels the head has that is stored beside adapters; None where there is none."""
    shapes = stored_beside_adapters(folder)
    rows = [shape[0] for name, shape in shapes.items() if _OUTPUT_LAYER.search(name) and len(shape) == 2]
    return rows[-1] if rows else None


def _check_folder(folder: Path, *, weights: bool) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: holds no config.json, so it is no model folder")
    if weights and not stored_weights(folder):
        if is_export(folder):
            raise InputError(f"{folder}: the model that its {EXPORT_RECORD} names is missing; export it again")
        pickled = [path.name for path in folder.glob("*.bin")]
        hint = "; from_scratch: true starts from its config alone"
        if pickled:
            hint = f"; {pickled[0]} is pickled and not read: save it with save_pretrained"
        raise InputError(f"{folder}: a model folder without weights (no model.safetensors){hint}")


def size_on_disk(folder: Path) -> int:
    """Sum the bytes of a model folder's weight files; adapters count with the model they belong to, if it is here."""
    size = sum(path.stat().st_size for path in [*stored_weights(folder), *folder.glob(ADAPTER_WEIGHTS)])
    base = base_of(folder)
    return size + (size_on_disk(Path(base)) if base is not None and Path(base).is_dir() else 0)


def _folder_fingerprint(folder: Path) -> str:
    files = [folder / "config.json", *stored_weights(folder), *(folder / name for name in TOKENIZER_FILES)]
    files += [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS]
    return " ".join(sha256(path) for path in files if path.is_file())
