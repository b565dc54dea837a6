"""The verb `trim_vocabulary`: leave out of a model and its tokenizer the tokens that the rows don't need."""

import copy
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.common.console import log
from distill.common.distributed import on_main_process
from distill.common.records import StepRecord
from distill.compression.tokenizer_file import read_description, with_description, with_tokens
from distill.compression.trimmed_model import trim_config, trim_model
from distill.compression.vocabulary import TrimCoverage, count_tokens, kept_tokens, refuse_limits, trim_coverage
from distill.data.columns import text_problem, words_problem
from distill.data.files.readers import read_splits
from distill.data.load import Data
from distill.errors import InputError
from distill.models.labels import set_labels
from distill.models.load import from_config, load_classifier, load_processor
from distill.models.replacements import is_quantized
from distill.tasks.kinds import KINDS
from distill.verbs.base import Estimate, Memory, ModelInput, StepPlan, StepResult, Verb

_ROWS_AT_ONCE = 10_000


@dataclass(kw_only=True)
class TrimOptions:
    """Leave out the tokens that the training rows don't use, or hardly."""

    model: str = field(metadata={"help": "What to trim: a Hub id, a folder, package:…, or an earlier step."})
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "How many tokens stay, those that always do included; rounded up to a multiple of 8."},
    )
    coverage: float | None = field(
        default=None, metadata={"help": "Instead: the share of the rows' tokens that stay, such as 0.99."}
    )
    min_count: int | None = field(
        default=None, metadata={"help": "Instead: tokens that stand in the rows as often stay."}
    )
    text: str | None = field(
        default=None,
        metadata={
            "help": "More texts whose tokens are counted beside those of the training and unlabelled rows: a file, "
            "folder or data set; of it the task's text columns, or else its first one."
        },
    )
    label_map: dict[str, str] | None = field(
        default=None, metadata={"help": "The model's label names → the task's, where they differ."}
    )

    def __post_init__(self) -> None:
        refuse_limits(vocab_size=self.vocab_size, coverage=self.coverage, min_count=self.min_count)


@dataclass(frozen=True, kw_only=True)
class TrimPlan(StepPlan):
    """The plan of a trimming."""

    kept: tuple[int, ...]
    """The ids of the tokens that stay, in ascending order."""
    tokenizer: tempfile.TemporaryDirectory[str] | None
    """The trimmed tokenizer, for steps that are planned on top of this one; None where the rows can't be read."""
    counted: int
    """Tokens of the rows that the choice is made by."""
    vocab_size_before: int
    num_parameters_before: int
    num_parameters: int

    @property
    def tokenizer_location(self) -> str:
        """The trimmed tokenizer's folder, before the step has run."""
        return self.source.tokenizer_location if self.tokenizer is None else self.tokenizer.name


def _plan(options: TrimOptions, inputs: dict[str, ModelInput], data: Data | None) -> TrimPlan:
    """The tokens that stay: they follow from tokenizer and rows, whatever the weights.

    Rows are tokenized into the cache on disk, where the steps around this one find them, so they are counted in a
    moment.

    Raises:
        InputError: a model or tokenizer that can't be trimmed, a size that can't be, or texts that can't be read.
    """
    source = inputs["model"]
    config, kept, counted = copy.deepcopy(source.config), tuple[int, ...](), 0
    num_before, num_after, folder = 0, 0, None
    if data is not None and not is_quantized(config):  # which is refused whatever is planned
        if KINDS[data.task.kind].reads == "images":
            raise InputError(f"model: {source.reference} reads images, so it has no vocabulary; leave the step out")
        set_labels(config, data.task)
        with torch.device("meta"):
            skeleton = from_config(config, data.task.kind)
        tokenizer = load_processor(source.tokenizer_location, data.task.kind, data.max_length)
        try:
            kept, counted = _choose(options, skeleton, tokenizer, data)
            trimmed, small = _trimmed_tokenizer(tokenizer, kept), trim_model(skeleton, kept)
        except InputError as error:
            own = ((each, each.startswith("tokenizer:")) for each in error.problems)
            raise InputError(*(f"model: its {each}" if is_its else each for each, is_its in own)) from None
        folder = tempfile.TemporaryDirectory(prefix="distill-tokenizer-")
        trimmed.save_pretrained(folder.name)
        num_before, num_after = (sum(each.numel() for each in model.parameters()) for model in (skeleton, small))
        config = trim_config(config, kept)
    return TrimPlan(
        inputs=inputs,
        config=config,
        layers=None,
        layer_pairs={},
        weight_bytes=None,
        is_adapter=False,
        kept=kept,
        tokenizer=folder,
        counted=counted,
        vocab_size_before=getattr(source.config, "vocab_size", 0),
        num_parameters_before=num_before,
        num_parameters=num_after,
    )


