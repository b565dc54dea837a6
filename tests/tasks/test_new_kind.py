"""A new kind of task is one module and one line: counting (Poisson regression), from files to a card."""

import json
from collections.abc import Sequence
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction, PretrainedConfig

from distill.cli import main
from distill.data.load import DataOptions, load_data
from distill.errors import InputError
from distill.tasks import scorers
from distill.tasks.base import ScoringArguments, Task
from distill.tasks.classification import REGRESSION, SCORES
from distill.tasks.kinds import KINDS, targets_of
from distill.tasks.rows import row_predictions
from distill.tasks.scorers import Scorer
from tests.conftest import GOOD, OTHER, tiny_bert, write_rows

# --- the module -------------------------------------------------------------------------------------------------------


def of_counts(config: PretrainedConfig) -> bool:
    return config.problem_type == "counts"


def poisson_loss(
    student_logits: Tensor, labels: Tensor, label_smoothing: float, count: Tensor, *, class_weights: Tensor | None
) -> Tensor:
    """exp(z) − y·z of logarithms z of rates and counts y, without the part that no model changes."""
    known = ~labels.isnan()
    each = F.poisson_nll_loss(student_logits.float().squeeze(-1), labels.masked_fill(~known, 0.0), reduction="none")
    return each.masked_fill(~known, 0.0).sum() / count


