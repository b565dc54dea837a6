"""Lines of tagged words."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.tasks.base import Task
from distill.tasks.outputs import finite_logits
from distill.tasks.predicted.rows import shown
from distill.tasks.targets import IGNORED


def read_tag_probabilities(
    model: PreTrainedModel, batch: Mapping[str, Tensor], labels: Sequence[Sequence[int]], name: str
) -> list[list[tuple[int, float]]]:
    """Find the likeliest tag and its probability for each word of each row of a batch.

    Args:
        model: in evaluation mode.
        batch: its inputs, B×T.
        labels: of each row's tokens, −100 for those that stand for no word; padding is on the right.
        name: of the model, for messages.

    Raises:
        InputError: logits that are NaN or infinite.
    """
    probabilities, tags = torch.softmax(finite_logits(model, batch, name), -1).max(-1)
    rows = []
    for row, of_row in enumerate(labels):
        places = np.flatnonzero(np.array(of_row) != IGNORED).tolist()
        rows.append([(int(tags[row, place]), float(probabilities[row, place])) for place in places])
    return rows


def tags_line(
    task: Task,
    tokenizer: Any,
    texts: Sequence[Any],
    windows: Sequence[Mapping[str, Any]],
    found: Sequence[list[tuple[int, float]]],
) -> dict[str, Any]:
    """Say the tag of each word of a row with its probability; null for words that the model did not read.

    Args:
        task: holds the names of the tags.
        tokenizer: changes nothing here.
        texts: the row's list of words.
        windows: the numbers of the words that were read, under `words`.
        found: for these the tag's id and probability.
    """
    read = dict(zip(windows[0]["words"], found[0], strict=True))
    said = []
    for number, word in enumerate(texts[0]):
        tag, score = read.get(number, (None, None))
        name = None if tag is None else (task.label_names or ())[tag]
        said.append({"word": word, "tag": name, "score": None if score is None else shown(score)})
    return {"words": said}
