"""What report.json says of each model against the baseline beyond its score: flips, calibration, slices, worst rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.common.records import Calibration, Contamination, Flips, Slice
from distill.data.load import Data
from distill.data.tokenized import Processor
from distill.evaluation.contamination import Matches, contamination_of, shown_texts
from distill.evaluation.evaluate import Evaluation
from distill.evaluation.fidelity import calibration_of, confidences, flips, halves
from distill.evaluation.slices import Groups, by_value, compare_slices, quarters, shares_of_rare
from distill.tasks.base import is_better_lower
from distill.tasks.kinds import KINDS

_WORST = 10
"""Rows of each model."""

_LONGEST_SHOWN = 1000  # characters of a row's text


@dataclass(frozen=True)
class Fidelity:
    """What report.json says of a run's models; None where it does not apply to the kind of task."""

    calibration: dict[str, Calibration | None]
    flips: dict[str, Flips | None]
    slices: list[Slice] | None
    worst_rows: list[dict[str, Any]] | None


def measure_fidelity(
    data: Data,
    evaluations: Mapping[str, Evaluation],
    *,
    baseline: str,
    processor: Processor | None,
    calibrated: bool = False,
) -> Fidelity:
    """Hold every model against the baseline on the rows of the first scored split.

    Args:
        evaluations: of each model.
        baseline: its name; it may be none of the evaluated ones, and then nothing is held against it.
        processor: the baseline's, whose tokens are counted; None leaves slices by tokens out.
        calibrated: whether any of them got a temperature that was fitted on half of the rows; calibration is then told
            of the other half, for all of them.
    """
    split = data.scored_splits()[0][0]
    its, labels = KINDS[data.task.kind], data.labels(split)
    judged = halves(len(labels))[1] if calibrated else None
    calibration = {name: _calibration(data, each, labels, judged) for name, each in evaluations.items()}
    if its.row_metric is None:
        return Fidelity(calibration, dict.fromkeys(evaluations), None, None)
    of_rows = {name: its.row_metric.of_rows(data.task, each.predictions, labels) for name, each in evaluations.items()}
    reference = evaluations.get(baseline)
    classes = its.classes(data.task, labels)
    flipped: dict[str, Flips | None] = dict.fromkeys(evaluations)
    if reference is not None and of_rows[baseline].dtype == bool:
        flipped |= {name: flips(each, of_rows[baseline], classes) for name, each in of_rows.items() if name != baseline}
    groups = _groups(data, split, reference, classes, processor)
    return Fidelity(
        calibration,
        flipped,
        compare_slices(groups, of_rows, metric=its.row_metric.name, baseline=baseline if reference else None),
        None if reference is None else _worst_rows(data, evaluations, of_rows, baseline),
    )


def measure_contamination(
    data: Data, matches: Matches | None, evaluations: Mapping[str, Evaluation]
) -> Contamination | None:
    """Count the scored rows that are like rows trained on, and score every model without them.

    Args:
        data: the rows that were trained on and scored.
        matches: of scored rows and rows trained on; None where no rows were trained on, and then None is returned.
        evaluations: by the models' names, on the first scored split.
    """
    if matches is None:
        return None
    split = data.scored_splits()[0][0]
    labels, scorer = data.labels(split), KINDS[data.task.kind].scorer
    scores = {  # windows of a language model's texts are no rows
        name: scorer(data.task, each.predictions, labels) if len(each.predictions) == len(data.splits[split]) else None
        for name, each in evaluations.items()
    }
    if KINDS[data.task.kind].row_metric is None:
        scores = dict.fromkeys(scores)
    return contamination_of(data, matches, scores)


def _calibration(
    data: Data, evaluation: Evaluation, labels: Sequence, judged: NDArray[np.int64] | None
) -> Calibration | None:
    """Of the rows numbered `judged`, or of all."""
    outcomes = KINDS[data.task.kind].outcomes
    if outcomes is None or evaluation.logits is None:
        return None
    logits, truth = np.asarray(evaluation.logits), np.asarray(labels)
    if judged is None:
        return calibration_of(*outcomes(logits, truth))
    return replace(calibration_of(*outcomes(logits[judged], truth[judged])), rows=len(judged))