def kl_of_rates(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL of Poisson distributions: λ·log(λ/μ) − λ + μ."""
    first, second = (np.asarray(each, dtype=np.float64).reshape(len(each)) for each in (reference, logits))
    return np.exp(first) * (first - second) - np.exp(first) + np.exp(second)


def likelihood_of_drawn_counts(logits: Tensor, generator: torch.Generator) -> Tensor:
    rates = logits.float().exp()
    return (torch.poisson(rates.detach(), generator=generator) * logits.float() - rates).sum()


def rates(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits.reshape(-1))


def whole_numbers(rows: datasets.Dataset, task: Task, labels: Sequence | None) -> tuple[Sequence | None, str | None]:
    wrong = [row for row, value in enumerate(labels or ()) if value < 0 or value != int(value)]
    return labels, f"holds {labels[wrong[0]]} in row {wrong[0]}; counts are whole" if labels and wrong else None


def count_scorer(task: Task, predictions: Sequence, labels: Sequence) -> Scorer:
    return scorers.mean(np.abs(np.asarray(predictions) - np.asarray(labels)))


def count_scores(task: Task, predictions: Sequence, labels: Sequence, logits: np.ndarray) -> dict[str, float]:
    return {"mean_absolute_error": scorers.whole(count_scorer(task, predictions, labels), len(labels))}


def counts_while_training(task: Task, rows: datasets.Dataset, split: datasets.Dataset) -> ScoringArguments:
    def of_counts(output: EvalPrediction) -> dict[str, float]:
        return count_scores(task, rates(output.predictions), output.label_ids, output.predictions)

    return {"compute_metrics": of_counts}


COUNTS = replace(
    SCORES,
    name="counts",
    problem_type="counts",
    fits=of_counts,
    hard_loss=poisson_loss,
    divergences=kl_of_rates,
    drawn_likelihood=likelihood_of_drawn_counts,
)

COUNTING = replace(
    REGRESSION,
    labels=replace(REGRESSION.labels, complete=whole_numbers),
    metrics=("mean_absolute_error",),
    primary_metric="mean_absolute_error",
    targets=COUNTS,
    predict=rates,
    predictions=row_predictions(rates),
    scores=count_scores,
    while_training=counts_while_training,
    scorer=count_scorer,
)


# --- its tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    monkeypatch.setitem(KINDS, "counting", COUNTING)


def praises(count, seed=0):
    """How often a text praises is its label."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = int(generator.integers(0, 6))
        words = [*generator.choice(GOOD, label), *generator.choice(OTHER, 8 - label)]
        rows.append({"text": " ".join(generator.permutation(words)), "label": label})
    return rows


@pytest.fixture
def recipe(tmp_path, pretrained):
    write_rows(tmp_path / "data" / "train.jsonl", praises(128))
    write_rows(tmp_path / "data" / "validation.jsonl", praises(40, seed=1))
    path = tmp_path / "counting.yaml"
    path.write_text(f"""
output_dir: {tmp_path / "run"}
data: {{kind: counting, path: {tmp_path / "data"}, max_length: 16}}
benchmark: {{sequence_length: 12, throughput_batch_size: 2, rounds: 1}}
steps:
  teacher: {{run: finetune, model: {pretrained}, max_steps: 120, learning_rate: 2e-3, load_best_model_at_end: true,
             eval_strategy: steps, eval_steps: 60, save_steps: 60, metric_for_best_model: mean_absolute_error}}
  student: {{run: distill, teacher: teacher, num_layers: 2, max_steps: 80, learning_rate: 1e-3, hard_weight: 0.5}}
  small: {{run: quantize, model: student, format: nf4, gptq: true, block_size: 64}}
""")
    return path


def test_from_check_to_card(recipe, capsys):
    folder = recipe.parent / "run"
    assert main(["check", str(recipe)]) == 0
    assert "task: counting, scored by mean_absolute_error" in " ".join(capsys.readouterr().out.split())
    assert main(["run", str(recipe)]) == 0
    report = json.loads((folder / "report.json").read_text())
    models = {model["name"]: model for model in report["models"]}
    assert report["task"] == "counting"
    errors = {name: model["metrics"]["mean_absolute_error"] for name, model in models.items()}
    assert errors["teacher"] < 0.5  # of 0 to 5
    assert errors["student"] < 0.7
    assert models["student"]["retention"] == pytest.approx(errors["teacher"] / errors["student"])  # less is better
    assert models["student"]["interval"][0] < errors["student"] < models["student"]["interval"][1]
    assert models["small"]["divergence"]["mean"] > 0

    # The numbers of plain transformers.
    model = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    assert targets_of(model) is COUNTS
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows = praises(40, seed=1)
    with torch.inference_mode():
        logits = [model(**tokenizer(row["text"], return_tensors="pt")).logits.item() for row in rows]
    found = np.exp(logits)
    labels = np.array([row["label"] for row in rows])
    assert np.abs(found - labels).mean() == pytest.approx(errors["student"], rel=1e-4)

    capsys.readouterr()
    assert main(["eval", str(folder / "student")]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["metrics"]["mean_absolute_error"] == pytest.approx(errors["student"])
    assert main(["report", str(folder)]) == 0
    card = (folder / "student" / "README.md").read_text()
    assert "mean_absolute_error" in card
    assert "pipeline_tag: text-classification" in card


def test_its_loss_is_torchs_and_its_divergence_is_that_of_the_distributions():
    logits, labels = torch.tensor([[0.5], [1.5], [0.0]]), torch.tensor([2.0, 3.0, float("nan")])
    found = COUNTS.hard_loss(logits, labels, 0.0, torch.tensor(2.0), class_weights=None)
    by_hand = (np.exp(0.5) - 2 * 0.5 + np.exp(1.5) - 3 * 1.5) / 2
    assert found.item() == pytest.approx(by_hand)
    first, second = torch.tensor([1.2]), torch.tensor([0.3])
    counts = torch.arange(60.0)
    masses = [torch.distributions.Poisson(each.exp()).log_prob(counts) for each in (first, second)]
    expected = (masses[0].exp() * (masses[0] - masses[1])).sum().item()
    assert kl_of_rates(first.numpy(), second.numpy()) == pytest.approx([expected], rel=1e-5)


def test_its_rule_for_labels_is_told_with_the_others(tmp_path):
    write_rows(tmp_path / "train.jsonl", [*praises(8), {"text": "a film", "label": 2.5}])
    write_rows(tmp_path / "validation.jsonl", praises(4))
    with pytest.raises(InputError, match=r"data\.label: column 'label' of train holds 2\.5 in row 8; counts are whole"):
        load_data(None, DataOptions(kind="counting", path=str(tmp_path)))


def test_a_model_of_another_kind_is_none_of_it():
    assert targets_of(tiny_bert(num_labels=1)) is SCORES
    with pytest.raises(InputError, match=r"kind: should be 'classification', .* or 'counting'; got 'counts'"):
        load_data(None, DataOptions(kind="counts", path="rows.csv"))
