"""What a training will make, decided before it runs: the student's layers and sizes, and what losses match."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from distill.compression.student import build_student, choose_layers, is_fresh, student_config
from distill.data.fingerprints import token_fingerprint
from distill.data.load import Data
from distill.data.tokenized import Processor, same_specials
from distill.errors import InputError
from distill.models.labels import set_labels
from distill.models.load import from_config, load_processor
from distill.models.replacements import is_quantized
from distill.models.structure import LayerPairs, depth_of, width_of
from distill.models.weights import on_meta
from distill.tasks.base import TaskKind
from distill.tasks.kinds import KINDS
from distill.tasks.metrics import computed
from distill.training.arguments import comparable, layer_pairs
from distill.training.config import DistillationConfig, default_learning_rate, is_on
from distill.training.features import FeatureExtractor, FeatureSpec
from distill.verbs.base import ModelInput, StepPlan, source_of
from distill.verbs.training.options import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(StepPlan):
    """The plan of a step that trains."""

    is_built: bool
    """Whether the student is built from its source; else the source itself is trained."""
    seeds: tuple[int, ...]
    """0-based source layers that a built student's stand for, freshly initialised or not."""
    teachers: tuple[ModelInput | None, ...]
    """What it learns from; None for predictions that stand in the rows."""
    learning_rate: float
    """The highest, by default what the student's width and its start ask for."""
    same_tokens: bool = True
    """Whether all of them read the tokens that the student reads, as far as their tokenizers are there already."""

    @property
    def pairs_of_teachers(self) -> list[LayerPairs | None]:
        """For each teacher the layers that losses match; None for one in the rows."""
        return [None if each is None else self.layer_pairs[each.reference] for each in self.teachers]


def plan_training(
    options: TrainingOptions,
    inputs: dict[str, ModelInput],
    data: Data | None,
    *,
    losses: DistillationConfig | None = None,
    teachers: Sequence[ModelInput | None] = (),
) -> TrainingPlan:
    """The plan of a training.

    Args:
        options: of the step.
        inputs: the models that they name.
        data: of the recipe; None where it can't be read.
        losses: the same options where there are teachers.
        teachers: what is learned from; None for predictions that stand in the rows.

    Raises:
        InputError: with every problem of layers, sizes, adapters, losses and the metric of the best checkpoint.
    """
    source, of_teacher = source_of(inputs), "model" not in inputs
    kind = None if data is None else data.task.kind
    config, layers = copy.deepcopy(source.config), None
    pairs: dict[str, LayerPairs] = {}
    same_tokens = True
    problems = _adapter_problems(options, source, of_teacher=of_teacher)
    problems += [] if data is None else _best_metric_problems(options, losses, data)
    try:
        seeds = _chosen_layers(options, depth_of(config), halved=of_teacher)
        cuts = _cuts(options, source.config, seeds)
        problems += _lone_adapter_problems(options, source, changed=of_teacher or options.from_scratch or cuts)
        if not options.from_scratch and not is_fresh(config, options.width):
            layers = seeds
        if (cuts or of_teacher) and kind is not None and layers is not None:
            _try_on_meta(options, source.config, kind, seeds)
        if cuts:
            config = student_config(config, options.student_arch, list(seeds), options.width)
        for teacher in teachers:
            if teacher is None or losses is None:
                continue
            same = _reads(teacher, kind) == _reads(source, kind)
            if not same and kind is not None and not KINDS[kind].pairs:
                what = "image processor" if KINDS[kind].reads == "images" else "tokenizer"
                problems.append(
                    f"{'teacher' if of_teacher else 'model'}: its {what} is not that of {teacher.reference}, and "
                    f"{kind} compares what both read piece by piece; start from a model that reads the same"
                    + ("" if of_teacher else f", or say teacher: {source.reference} if that has its trimmed vocabulary")
                )
            alike = same or (
                (kind is None or KINDS[kind].pairs) and same_specials(*_processors((source, teacher), kind))
            )
            problems += comparable(losses, [config, teacher.config], same_tokens=alike)
            same_tokens &= same
            pairs[teacher.reference] = layer_pairs(losses, depth_of(config), depth_of(teacher.config))
            problems += _reading_problems(pairs[teacher.reference], teacher.config, config, kind)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(*problems)
    if data is not None:
        set_labels(config, data.task)
    is_built = cuts or of_teacher
    goes_on = source.has_head and not is_built and not options.from_scratch and options.lora is None
    return TrainingPlan(
        inputs=inputs,
        config=config,
        layers=layers,
        layer_pairs=pairs,
        weight_bytes=None,
        is_adapter=options.leaves_adapter,
        is_built=is_built,
        seeds=seeds,
        teachers=tuple(teachers),
        learning_rate=options.learning_rate or default_learning_rate(width_of(config), trained=goes_on),
        same_tokens=same_tokens,
    )


def rows_of_training(options: TrainingOptions, data: Data) -> Any:
    """Give the fingerprint of the rows that change what a training makes: the `Verb.rows` of verbs that train.

    Args:
        options: where `load_best_model_at_end` is on, all rows count, as some choose the best checkpoint.
        data: the rows.
    """
    return data.fingerprint if options.load_best_model_at_end else data.train_fingerprint


