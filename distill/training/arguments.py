"""What a `DistillationTrainer` is given: everything wrong with it at once, and its own copy of the rest."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

from distill.common.console import log
from distill.data.batches import row_lengths
from distill.errors import InputError
from distill.models.replacements import Removed, Resized, structure_of
from distill.models.structure import LayerPairs, depth_of, width_of
from distill.tasks.base import is_better_lower
from distill.tasks.kinds import targets_of
from distill.tasks.outputs import plain_model
from distill.training.config import PARTS, DistillationConfig, TrainingConfig, default_learning_rate, is_on
from distill.training.features import resolve_layer_map


def own_arguments(args: TrainingArguments | None, student: PretrainedConfig, *, with_teacher: bool) -> TrainingConfig:
    """Copy the caller's arguments and complete them; the caller's stay as they are, for another trainer.

    Plain `TrainingArguments` (and a `TrainingConfig` beside a teacher) keep every value that they hold, theirs by
    default too; the losses are then a `DistillationConfig`'s defaults.

    Args:
        args: the caller's; None for a `DistillationConfig` of defaults.
        student: its width gives the learning rate where none is set.
        with_teacher: whether a `DistillationConfig` is needed.

    Raises:
        InputError: arguments of another class, whose own options would be passed over.
    """
    if args is None:
        args = DistillationConfig(output_dir="distilled")
    wanted = DistillationConfig if with_teacher else TrainingConfig
    if isinstance(args, wanted):
        own = copy.copy(args)
        for name, value in vars(args).items():
            if isinstance(value, dict | list):
                setattr(own, name, copy.deepcopy(value))
    else:
        own = _converted(args, wanted)
    if own.learning_rate is None:
        own.learning_rate = default_learning_rate(width_of(student))
    return own


def _converted(args: TrainingArguments, wanted: type[TrainingConfig]) -> TrainingConfig:
    given = {each.name: getattr(args, each.name) for each in fields(args) if each.init}
    unknown = sorted(given.keys() - {each.name for each in fields(wanted)})
    if unknown:
        raise InputError(
            f"args: {type(args).__name__} has options that are not read here, {unknown[0]} among them; give a "
            f"{wanted.__name__}"
        )
    given |= {name: args.mixed_precision == name for name in ("bf16", "fp16")}  # a launcher may have said it
    if given["greater_is_better"] and is_better_lower(given["metric_for_best_model"]):
        given["greater_is_better"] = None  # Trainer's own guess, which knows `…loss` alone
    if wanted is DistillationConfig and args.process_index == 0:
        log.print(
            f"      args: of {type(args).__name__} every value is kept (learning rate {args.learning_rate:g}, "
            f"{args.num_train_epochs:g} epochs), with the losses of DistillationConfig's defaults"
        )
    return wanted(**given)


def check_given(
    model: Any, teachers: Sequence[Any], args: TrainingArguments | None, options: Mapping[str, Any]
) -> None:
    """Refuse what would fail later, or be passed over without a word.

    Args:
        options: the other arguments of a `transformers.Trainer`.

    Raises:
        InputError: every problem at once.
    """
    problems = []
    if args is not None and not isinstance(args, TrainingArguments):
        problems.append(f"args: {_shown(args)}; give a DistillationConfig")
    if options.get("model_init") is not None:
        problems.append("model_init: a student is matched with its teacher once; make a trainer for each model")
    elif model is None:
        problems.append("model: missing; give the student, such as build_student(teacher, num_layers=3)")
    elif not isinstance(model, PreTrainedModel | PeftModel):
        problems.append(f"model: {_shown(model)}; give a loaded transformers model")
    problems += [
        f"teacher: {_shown(each)} is no model; give a loaded one, or 'data' for columns of the rows"
        for each in teachers
        if not isinstance(each, PreTrainedModel | PeftModel) and each != "data"
    ]
    if options.get("compute_loss_func") is not None:
        problems.append("compute_loss_func: the losses are those that args gives a weight; leave it out")
    if isinstance(options.get("processing_class"), str):
        problems.append(f"processing_class: {_shown(options['processing_class'])}; give the loaded tokenizer")
    sets = {"train_dataset": options.get("train_dataset")}
    given = options.get("eval_dataset")
    several = given.items() if isinstance(given, dict) else ()
    sets |= {f"eval_dataset[{name!r}]": rows for name, rows in several} or {"eval_dataset": given}
    problems += [f"{name}: {wrong}" for name, rows in sets.items() if (wrong := _no_rows(rows)) is not None]
    if not problems:
        problems += _unreadable(model, sets, options)
        problems += _label_problems(model, args)
        problems += _label_order_problems([model, *teachers], sets)
    if problems:
        raise InputError(*problems)


def _no_rows(rows: Any) -> str | None:
    """Why this is no data set."""
    if isinstance(rows, Mapping):
        return f"{_shown(rows)}; give one of its splits ({', '.join(map(str, rows))})"
    if isinstance(rows, str | Path):
        return f"{_shown(rows)}; give the tokenized rows"
    if type(rows).__name__ == "DataFrame":
        return f"{_shown(rows)}; give datasets.Dataset.from_pandas(…) of it, tokenized"
    if isinstance(rows, datasets.Dataset) and len(rows) == 0:
        return "has no rows"
    return None


def _unreadable(model: PreTrainedModel | PeftModel, sets: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Rows that are no inputs of the model, or can't be padded."""
    if options.get("data_collator") is not None:  # which may do both
        return []
    problems = []
    main_input = plain_model(model).main_input_name
    for name, rows in sets.items():
        if not isinstance(rows, datasets.Dataset) or rows.format["type"] == "custom":
            continue
        if main_input not in rows.column_names:
            columns = ", ".join(rows.column_names)
            problems.append(f"{name}: has no column {main_input}, which the model reads, only {columns}; tokenize it")
            continue
        pads = options.get("processing_class") is not None
        lengths = None if pads else row_lengths(rows, length_column="")  # of the tokens themselves
        if lengths is not None and len(np.unique(lengths)) > 1:
            problems.append(
                f"processing_class: missing, and {name} has rows of {lengths.min()} to {lengths.max()} tokens; give "
                "the tokenizer, which pads them"
            )
    return problems


