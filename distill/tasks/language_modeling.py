"""Language models: perplexity and accuracy of the tokens that they predict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from distill.tasks import scorers
from distill.tasks.base import (
    Batch,
    EncodeOptions,
    EngineUsage,
    Kind,
    LabelRule,
    PredictionRule,
    ScoringArguments,
    Task,
    labels_as_read,
    pipeline_usage,
)
from distill.tasks.classification import CLASSES
from distill.tasks.outputs import CHUNK, logits_in_chunks, refuse_not_finite_outputs
from distill.tasks.predicted.language import encode_to_fill, fillings_line, perplexity_line, read_fillings
from distill.tasks.rows import as_predicted, most_likely, no_classes
from distill.tasks.scorers import Scorer
from distill.tasks.targets import (
    IGNORED,
    BatchTargets,
    Targets,
    any_config,
    labelled_tokens,
    real_tokens,
    targets_of_tokens,
)
from distill.tasks.token_classification import tag_agreement

MASKED_SHARE = 0.15
"""Of the tokens of validation rows, whatever a training says (Devlin et al. 2019, section 3.1)."""


def encode_masked(
    batch: Batch, numbers: Sequence[int], task: Task, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> Batch:
    """Tokenize texts into windows of `max_length` tokens; windows to score are masked here, by their row's number.

    Rows to train on get masks whenever they are read.

    Args:
        batch: the task's column of texts.
        numbers: of the rows in their split.
        task: which column is read.
        tokenizer: of the model that will read the rows.
        options: `max_length` in tokens, and whether the rows are scored.
    """
    windows, rows = _windows(batch, task, tokenizer, options.max_length)
    if options.scored:
        pairs = [
            mask_row(np.array(ids), tokenizer, MASKED_SHARE, np.random.default_rng([numbers[row], window]))
            for (row, window), ids in zip(rows, windows["input_ids"], strict=True)
        ]
        windows["input_ids"] = [ids.tolist() for ids, _ in pairs]
        windows["labels"] = [labels.tolist() for _, labels in pairs]
    return windows


def encode_causal(
    batch: Batch, numbers: Sequence[int], task: Task, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> Batch:
    """Tokenize texts into windows of `max_length` tokens, which are their own labels.

    Args:
        batch: the task's column of texts.
        numbers: of the rows; they change nothing here.
        task: which column is read.
        tokenizer: of the model that will read the rows.
        options: `max_length` in tokens.
    """
    windows, _ = _windows(batch, task, tokenizer, options.max_length)
    return {**windows, "labels": [list(ids) for ids in windows["input_ids"]]}


def encode_numbered(
    batch: Batch, numbers: Sequence[int], task: Task, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> Batch:
    """Tokenize texts as `encode_causal` does, with each window's `row`: arguments as there."""
    windows, rows = _windows(batch, task, tokenizer, options.max_length)
    return {**windows, "labels": [list(ids) for ids in windows["input_ids"]], "row": [numbers[row] for row, _ in rows]}


def _windows(
    batch: Batch, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Batch, list[tuple[int, int]]]:
    """Windows of texts, and of each its text's place in the batch and its own; none too short to predict anything."""
    encoded: BatchEncoding = tokenizer(
        batch[task.text[0]],
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
        return_attention_mask=False,
        return_special_tokens_mask=True,
    )
    rows, special = encoded.pop("overflow_to_sample_mapping"), encoded.pop("special_tokens_mask")
    kept = [window for window, of_window in enumerate(special) if of_window.count(0) >= 2]
    found: Batch = {name: [values[window] for window in kept] for name, values in encoded.items()}
    found["cut"] = [False] * len(kept)
    return found, [(rows[window], window) for window in kept]