def splits_of_training(options: TrainingOptions, splits: Iterable[str]) -> set[str]:
    """Name the splits whose rows change what a training makes: the `Verb.splits` of verbs that train.

    Args:
        options: where `load_best_model_at_end` is on, all splits count, as some choose the best checkpoint.
        splits: names of the data's splits.
    """
    return set(splits) if options.load_best_model_at_end else {"train", "unlabelled"}


def _chosen_layers(options: TrainingOptions, num_source_layers: int, *, halved: bool) -> tuple[int, ...]:
    """The 0-based source layers of a step's student.

    Args:
        options: of the step.
        num_source_layers: layers of what it is made from.
        halved: whether half of them are taken where the options name none.

    Raises:
        InputError: out of range.
    """
    num_layers = options.num_layers
    if num_layers is None and options.layers == "uniform" and halved:
        num_layers = max(1, num_source_layers // 2)
    if num_source_layers == 0 and num_layers is None and options.layers == "uniform":
        return ()  # a convolutional network
    return tuple(choose_layers(options.layers, num_layers, num_source_layers))


def _cuts(options: TrainingOptions, source: PretrainedConfig, layers: tuple[int, ...]) -> bool:
    """Whether a step's student is another than the model it starts from."""
    other = options.student_arch != "same" or options.width.differs_from(source)
    return other or list(layers) != list(range(depth_of(source)))


def _try_on_meta(options: TrainingOptions, config: PretrainedConfig, kind: TaskKind, layers: tuple[int, ...]) -> None:
    """Make the student on meta, of a source of this config: what can't be cut is told before anything is trained.

    Raises:
        InputError: blocks that don't stand in one list, as ALBERT's, or sizes that don't fit.
    """
    with on_meta():
        build_student(
            from_config(config, kind), student_arch=options.student_arch, layers=list(layers), width=options.width
        )


def _adapter_problems(options: TrainingOptions, source: ModelInput, *, of_teacher: bool) -> list[str]:
    """What contradicts itself in the options of weights and adapters."""
    problems = []
    if options.from_scratch and of_teacher:
        problems.append("from_scratch: needs a `model`, whose config the student gets")
    if options.merge and options.lora is None:
        problems.append("merge: there are no adapters to merge; say lora: {} too, or leave it out")
    elif options.merge and is_quantized(source.config):
        problems.append("merge: adapters merged into quantized weights would be rounded away; leave it out")
    return problems


def _lone_adapter_problems(options: TrainingOptions, source: ModelInput, *, changed: bool) -> list[str]:
    """What keeps a step from leaving an adapter alone.

    Args:
        options: of the step.
        source: the model that it starts from.
        changed: whether the adapter would belong to a model that is only made here.
    """
    if not options.leaves_adapter:
        return []
    if changed:
        return [
            "lora: the adapter alone would not tell the model that it belongs to, which is made here; name a trained "
            "`model` and keep its layers and sizes, or say merge: true, which saves the whole model"
        ]
    if not source.has_head:
        return [
            f"lora: {source.reference} has no head for this task, and an adapter is loaded into a model that has one; "
            "say merge: true, which saves the whole model, or fine-tune it first"
        ]
    return []


def _reads(model: ModelInput, kind: TaskKind | None) -> str:
    """A fingerprint of the tokens (or pixels) that a model reads of rows."""
    return token_fingerprint(load_processor(model.tokenizer_location, kind))


def _processors(models: Iterable[ModelInput], kind: TaskKind | None) -> list[Processor]:
    """What turns rows into what each of some models reads."""
    return [load_processor(model.tokenizer_location, kind) for model in models]


def _reading_problems(
    pairs: LayerPairs, teacher: PretrainedConfig, student: PretrainedConfig, kind: TaskKind | None
) -> list[str]:
    """What keeps the attention maps and relations of two models from being read."""
    problems: list[str] = []
    for side, config in enumerate((student, teacher)):
        compared = {part: tuple(pair[side] for pair in pairs.get(part, ())) for part in ("attention", "relation")}
        if kind is not None and any(compared.values()):
            with on_meta():
                skeleton = from_config(config, kind)
            try:
                FeatureExtractor(
                    skeleton, [FeatureSpec(attention=compared["attention"], relations=compared["relation"])]
                )
            except InputError as error:
                problems += error.problems
    return problems


def _best_metric_problems(options: TrainingOptions, losses: DistillationConfig | None, data: Data) -> list[str]:
    """Whether evaluations compute the metric that the best checkpoint is chosen by."""
    wanted = (options.metric_for_best_model or "loss").removeprefix("eval_")
    parts = {"hard": 1.0} if losses is None else losses.loss_weights
    known = [*computed(data.task), "loss", *(f"loss/{part}" for part, weight in parts.items() if is_on(weight))]
    if wanted in known:
        return []
    return [f"metric_for_best_model: {wanted!r} is not computed for {data.task.kind}; there are {', '.join(known)}"]
