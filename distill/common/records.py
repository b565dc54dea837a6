"""The records of a run folder, step.json and report.json."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.common.serialized import from_json
from distill.errors import InputError

SCHEMA = 1
"""Of step.json and report.json: what their keys mean."""


@dataclass(frozen=True)
class Root:
    """The model outside of a recipe that weights come from in the end, with what its card says."""

    reference: str
    hub_id: str | None = None
    revision: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class StepOrigin:
    """What step.json says of where a model comes from: its step, the models before it, the rows, options and code."""

    schema: int = SCHEMA
    name: str = ""
    run: str = ""
    """The verb."""
    fingerprint: str = ""
    """Of options, inputs and rows."""
    fingerprint_version: int = 1
    made_from: dict[str, str] = field(default_factory=dict)
    """For each earlier step that it started from, when that one was started."""
    parents: list[str] = field(default_factory=list)
    """The models that it started from, as the user wrote them."""
    lineage: list[str] = field(default_factory=list)
    """Every model it was made from, nearest first."""
    ancestors: dict[str, str] = field(default_factory=dict)
    """The steps among them, with their verbs."""
    sources: dict[str, str | None] = field(default_factory=dict)
    """The others among them, with their commits on the Hub."""
    root: Root | None = None
    layers: list[int] | None = None
    """0-based source layers that its blocks were taken from."""
    layer_pairs: dict[str, dict[str, list[list[int]]]] = field(default_factory=dict)
    """For each teacher and loss the (student, teacher) layers that were matched."""
    task: str | None = None
    kind: Any = ""
    """A `TaskKind`."""
    text: list[str] = field(default_factory=list)
    """Columns of the rows' texts."""
    labels: list[str] | None = None
    scored: list[list[str]] = field(default_factory=list)
    """Splits that models are scored on, each with the prefix and the suffix of its metrics."""
    data: dict[str, Any] = field(default_factory=dict)
    """The recipe's `data`, defaults too."""
    data_revision: str | None = None
    rows: dict[str, int] = field(default_factory=dict)
    """Of each split."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the step, defaults too."""
    environment: dict[str, Any] = field(default_factory=dict)
    code: str | None = None
    """A hash of the code that made it."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step tells of its run; it goes into step.json."""

    train_seconds: float | None = None
    samples_per_second: float | None = None
    """Training rows per second, all processes together."""
    world_size: int | None = None
    device: str | None = None
    effective_batch_size: int | None = None
    """Rows of an optimizer step, all processes together; null where batches are made by their tokens."""
    learning_rate: float | None = None
    """The highest; by default it follows from the student's width."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """Trainer's log lines."""
    truncated: dict[str, dict[str, int]] | None = None
    """Of each split its `rows`, and those that the model's tokenizer `cut`; null where none was read, and for
    images."""
    other_tokens: dict[str, dict[str, int]] | None = None
    """Of each teacher with other tokens than the student: the training `rows`, and those `left_out` of losses that
    compare token with token."""
    decided: dict[str, Any] | None = None
    """What the plan left to the step, since it hangs on weights or the clock, and what else a card tells of the model;
    null where there is nothing."""


@dataclass(frozen=True, kw_only=True)
class StepRecord(StepResult, StepOrigin):  # the fields of the last base come first
    """What step.json holds. Of a record that lacks a key (it is older, or of a step that still runs) the default says
    so."""

    started: str = ""
    """In UTC, as ISO 8601 writes it."""
    wall_seconds: float | None = None
    status: Literal["", "running", "finished"] = ""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a batch, over all calls."""

    p50: float
    p95: float


@dataclass(frozen=True)
class Measurement:
    """One timed model: an entry of report.json's `variants`."""

    name: str
    num_parameters: int
    size_on_disk_bytes: int | None
    """Bytes of the weight files; null for a model that was not read from a folder."""
    memory_bytes: int | None
    """Bytes that the loaded weights occupy; null where an engine does not tell."""
    flops_per_sample: int | None
    """Floating-point operations of one forward (a multiply-add is two); null where the model can't be traced."""
    latency_ms: Latency
    throughput_samples_per_second: float
    """Median over the rounds."""
    throughput_spread: dict[str, float]
    """`min` and `max` over the rounds, in the same unit."""
    device: str
    engine: str = field(default="torch", kw_only=True)
    threads: int | None = field(default=None, kw_only=True)
    """Of the engine (torch, or the one that it was exported for), on the CPU."""
    joules_per_sample: float | None = field(default=None, kw_only=True)
    """Of a row in a batch for the throughput; null where no counter of the device can be read."""