def trim(options: TrimOptions, plan: TrimPlan, data: Data, folder: Path, *, profile: bool = False) -> StepResult:
    """Trim the vocabulary of the step's model, on the main process alone.

    Args: as for `RunStep`; `profile` changes nothing, as nothing is trained.
    """
    decided: dict[str, Any] = {
        "vocab_size_before": plan.vocab_size_before,
        "vocab_size": len(plan.kept),
        "tokens": plan.counted,
    }

    def work() -> None:
        location, kind = plan.source.location, data.task.kind
        model = load_classifier(location, data.task, label_map=options.label_map, dtype=torch.float32)
        tokenizer = load_processor(location, kind, data.max_length)
        trimmed = _trimmed_tokenizer(tokenizer, plan.kept)
        decided["touched"] = {}
        for split, _, _ in data.scored_splits():
            touched = trim_coverage(tokenizer, trimmed, _texts(data.splits[split], data.task.text))
            decided["touched"][split] = asdict(touched)
            log.print(
                f"      {split}: {touched.row_share:.1%} of the rows hold a token that is gone, "
                f"and {touched.token_share:.1%} of the tokens are such"
            )
        trim_model(model, plan.kept).save_pretrained(folder)
        trimmed.save_pretrained(folder)

    on_main_process(work)
    return StepResult(decided=decided)


def _choose(
    options: TrimOptions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data
) -> tuple[tuple[int, ...], int]:
    """The tokens that stay, and by how many tokens of rows and texts they were chosen.

    Args:
        options: of the step.
        model: its model, on meta.
        tokenizer: its tokenizer.
        data: the rows.

    Raises:
        InputError: as of `_plan`.
    """
    chosen = partial(
        kept_tokens,
        model,
        tokenizer,
        vocab_size=options.vocab_size,
        coverage=options.coverage,
        min_count=options.min_count,
    )
    chosen(Counter())  # tells what can't be before all rows are read
    counts: Counter[int] = Counter()
    for split in ("train", "unlabelled"):
        if split in data.splits:
            counts.update(_counted(data.tokenized(split, tokenizer)))
    for special in tokenizer.all_special_ids:
        counts.pop(special, None)
    if options.text is not None:
        counts.update(count_tokens(tokenizer, _more_texts(options.text, data)[0]))
    return tuple(chosen(counts)), counts.total()


def _counted(rows: datasets.Dataset) -> dict[int, int]:
    """How often each token stands in tokenized rows, cut as a model is given them."""
    found = np.zeros(0, np.int64)
    for table in rows.select_columns(["input_ids"]).with_format("arrow").iter(_ROWS_AT_ONCE):
        ids = table["input_ids"].combine_chunks().flatten().to_numpy()
        more = np.bincount(ids, minlength=len(found))
        more[: len(found)] += found
        found = more
    return {int(number): int(found[number]) for number in np.flatnonzero(found)}


