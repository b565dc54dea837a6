"""The verb `factorize`: replace matrices of a model by products of two smaller ones."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from distill.common.console import log, remark
from distill.common.distributed import on_main_process
from distill.common.records import StepRecord
from distill.compression.factorization.factorize import factorize_with, put_ranks
from distill.compression.factorization.settings import (
    FactorizationSettings,
    Ranks,
    factorizable_modules,
    likely_ranks,
    planned_ranks,
)
from distill.compression.quantization.mixed import size_in_bytes
from distill.data.load import Data
from distill.errors import InputError
from distill.models.labels import set_labels
from distill.models.load import from_config
from distill.models.replacements import is_quantized
from distill.models.weights import on_meta
from distill.verbs.base import Estimate, Memory, ModelInput, StepPlan, StepResult, Verb
from distill.verbs.calibration import loaded_with_rows, rows_measured_on

_SETTINGS = {field.name for field in fields(FactorizationSettings)}
_ROWS = 512


@dataclass(kw_only=True)
class FactorizeOptions(FactorizationSettings):
    """Replace matrices by products of two smaller ones: fewer bytes, hardly ever faster."""

    model: str = field(metadata={"help": "What to factorize: a Hub id, a folder, package:…, or an earlier step."})
    calibration_rows: Annotated[int, Field(ge=1)] | None = field(
        default=None,
        metadata={"help": f"Training rows that activation and fisher measure on; by default {_ROWS}."},
    )
    label_map: dict[str, str] | None = field(
        default=None, metadata={"help": "The model's label names → the task's, where they differ."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration_rows is not None and not self.reads_rows:
            raise InputError("calibration_rows: has no effect with method: svd; leave it out")

    @property
    def settings(self) -> FactorizationSettings:
        """Those of the options that the function of a model takes."""
        return FactorizationSettings(**{name: getattr(self, name) for name in _SETTINGS})


@dataclass(frozen=True, kw_only=True)
class FactorizePlan(StepPlan):
    """The plan of a factorization."""

    ranks: Ranks | None
    """Of each module that is factorized; None where weights and rows decide in the step."""
    whole: tuple[str, ...]
    """Modules that stay as they are, since their factors would be no smaller."""
    num_parameters: int
    """Of the model that is left, at most."""
    num_parameters_before: int


def _plan(options: FactorizeOptions, inputs: dict[str, ModelInput], data: Data | None) -> FactorizePlan:
    """The ranks where the options alone say them, from a skeleton of the model.

    Raises:
        InputError: a model that can't be factorized, or ranks that make nothing smaller.
    """
    config = copy.deepcopy(inputs["model"].config)
    ranks, whole, before, left = None, tuple[str, ...](), 0, 0
    if data is not None and not is_quantized(config):  # which is refused, as for other verbs
        set_labels(config, data.task)
        with on_meta():
            skeleton = from_config(config, data.task.kind)
        before = sum(parameter.numel() for parameter in skeleton.parameters())
        ranks = planned_ranks(skeleton, options.settings)
        if ranks is not None:
            whole = tuple(name for name in factorizable_modules(skeleton, options.settings) if name not in ranks)
        put_ranks(skeleton, likely_ranks(skeleton, options.settings) if ranks is None else ranks)
        config, left = skeleton.config, before
        if ranks is not None:
            left = sum(parameter.numel() for parameter in skeleton.parameters())
        elif options.size is not None:
            left = size_in_bytes(options.size) // 4
    return FactorizePlan(
        inputs=inputs,
        config=config,
        layers=None,
        layer_pairs={},
        weight_bytes=None,
        is_adapter=False,
        is_bound=ranks is None,
        ranks=ranks,
        whole=whole,
        num_parameters=left,
        num_parameters_before=before,
    )


def factorize(
    options: FactorizeOptions, plan: FactorizePlan, data: Data, folder: Path, *, profile: bool = False
) -> StepResult:
    """Factorize the step's model, on the main process alone.

    Args: as for `RunStep`; `profile` changes nothing, as nothing is trained.
    """
    decided: dict[str, Any] = {}

    def work() -> None:
        model, processor, batches = loaded_with_rows(options, plan, data, rows=_ROWS)
        model, ranks = factorize_with(model, batches, options.settings)
        if plan.ranks is None:
            decided.update(ranks=ranks)
            log.print(f"      {_in_words(ranks)}")
        if not ranks:
            log.print(remark("no rank makes a matrix smaller and keeps as much; the model is as it was"))
        model.to("cpu").save_pretrained(folder)
        processor.save_pretrained(folder)

    on_main_process(work)
    return StepResult(decided=decided or None)


def _estimate(options: FactorizeOptions, plan: FactorizePlan, data: Data) -> Estimate:
    weights = 4 * plan.num_parameters_before
    return Estimate(plan.num_parameters, 4 * plan.num_parameters, Memory(weights=3 * weights))  # vectors are float64


def _lines(options: FactorizeOptions, plan: FactorizePlan) -> list[str]:
    if plan.ranks is None:
        if options.size is not None:
            return [f"ranks spread over matrices, within {options.size}"]
        return [f"ranks spread over matrices, {options.energy:g} of each kept on average"]
    lines = [_in_words(plan.ranks)]
    if plan.whole:
        more = ", …" * (len(plan.whole) > 1)
        lines.append(f"{_matrices(len(plan.whole))} left whole, as factors would be no smaller: {plan.whole[0]}{more}")
    return lines


def _in_words(ranks: Mapping[str, int]) -> str:
    counts = Counter(ranks.values())
    if not counts:
        return "no matrix is factorized"
    if len(counts) > 4:
        least, *_, most = sorted(counts)
        return f"{len(ranks)} matrices of ranks from {least} to {most}"
    return ", ".join(f"{_matrices(count)} of rank {rank}" for rank, count in sorted(counts.items()))


def _matrices(count: int) -> str:
    return "1 matrix" if count == 1 else f"{count} matrices"


def _summary(options: Mapping[str, Any], parents: Sequence[str]) -> str:
    return f"{' and '.join(parents)} with matrices that are products of two smaller ones"


def _details(record: StepRecord, named: Callable[[str], str]) -> list[str]:
    options, decided = record.options, record.decided or {}
    which = options["modules"] or ("embeddings" if not isinstance(options["rank"], dict) else "named modules")
    which = which if isinstance(which, str) else ", ".join(which)
    limits = {name: options[name] for name in ("rank", "energy", "size") if options[name] is not None}
    limit = ", ".join(f"{name} {value}" for name, value in limits.items() if not isinstance(value, dict))
    kept = {
        "svd": "by truncated SVD",
        "activation": "by an SVD that keeps the layers' outputs on training rows (DRONE)",
        "fisher": "by an SVD that keeps the rows of weights that predictions depend on (FWSVD)",
    }[options["method"]]
    lines = [f"Factorized ({which}{f', {limit}' if limit else ''}) {kept}"]
    if "ranks" in decided:
        lines.append(f"Left: {_in_words(decided['ranks'])}")
    return lines


FACTORIZE = Verb(
    name="factorize",
    options=FactorizeOptions,
    plan=_plan,
    run=factorize,
    trains=False,
    needs_head=("model",),
    label_map="label_map",
    takes_quantized=lambda _: False,
    problems=lambda options, plan, data: [],
    estimate=_estimate,
    lines=_lines,
    rows=rows_measured_on,
    splits=lambda options, _: {"train"} if options.reads_rows else set(),
    resolved=asdict,
    is_smaller=lambda _, of_parent: True,
    is_compared=False,
    has_variants=False,
    is_plain=lambda _: False,
    relation="finetune",
    tags=lambda _: [],
    lineage_tags=("low-rank",),
    summary=_summary,
    details=_details,
)