@dataclass(frozen=True)
class Calibration:
    """How far a model's probabilities can be believed, over the rows of the first validation split."""

    ece: float | None
    """Expected calibration error over bins of as many predictions each."""
    interval: list[float | None]
    """Of it, at 95 %."""
    brier: float | None
    """Squared distance of probabilities and outcomes, from 0 to 2."""
    nll: float | None
    """Negative log-likelihood of what is right, in nats."""
    temperature: float | None
    """What logits are to be divided by, fitted on half of the rows; above 1 for a model that is too sure."""
    held_out: dict[str, float | None] | None = None
    """On the other half: what the temperature takes off the likelihood (`nll_gain`, its interval `nll_gain_low` and
    `nll_gain_high`), and the calibration error before and after (`ece`, `ece_mended`)."""
    bins: list[list[float]] = field(default_factory=list)
    """Of the calibration error: mean confidence, share that is right, number of predictions."""
    rows: int | None = None
    """Where a model was calibrated on half of them: how many the others are, which all of this is of."""


@dataclass(frozen=True)
class Flips:
    """Rows that a model gets right and its baseline wrong (gained), the other way round (lost), and McNemar's p."""

    gained: int
    lost: int
    p: float
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same of the rows of each class; these p are Holm's over the classes."""


@dataclass(frozen=True)
class Slice:
    """Some of the scored rows, and how every model does on them."""

    by: str
    """What they are alike in: `label`, `length`, `rare_tokens`, `confidence` (the baseline's) or a column."""
    slice: str
    rows: int = 0
    metric: str = ""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Of each model."""
    intervals: dict[str, list[float | None]] = field(default_factory=dict)
    """Of each model, at 95 %."""
    p: dict[str, float] = field(default_factory=dict)
    """Of each other model: how likely as many rows drawn by chance would have lost as much, Holm's over all of them."""


@dataclass(frozen=True)
class Contamination:
    """Rows of the first validation split that are among the rows trained on, and the metrics without them."""

    rows: int
    exact: int = 0
    """Rows that are there letter for letter, but for case, Unicode's forms and white space."""
    near: int | None = None
    """Rows that are nearly there; null where that was not looked for."""
    examples: list[dict[str, Any]] | None = None
    """Of such rows: `split`, `row`, `text`, and the row that it is like (`trained_split`, `trained_row`,
    `trained_text`) with their `similarity`."""
    metrics_without: dict[str, float | None] = field(default_factory=dict)
    """The primary metric of each model without these rows."""
    splits: dict[str, dict[str, int | None]] = field(default_factory=dict)
    """`rows`, `exact` and `near` of each scored split."""


@dataclass(frozen=True)
class Scores:
    """One scored model, with the models that it was made from."""

    name: str
    run: str | None
    """The verb that made it; null for a baseline from outside."""
    path: str
    parents: list[str]
    metrics: dict[str, float | None]
    interval: list[float | None]
    """Of the primary metric, at 95 %."""
    retention: float | None
    """The primary metric over the baseline's (the other way round where lower is better)."""
    agreement: float | None
    """Share of the rows that the model and the baseline predict alike."""
    divergence: dict[str, float] | None
    """Of its predictions from the baseline's."""