def _more_texts(path: str, data: Data) -> tuple[Iterator[list[str]], str]:
    """The rows of `text`, and a fingerprint of them.

    Raises:
        InputError: nothing there, not readable, or without texts.
    """
    read = read_splits(data.task, path, None, key="text")
    parts = []
    for split, rows in read.splits.items():
        columns = [column for column in data.task.text if column in rows.column_names]
        columns = columns or [name for name in rows.column_names if _text_problem(rows, name) is None][:1]
        if not columns:
            raise InputError(f"text: {split} of {path} has no column of texts; it has {', '.join(rows.column_names)}")
        wrong = [f"text: column {name!r} of {split} {each}" for name in columns if (each := _text_problem(rows, name))]
        if wrong:
            raise InputError(*wrong)
        parts.append(_texts(rows, columns))
    return itertools.chain.from_iterable(parts), read.fingerprint


def _text_problem(rows: datasets.Dataset, column: str) -> str | None:
    """What keeps a column from being texts, or lists of words; None where it is either."""
    problem = text_problem(rows, column)
    return problem if problem is None or words_problem(rows, column) is not None else None


def _texts(rows: datasets.Dataset, columns: Sequence[str]) -> Iterator[list[str]]:
    """Of each row the texts or words of these columns, one after the other."""
    for batch in rows.select_columns(list(columns)).iter(_ROWS_AT_ONCE):
        for values in zip(*(batch[column] for column in columns), strict=True):
            yield [text for value in values for text in (value if isinstance(value, list) else [value])]


def _trimmed_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    return with_description(tokenizer, with_tokens(read_description(tokenizer), kept))


def _estimate(options: TrimOptions, plan: TrimPlan, data: Data) -> Estimate:
    weights = 4 * plan.num_parameters
    return Estimate(plan.num_parameters, weights, Memory(weights=4 * plan.num_parameters_before + weights))


def _lines(options: TrimOptions, plan: TrimPlan) -> list[str]:
    left = f"{plan.vocab_size_before:,} → {len(plan.kept):,} tokens of the vocabulary"
    return [f"{left}, chosen by {plan.counted:,} tokens of the rows" + (" and of text" if options.text else "")]


def _rows(options: TrimOptions, data: Data) -> list[Any]:
    texts = [] if options.text is None else [_more_texts(options.text, data)[1]]
    return [data.task.label_names, data.max_length, data.train_fingerprint, *texts]


def _summary(options: Mapping[str, Any], parents: Sequence[str]) -> str:
    return f"{' and '.join(parents)} with a vocabulary of the tokens that the training rows use most"


def _details(record: StepRecord, named: Callable[[str], str]) -> list[str]:
    decided = record.decided or {}
    lines = [f"Vocabulary: {decided['vocab_size_before']:,} → {decided['vocab_size']:,} tokens ({_limit(record)})"]
    for split, each in decided["touched"].items():
        touched = TrimCoverage(**each)
        lines.append(
            f"Tokens that are gone stand in {touched.row_share:.1%} of the {split} rows, and are "
            f"{touched.token_share:.1%} of their tokens; they are read as smaller ones"
        )
    return lines


def _limit(record: StepRecord) -> str:
    """The option that chose the tokens, as a recipe says it."""
    name = next(each for each in ("vocab_size", "coverage", "min_count") if record.options[each] is not None)
    return f"`{name}: {record.options[name]:g}`" if name == "coverage" else f"`{name}: {record.options[name]}`"


TRIM_VOCABULARY = Verb(
    name="trim_vocabulary",
    options=TrimOptions,
    plan=_plan,
    run=trim,
    trains=False,
    needs_head=("model",),
    label_map="label_map",
    takes_quantized=lambda _: False,
    problems=lambda options, plan, data: [],
    estimate=_estimate,
    lines=_lines,
    rows=_rows,
    splits=lambda options, _: {"train", "unlabelled"},
    resolved=asdict,
    is_smaller=lambda _, of_parent: False,  # on disk it is; embeddings that are left out were never waited for
    is_compared=False,
    has_variants=False,
    is_plain=lambda _: False,
    relation="finetune",
    tags=lambda _: [],
    lineage_tags=(),
    summary=_summary,
    details=_details,
)