def mask_row(
    ids: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase, share: float, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Mask a share of the tokens of a row, as BERT was trained.

    Of the chosen tokens 80 % become the mask token, 10 % a random one, 10 % stay (Devlin et al. 2019, section 3.1).
    Special tokens are never chosen, and of the others always one or more.

    Args:
        ids: of the T tokens.
        tokenizer: which names the mask token, the special tokens and the vocabulary.
        share: of the tokens to choose, from 0 to 1.
        generator: of the draws.

    Returns:
        The masked ids, and the labels: −100 where nothing is predicted; T of each.
    """
    draws, kinds = generator.random((2, len(ids)))
    draws[np.isin(ids, tokenizer.all_special_ids)] = 2.0
    chosen = (draws <= max(share, draws.min())) & (draws < 2.0)
    labels = np.where(chosen, ids, IGNORED)
    random_ids = generator.integers(len(tokenizer), size=len(ids))
    masked = np.where(chosen & (kinds < 0.8), tokenizer.mask_token_id, ids)
    return np.where(chosen & (kinds >= 0.9), random_ids, masked), labels


def targets_of_next_tokens(batch: Mapping[str, Tensor], counted_rows: Tensor) -> BatchTargets:
    """Find the labels and mask of a causal LM's batch, B×(T−1): each token is predicted from the one before it.

    Args:
        batch: `attention_mask` and, where there are labels, `labels` B×T.
        counted_rows: B booleans.
    """
    tokens, labels = real_tokens(batch, counted_rows), batch.get("labels")
    labels = None if labels is None else labels.masked_fill(~tokens, IGNORED)
    tokens = tokens[:, 1:] & tokens[:, :-1]
    return labelled_tokens(None if labels is None else labels[:, 1:].masked_fill(~tokens, IGNORED), tokens)


def without_last(logits: Tensor) -> Tensor:
    """Cut off the logits of the last token, which predict what is not there: B×T×V becomes B×(T−1)×V."""
    return logits[:, :-1]


MASKED_WORDS = replace(
    CLASSES,
    name="masked_lm",
    problem_type=None,
    fits=any_config,
    token_axis=1,
    over_vocabulary=True,
    masks_inputs=True,
    batch_targets=targets_of_tokens,
)

NEXT_WORDS = replace(
    MASKED_WORDS,
    name="causal_lm",
    masks_inputs=False,
    inputs_are_labels=True,
    batch_targets=targets_of_next_tokens,
    aligned=without_last,
)


def _read(
    targets: Targets, model: PreTrainedModel, batch: Mapping[str, Tensor], labels: Sequence[Sequence[int]], name: str
) -> list[dict[str, Any]]:
    """Of each row of a batch {"loss": nats, "right": tokens, "tokens": ids that were predicted}.

    Args:
        targets: of the model.
        labels: of each row's tokens.
        name: of the model, in messages.
    """
    mask = batch["attention_mask"].bool()
    of_tokens = torch.full_like(batch["input_ids"], IGNORED)
    of_tokens[mask] = torch.tensor([label for of_row in labels for label in of_row], device=of_tokens.device)
    every = torch.ones(len(of_tokens), dtype=torch.bool, device=of_tokens.device)
    given = {"attention_mask": mask, "labels": of_tokens}
    of_tokens = cast(Tensor, targets.batch_targets(given, every).labels)
    known = of_tokens != IGNORED
    # A causal LM's last token predicts nothing.
    places = torch.nn.functional.pad(known, (0, mask.shape[1] - known.shape[1]))
    losses, tokens = [], []
    for logits, truth in zip(logits_in_chunks(model, batch, places), of_tokens[known].split(CHUNK), strict=True):
        refuse_not_finite_outputs(logits, None, name)
        losses.append(torch.nn.functional.cross_entropy(logits.float(), truth, reduction="none"))
        tokens.append(logits.argmax(-1))
    counts = known.sum(1).tolist()
    of_rows = (torch.cat(each).cpu().split(counts) for each in (losses, tokens, [of_tokens[known]]))
    return [
        {"loss": float(loss.double().sum()), "right": int((found == truth).sum()), "tokens": found.tolist()}
        for loss, found, truth in zip(*of_rows, strict=True)
    ]


def language_predictions(
    task: Task, rows: datasets.Dataset, found: list[dict[str, Any]], split: datasets.Dataset
) -> list[dict[str, Any]]:
    """Keep the losses and tokens of each window as the kind's `read` gave them.

    Args:
        task: of these rows; it changes nothing here.
        rows: the split's windows; they change nothing here.
        found: for each window {"loss": nats, "right": tokens, "tokens": ids that were predicted}.
        split: it changes nothing here.
    """
    return found


def language_while_training(
    targets: Targets,
) -> Callable[[Task, datasets.Dataset, datasets.Dataset], ScoringArguments]:
    """Make a kind's `while_training` that keeps three numbers of every token, as all logits don't fit into memory."""

    def scoring(task: Task, rows: datasets.Dataset, split: datasets.Dataset) -> ScoringArguments:
        return {
            "preprocess_logits_for_metrics": lambda logits, labels: _of_tokens(targets, logits, labels),
            "compute_metrics": lambda output: _scores(np.maximum(output.predictions, 0).sum(1)),
        }

    return scoring


def language_scores(task: Task, predictions: Sequence[dict], labels: Sequence, logits: None = None) -> dict[str, float]:
    """Compute perplexity, and the share of tokens predicted right.

    Args:
        task: of these rows; it changes nothing here.
        predictions: as in `Evaluation`, one a window.
        labels: none; the tokens themselves are what is predicted.
        logits: none are kept.
    """
    return _scores(_token_losses(predictions))


def language_scorer(task: Task, predictions: Sequence[dict], labels: Sequence) -> Scorer:
    """Make a function of row weights that gives the perplexity of the windows.

    Args:
        task: of these rows; it changes nothing here.
        predictions: as in `Evaluation`, one a window.
        labels: none; the tokens themselves are what is predicted.
    """
    return _perplexity(_token_losses(predictions))


def token_agreement(predictions: Sequence[dict], baseline: Sequence[dict]) -> float:
    """Compute the share of tokens that two models predict alike.

    Args:
        predictions: as in `Evaluation`, one a window, of one model.
        baseline: of the other.
    """
    first, second = ([each["tokens"] for each in found] for found in (predictions, baseline))
    return tag_agreement(first, second)


def _scores(losses: np.ndarray) -> dict[str, float]:
    """Perplexity and accuracy.

    Args:
        losses: N×3, for each row the summed negative log-likelihood (nats), the tokens predicted right, and all.
    """
    _, right, tokens = losses.T
    of_all = {"perplexity": _perplexity(losses), "accuracy": scorers.ratio(right, tokens)}
    return {name: scorers.whole(each, len(losses)) for name, each in of_all.items()}


def _token_losses(predictions: Sequence[dict]) -> np.ndarray:
    """N×3 of a language model's predictions: nats, tokens that were right, tokens."""
    return np.array([[each["loss"], each["right"], len(each["tokens"])] for each in predictions], dtype=np.float64)


def _perplexity(losses: np.ndarray) -> Scorer:
    loss_of_token = scorers.ratio(losses[:, 0], losses[:, 2])
    return lambda weights: np.exp(loss_of_token(weights))


def _of_tokens(targets: Targets, logits: Tensor, labels: Tensor) -> Tensor:
    """B×T×3 of logits B×T×V: each token's negative log-likelihood (nats), whether it was predicted right, and whether
    it counts; a causal LM predicts a token from the one before it, and not the first."""
    logits = targets.aligned(logits)
    labels = labels[:, labels.shape[1] - logits.shape[1] :]
    loss = torch.nn.functional.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
    known = labels != IGNORED
    return torch.stack([loss, (logits.argmax(-1) == labels) & known, known], dim=-1)


def _no_label(task: Task, text: Any) -> None:
    return None


_READ_MASK = """for row, of_tokens in zip(rows, logits):
    best = of_tokens[row.tokens.index("$mask")].argsort()[::-1][:5]
    print([tokenizer.id_to_token(int(number)) for number in best])"""

MASKED_LM = Kind(
    columns=("text",),
    pairs=False,
    reads="text",
    grouped_by=slice(None),
    label="",
    labels=LabelRule(named=False, sets=False, tags=False, scores=False, unknown=_no_label, complete=labels_as_read),
    unlabelled=False,
    stored_predictions=False,
    encode=encode_masked,
    needs_offsets=True,
    strides=False,
    metrics=("perplexity", "accuracy"),
    primary_metric="perplexity",
    further_metrics=(),
    targets=MASKED_WORDS,
    predict=most_likely,
    read=partial(_read, MASKED_WORDS),
    predictions=language_predictions,
    scores=language_scores,
    while_training=language_while_training(MASKED_WORDS),
    scorer=language_scorer,
    agreement=token_agreement,
    row_metric=None,  # its rows are windows of many tokens each
    classes=no_classes,
    outcomes=None,
    in_words=as_predicted,
    prediction=PredictionRule(
        label=_no_label,
        encode=encode_to_fill,
        read=read_fillings,
        window_columns=(),
        reads_text=False,
        line=fillings_line,
    ),
    names_labels=False,
    auto_class="AutoModelForMaskedLM",
    architectures=("ForMaskedLM",),
    peft_task=None,
    heads=None,
    pipeline_tag="fill-mask",
    usage=pipeline_usage("fill-mask", 'f"The cast was {predict.tokenizer.mask_token}."'),
    engine_usage=EngineUsage('["The cast was $mask."]', _READ_MASK),
)

CAUSAL_LM = replace(
    MASKED_LM,
    encode=encode_causal,
    targets=NEXT_WORDS,
    read=partial(_read, NEXT_WORDS),
    while_training=language_while_training(NEXT_WORDS),
    prediction=replace(
        MASKED_LM.prediction, encode=encode_numbered, read=partial(_read, NEXT_WORDS), line=perplexity_line
    ),
    auto_class="AutoModelForCausalLM",
    architectures=("ForCausalLM", "LMHeadModel"),  # GPT-2's
    peft_task="CAUSAL_LM",
    pipeline_tag="text-generation",
    usage=pipeline_usage("text-generation", '"The plot", max_new_tokens=20'),
    engine_usage=None,
)