@dataclass(frozen=True)
class ModelEntry(Measurement, Scores):  # the fields of the last base come first
    """One model of report.json, scored and timed."""

    train_seconds: float | None
    samples_per_second: float | None
    truncated: dict[str, dict[str, int]] | None = None
    calibration: Calibration | None = None
    flips: Flips | None = None
    cost_per_million: dict[str, float] | None = None
    """Predictions, by the rows of a call; null without a price."""
    fleet_bytes: int | None = None
    """Bytes of the weight files sent to every device; null without a fleet."""


@dataclass(frozen=True)
class Comparison:
    """What one model has over another on the same rows."""

    model: str
    over: str
    difference: float | None
    interval: list[float | None]


@dataclass(frozen=True)
class Recovery:
    """The share of a plain quantization's divergence that a model won back."""

    model: str
    over: str
    share: float
    interval: list[float]


@dataclass(frozen=True)
class Pick:
    """What `distill compress` has picked."""

    model: str
    reason: str
    """A paragraph of plain words."""
    limits: dict[str, float]
    """`max_mb`, `max_ms`, `min_retention`, as far as they were given."""
    runner_up: str | None
    """The model with the best metric of the others that satisfied the limits."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What report.json holds. For a key that an older report lacks, the default stands."""

    schema: int = SCHEMA
    task: str = ""
    metric: str
    environment: dict[str, Any] = field(default_factory=dict)
    baseline: str
    models: list[ModelEntry]
    variants: list[Measurement] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    truncated: dict[str, dict[str, int]] | None = None
    slices: list[Slice] | None = None
    worst_rows: list[dict[str, Any]] | None = None
    """Of each model those farthest from the baseline's predictions: `model`, `row` (its number in the first validation
    split), `text`, `label`, `baseline` and `prediction` (what the two predict), `baseline_right`, `divergence`."""
    contamination: Contamination | None = None
    price_per_hour: float | None = None
    """Of the machine, in the currency of every `cost_per_million`."""
    fleet: int | None = None
    """Devices that a model is sent to."""
    seeds: dict[str, dict[str, Any]] | None = None
    """Of each step that is there once per seed: its `models`, and by metric `mean`, `std`, `min`, `max`, `interval`."""
    pick: Pick | None = None
    """Of `distill compress`."""

    def entry(self, name: str) -> ModelEntry | None:
        """The model of this name, if the report holds it."""
        return next((model for model in self.models if model.name == name), None)


def read_step(folder: Path, name: str = "step.json") -> StepRecord | None:
    """A run folder's step.json, or its like in it; None where there is none, or what is left of one.

    Args:
        folder: the run folder.
        name: of the file.

    Raises:
        InputError: it may not be read, or its schema is another.
    """
    content = read_record(folder, name)
    return from_json(StepRecord, content) if content else None


def read_report(folder: Path) -> Report | None:
    """A run's report.json; None where there is none, or what is left of one, or a key that was always there is missing.

    Raises:
        InputError: it may not be read, or its schema is another.
    """
    content = read_record(folder, "report.json")
    try:
        return from_json(Report, content)
    except (TypeError, ValueError):
        return None


def read_record(folder: Path, name: str = "step.json") -> dict[str, Any]:
    """A run folder's step.json, or another record in it; empty where there is none, or what is left of one.

    Raises:
        InputError: it may not be read, or another version of distill wrote it with a schema of its own.
    """
    file = folder / name
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no JSON, no text
        return {}
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        return {}
    refuse_unknown_schema(file, content)
    return content


def refuse_unknown_schema(file: Path, content: dict[str, Any]) -> None:
    """Refuse a record of another schema, whose keys may mean something else; one that names no schema passes.

    Raises:
        InputError: its schema is not the one that is read here.
    """
    if content.get("schema", SCHEMA) != SCHEMA:
        raise InputError(f"{file}: has schema {content['schema']}, and this version of distill reads schema {SCHEMA}")
