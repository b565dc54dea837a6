"""What a model predicts, by its kind: for rows, tokens or spans; the labels, and which predictions count."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.errors import InputError

ProblemType = Literal[
    "regression",
    "single_label_classification",
    "multi_label_classification",
    "token_classification",
    "question_answering",
    "masked_lm",
    "causal_lm",
]

OF_ROWS = ("regression", "single_label_classification", "multi_label_classification")
"""Kinds with one prediction a row."""

OF_TOKENS = ("token_classification", "masked_lm", "causal_lm")
"""Kinds with one a token, whose labels are padded as the tokens are."""

SPAN_LABELS = ("start_positions", "end_positions")
IGNORED = -100
CHUNK = 256
"""Tokens whose logits are held at once: 155 MB for a vocabulary of 151,000."""

_NO_LOGIT = -1e4

_KINDS = {
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",  # GPT-2
}
_OF_ROWS = ("ForSequenceClassification", "ForImageClassification")


def problem_type(model: PreTrainedModel) -> ProblemType:
    """What a model's outputs mean, by its class and config.

    Raises:
        InputError: another class, or a regression with several outputs.
    """
    name, config = type(plain_model(model)).__name__, model.config
    for ending, kind in _KINDS.items():
        if name.endswith(ending):
            return kind  # type: ignore[return-value]
    if not name.endswith(_OF_ROWS):
        endings = ", ".join(f"…{ending}" for ending in (*_OF_ROWS, *_KINDS))
        raise InputError(f"{name}: not a class that can be distilled; these can: {endings}")
    if config.problem_type == "regression" and config.num_labels > 1:
        raise InputError(f"{name}: a regression with {config.num_labels} outputs; one is supported")
    if config.num_labels == 1 and config.problem_type != "multi_label_classification":
        return "regression"
    return config.problem_type or "single_label_classification"


def plain_model(model: Any) -> PreTrainedModel:
    """The transformers model inside of PEFT's wrapper; any other as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def label_columns(problem: ProblemType) -> list[str]:
    """The columns of a batch that hold its labels."""
    return list(SPAN_LABELS) if problem == "question_answering" else ["labels"]


def logits_of(outputs: Any) -> Tensor:
    """B×C, B×T×C, or for spans B×2×T: the logits of their starts and of their ends."""
    if "start_logits" in outputs:
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)
    return outputs["logits"]