# --- slices -----------------------------------------------------------------------------------------------------------


def _groups(
    data: Data,
    split: str,
    reference: Evaluation | None,
    classes: Mapping[str, NDArray[np.bool_]],
    processor: Processor | None,
) -> Groups:
    """The slices that models are compared on."""
    groups: dict[str, Mapping[str, NDArray[np.bool_]]] = {"label": classes}
    if processor is not None and KINDS[data.task.kind].reads != "images":
        tokens = _tokens(data, split, processor)
        groups["length"] = quarters([len(ids) for ids in tokens], lambda number: f"{number:.0f} tokens")
        rare = shares_of_rare(tokens, np.bincount(_all_tokens(data, processor)))
        groups["rare_tokens"] = quarters(rare, lambda share: f"{100 * share:.1f} %")
    outcomes = KINDS[data.task.kind].outcomes
    if reference is not None and reference.logits is not None and outcomes is not None:
        logits, _ = outcomes(np.asarray(reference.logits), np.asarray(data.labels(split)))
        groups["confidence"] = quarters(confidences(logits), lambda share: f"{share:.3f}")
    return groups | {column: by_value(values) for column, values in data.slices.items()}


def _tokens(data: Data, split: str, processor: Processor) -> list[NDArray[np.int64]]:
    """The token ids of each row of a split, of all windows of a row together."""
    rows = data.tokenized(split, processor)
    of_row = rows["row"] if "row" in rows.column_names else range(len(rows))
    found: list[list[NDArray[np.int64]]] = [[] for _ in range(len(data.splits[split]))]
    for number, ids in zip(of_row, rows.with_format("numpy")["input_ids"], strict=True):
        found[number].append(ids)
    return [np.concatenate(each) if each else np.zeros(0, dtype=np.int64) for each in found]


def _all_tokens(data: Data, processor: Processor) -> NDArray[np.int64]:
    """The token ids of all training rows, one after another."""
    if "train" not in data.splits:
        return np.zeros(0, dtype=np.int64)
    column = data.tokenized("train", processor).with_format("arrow")["input_ids"][:]
    return column.combine_chunks().flatten().to_numpy()


# --- worst rows -------------------------------------------------------------------------------------------------------


def _worst_rows(
    data: Data, evaluations: Mapping[str, Evaluation], of_rows: Mapping[str, NDArray], baseline: str
) -> list[dict[str, Any]]:
    """Of each model the rows whose predictions are farthest from the baseline's, the farthest first.

    The distance is the divergence of the predictions; where no logits are kept, what the row lost.
    """
    split, its = data.scored_splits()[0][0], KINDS[data.task.kind]
    assert its.row_metric is not None
    labels, reference = data.labels(split), evaluations[baseline]
    sign = 1 if is_better_lower(its.row_metric.name) else -1
    found = []
    for name, evaluation in evaluations.items():
        if name == baseline:
            continue
        divergences = None
        if reference.logits is not None and evaluation.logits is not None:
            divergences = its.targets.divergences(np.asarray(reference.logits), np.asarray(evaluation.logits))
            distances = divergences
        else:
            distances = sign * (of_rows[name].astype(float) - of_rows[baseline].astype(float))
        farthest = np.argsort(-distances, kind="stable")[:_WORST]
        for row in farthest[distances[farthest] > 0].tolist():
            found.append(
                {
                    "model": name,
                    "row": row,
                    "text": shown_texts(data, split, row, _LONGEST_SHOWN),
                    "label": its.in_words(data.task, labels[row]),
                    "baseline": its.in_words(data.task, reference.predictions[row]),
                    "prediction": its.in_words(data.task, evaluation.predictions[row]),
                    "baseline_right": bool(of_rows[baseline][row]) if of_rows[baseline].dtype == bool else None,
                    "divergence": None if divergences is None else float(divergences[row]),
                }
            )
    return found