def _label_problems(model: PreTrainedModel | PeftModel, args: TrainingArguments | None) -> list[str]:
    """Labels under names that are not read: rows would count as having none."""
    read = targets_of(model).label_columns
    others = set((args.label_names if args is not None else None) or ()) - {*read, "label", "label_ids"}
    if not others:
        return []
    return [f"label_names: labels are read from {', '.join(read)}; rename the rows' column {', '.join(sorted(others))}"]


def _label_order_problems(models: Sequence[Any], sets: Mapping[str, Any]) -> list[str]:
    """Rows whose class ids stand for other names than a model's: it would learn, or teach, one class for another."""
    problems = []
    for name, rows in sets.items():
        features = getattr(rows, "features", None) or {}
        feature = next((features[column] for column in ("labels", "label") if column in features), None)
        if not isinstance(feature, datasets.ClassLabel):
            continue
        for number, model in enumerate(each for each in models if each != "data"):
            its = [str(each) for _, each in sorted(model.config.id2label.items())]
            if its != feature.names and sorted(map(str.lower, its)) == sorted(map(str.lower, feature.names)):
                who = "the model" if number == 0 else "the teacher"
                problems.append(
                    f"{name}: its classes are {', '.join(feature.names)}, and those of {who} {', '.join(its)}, in this "
                    f"order; give load_data the model's (DataOptions(label_names={its})), or align_labels_with_mapping"
                )
    return problems


def _shown(given: Any) -> str:
    return repr(given) if isinstance(given, str) else f"a {type(given).__name__}"


def check_class_weights(args: TrainingConfig, model: PreTrainedModel) -> None:
    """Refuse class weights for a model that predicts scores, or another number of classes.

    Raises:
        InputError: they don't fit.
    """
    of_scores = targets_of(model).distributions is None
    if args.class_weights is not None and (of_scores or len(args.class_weights) != model.config.num_labels):
        outputs = "a score" if of_scores else f"{model.config.num_labels} classes"
        raise InputError(f"class_weights: {len(args.class_weights)} weights, but the model predicts {outputs}")


def layer_pairs(config: DistillationConfig, num_student_layers: int, num_teacher_layers: int) -> LayerPairs:
    """Resolve, for each loss that is on and matches layers, its (student, teacher) pairs.

    Args:
        config: holds the weights of the losses and their layer maps.
        num_student_layers: blocks, without the embeddings.
        num_teacher_layers: likewise.

    Raises:
        InputError: with every layer map that is out of range.
    """
    maps = {"hidden": ("layer_map", 0), "attention": ("attention_layer_map", 1), "relation": ("relation_layer_map", 1)}
    pairs: LayerPairs = {}
    problems: list[str] = []
    for part, (name, lowest) in maps.items():
        if is_on(config.loss_weights[part]):
            try:
                pairs[part] = resolve_layer_map(
                    getattr(config, name), num_student_layers, num_teacher_layers, name=name, lowest=lowest
                )
            except InputError as error:
                problems += error.problems
    if problems:
        raise InputError(*problems)
    return pairs


def token_losses(config: DistillationConfig) -> list[str]:
    """The weights of losses that are on and compare token with token."""
    on = [part for part in PARTS if is_on(config.loss_weights[part])]
    return [f"{part}_weight" for part in on if part not in ("soft", "hard", "contrastive")]


def comparable(config: DistillationConfig, models: Sequence[PretrainedConfig], *, same_tokens: bool) -> list[str]:
    """What keeps losses that are on from comparing two models: blocks that are not there, or other tokens.

    Args:
        models: configs of the student and of the teacher.
        same_tokens: whether both read the same tokens, in some rows at least.
    """
    on = [part for part in PARTS if is_on(config.loss_weights[part])]
    inside = [f"{part}_weight" for part in on if part not in ("soft", "hard")]
    without = [model.model_type for model in models if not depth_of(model)]
    problems = []
    if inside and without:
        problems.append(f"{', '.join(inside)}: {without[0]} has no transformer blocks to compare; set it to 0")
    of_tokens = token_losses(config)
    if of_tokens and not same_tokens:
        problems.append(
            f"{', '.join(of_tokens)}: compares token with token, but student and teacher have a tokenizer each, which "
            "read hardly a row as the same tokens; set it to 0 (soft_weight and contrastive_weight compare whole rows)"
        )
    patches = [getattr(model, "patch_size", None) for model in models]
    if of_tokens and patches[0] != patches[1]:
        problems.append(
            f"{', '.join(of_tokens)}: compares patch with patch, but the student cuts images into patches of "
            f"{patches[0]} pixels and the teacher of {patches[1]}; set it to 0"
        )
    of_heads = [name for name in inside if name in ("attention_weight", "relation_weight")]
    if of_heads and any(
        "att" in name
        for model in models
        for entry in structure_of(model)
        for name in entry.names
        if entry.kind in (Resized.kind, Removed.kind)
    ):
        problems.append(
            f"{', '.join(of_heads)}: compares heads, and a model lacks some of those that its config says; set it to 0 "
            "(hidden_weight compares whole blocks)"
        )
    return problems