def all_finite(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Whether every logit is a finite number, those of padding aside: one boolean, on their device.

    Args:
        logits: as `logits_of` gives them.
        attention_mask: B×T, of models that read tokens.
    """
    sums = logits.float().sum(-1) if logits.ndim < 3 or logits.shape[1] != 2 else logits.float()
    if attention_mask is not None and sums.ndim > 1:  # attention may give padding anything
        valid = attention_mask.to(sums.device).bool()
        if sums.ndim == 3 and sums.shape[::2] == valid.shape:
            sums = sums.masked_fill(~valid.unsqueeze(1), 0)
        elif sums.shape == valid.shape:
            sums = sums.masked_fill(~valid, 0)
    return sums.isfinite().all()


def refuse_not_finite_outputs(logits: Tensor, attention_mask: Tensor | None, name: str) -> None:
    """Raise an `InputError` where a model predicts NaN or infinite values.

    Args:
        name: of the model.
    """
    if not all_finite(logits, attention_mask):
        raise InputError(
            f"{name}: its predictions are NaN or infinite, so there is nothing to score; its weights are broken, or "
            "its dtype overflows (load it in float32 or bfloat16)"
        )


def finite_logits(model: PreTrainedModel, batch: Mapping[str, Tensor], name: str) -> Tensor:
    """A model's logits of a batch, in float32 in main memory, as `logits_of` gives them.

    Args:
        name: of the model.

    Raises:
        InputError: they are NaN or infinite.
    """
    logits = logits_of(model(**batch)).float().cpu()
    refuse_not_finite_outputs(logits, batch.get("attention_mask"), name)
    return logits


@dataclass(frozen=True)
class Labels:
    """Of a batch: the labels of its predictions, and which predictions count where a teacher is compared."""

    labels: Tensor | None
    """…, or …×C for sets of labels; unknown ones are −100 or NaN. None where the batch has no such column."""
    counted: Tensor
    """… booleans."""
    classes: Tensor | None = None
    """For spans B×1×T: the tokens that can be an end, padding aside."""

    def beside(self, logits: Tensor) -> "Labels":
        """These, or in one row those that count, where the logits are of them alone (see `predicting_alone`)."""
        if logits.shape[:-1] == self.counted.shape:
            return self
        labels = None if self.labels is None else self.labels[self.counted].unsqueeze(0)
        return Labels(labels, self.counted.new_ones(1, int(self.counted.sum())))


def labels_of(problem: ProblemType, batch: Mapping[str, Tensor], counted_rows: Tensor) -> Labels:
    """The labels that stand against `shifted(problem, logits)`.

    A token counts where it has a label; in a row without any, where it is no padding. A causal LM's token is predicted
    from the one before it.

    Args:
        counted_rows: B booleans.
    """
    if problem in OF_ROWS:
        labels = batch.get("labels")
        if labels is not None:
            unknown = float("nan") if labels.is_floating_point() else IGNORED
            labels = labels.masked_fill(~counted_rows.reshape(-1, *(1,) * (labels.ndim - 1)), unknown)
        return Labels(labels, counted_rows)
    tokens = batch["attention_mask"].bool() & counted_rows.unsqueeze(-1)
    if problem == "question_answering":
        both = counted_rows.unsqueeze(-1).expand(-1, 2)
        if not set(SPAN_LABELS) <= batch.keys():
            return Labels(None, both, batch["attention_mask"].bool().unsqueeze(1))
        ends = torch.stack([batch[name] for name in SPAN_LABELS], dim=1)
        known = both & (ends >= 0) & (ends < tokens.shape[1])
        return Labels(ends.masked_fill(~known, IGNORED), both, batch["attention_mask"].bool().unsqueeze(1))
    labels = batch.get("labels")
    if labels is not None:
        labels = labels.masked_fill(~tokens, IGNORED)
    if problem == "causal_lm":
        tokens = tokens[:, 1:] & tokens[:, :-1]
        labels = labels[:, 1:].masked_fill(~tokens, IGNORED) if labels is not None else None
    if labels is None:
        return Labels(None, tokens)
    known = labels != IGNORED
    return Labels(labels, torch.where(known.any(-1, keepdim=True), known, tokens))


@contextmanager
def predicting_alone(model: PreTrainedModel, counted: Tensor | None) -> Iterator[None]:
    """Let a masked LM predict the tokens that count alone: its logits are then 1×N×V.

    The head of a small model is most of its work: 30,000 outputs for each token, and of seven tokens one is masked.

    Args:
        counted: B×T booleans with N true; None for all tokens.
    """
    if counted is None:
        yield
        return

    def select(encoder: nn.Module, arguments: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[counted].unsqueeze(0)
        return output

    hook = plain_model(model).base_model.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


def logits_in_chunks(model: PreTrainedModel, inputs: Mapping[str, Tensor], counted: Tensor) -> Iterator[Tensor]:
    """A language model's logits N×V of the tokens that count, `CHUNK` of them at a time.

    What is before the head runs once, the head for each chunk: B×T×V logits of 64 rows of 128 tokens would be 5 GB for
    a vocabulary of 151,000.

    Args:
        inputs: that the model takes.
        counted: B×T booleans with N true.
    """
    encoder = plain_model(model).base_model
    whole, own = encoder.forward, encoder.__dict__.get("forward")
    known: list[Any] = []
    states: list[Tensor] = []

    def forward(*arguments: Any, **options: Any) -> Any:
        if not known:
            known.append(whole(*arguments, **options))
            states.extend(known[0].last_hidden_state[counted].split(CHUNK))
        known[0].last_hidden_state = states.pop(0).unsqueeze(0)
        return known[0]

    encoder.forward = forward
    try:
        while not known or states:
            yield logits_of(model(**inputs))[0]
    finally:
        if own is None:
            del encoder.forward
        else:
            encoder.forward = own


def shifted(problem: ProblemType, logits: Tensor) -> Tensor:
    """A causal LM's logits without those of the last token, which predict what is not there."""
    return logits[:, :-1] if problem == "causal_lm" else logits


def counted_logits(problem: ProblemType, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """The logits N×C of a batch's predictions that count: of its rows, of its tokens, of its spans' two ends.

    Args:
        batch: a model's inputs, without labels.
        logits: as `logits_of` gives them.
    """
    logits = shifted(problem, logits)
    labels = labels_of(problem, batch, torch.ones(len(logits), dtype=torch.bool, device=logits.device))
    return among(labels.classes, logits, as_values=False)[labels.counted]


def among(classes: Tensor | None, logits: Tensor, *, as_values: bool) -> Tensor:
    """Logits whose classes that don't exist (padding, for spans) take no part.

    Args:
        classes: booleans of the classes that do; None for all.
        as_values: for a squared error, averaged over the classes that exist; else for a softmax.
    """
    if classes is None:
        return logits
    if not as_values:
        return logits.float().masked_fill(~classes, _NO_LOGIT)
    existing = classes.sum(-1, keepdim=True).clamp(min=1)
    return logits.float().masked_fill(~classes, 0.0) * (logits.shape[-1] / existing).sqrt()
