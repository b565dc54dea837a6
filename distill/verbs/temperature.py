"""A temperature fitted on rows that are held out, for the verbs that can fold it into a head."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from distill.common.console import log, remark
from distill.common.hardware import compute_device
from distill.compression.temperature import fold_temperature
from distill.data.load import Data
from distill.data.tokenized import Processor
from distill.errors import InputError
from distill.evaluation.evaluate import logits_of_rows
from distill.evaluation.fidelity import TEMPERATURES, fit_temperature, halves
from distill.tasks.kinds import KINDS

FEWEST = 100
"""Rows that a temperature is fitted on: its standard error is then about a tenth."""

CALIBRATED = "a temperature, fitted on half of the validation rows, in its head"
"""What `check` says of a step that calibrates."""


def scored_of(splits: Iterable[str]) -> set[str]:
    """Choose the splits that a temperature depends on.

    Args:
        splits: names of all that there are.
    """
    return {"validation", *(set(splits) - {"train", "unlabelled", "test"})}


def calibration_problems(data: Data | None) -> list[str]:
    """List what keeps a model of these rows from being calibrated: its kind, or too few rows.

    Args:
        data: of the recipe; None where it can't be read.
    """
    if data is None:
        return []
    split = data.scored_splits()[0][0]
    fitted, _ = halves(len(data.splits[split]))
    if KINDS[data.task.kind].outcomes is None:
        return [f"calibrate: {data.task.kind} has no probabilities of rows to mend; leave it out"]
    if len(fitted) < FEWEST:
        return [
            f"calibrate: half of the {split} rows ({len(fitted)}) are too few to fit a temperature on; {2 * FEWEST} "
            "validation rows are enough, or leave it out"
        ]
    return []


def calibrate(model: PreTrainedModel, processor: Processor, data: Data) -> dict[str, Any]:
    """Fit a temperature on half of the first scored split, and fold it into the model's head.

    The training rows would not do, as a model is surer of what it learned from. Reports then say calibration on the
    other half alone. A model that has the fitted rows all right is left as it is: no temperature is the likeliest.

    Args:
        model: is changed; it is moved to the device that computes, and back to the CPU.
        processor: the model's tokenizer or image processor.
        data: the rows, which `calibration_problems` finds enough of.

    Returns:
        What step.json says of it under `decided`: the `temperature`, and the number of rows that it was fitted on.

    Raises:
        InputError: no output layer that a temperature could go into, or one that is not the model's last.
    """
    split = data.scored_splits()[0][0]
    fitted, _ = halves(len(data.splits[split]))
    rows = data.tokenized(split, processor).select(fitted)
    labels = [data.labels(split)[row] for row in fitted]
    outcomes = KINDS[data.task.kind].outcomes
    assert outcomes is not None
    model = model.to(compute_device())  # type: ignore[arg-type]
    logits = logits_of_rows(model, processor, data.task, rows, name=split)
    temperature = fit_temperature(*outcomes(logits.astype(np.float64), np.asarray(labels)))
    if not 1.01 * TEMPERATURES[0] < temperature < 0.99 * TEMPERATURES[1]:
        log.print(remark(f"not calibrated: no temperature is the likeliest for the {len(fitted)} {split} rows"))
        temperature = 1.0
    else:
        fold_temperature(model, temperature)
        _check_folded(logits, logits_of_rows(model, processor, data.task, rows, name=split), temperature, data)
        log.print(
            f"      temperature {temperature:.3f}, fitted on {len(fitted):,} {split} rows and folded into the head"
        )
    model.to(torch.device("cpu"))  # type: ignore[arg-type]
    return {"temperature": temperature, "temperature_rows": len(fitted)}


def _check_folded(before: np.ndarray, after: np.ndarray, temperature: float, data: Data) -> None:
    predict = KINDS[data.task.kind].predict
    scale = np.abs(before).max() / temperature
    if not np.allclose(after, before / temperature, rtol=1e-3, atol=1e-3 * scale):
        raise InputError(
            "calibrate: the layer that the temperature was folded into is not the one that gives the logits"
        )
    if not np.array_equal(predict(before), predict(after)):
        raise InputError("calibrate: a temperature in its head changes labels of this model; leave it out")
