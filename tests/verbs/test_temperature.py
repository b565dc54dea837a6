"""`calibrate: true`: a temperature fitted on half of the validation rows and folded into the head, labels as before."""

import json

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from scipy.special import expit, log_softmax, softmax
from transformers import AutoModelForSequenceClassification

import distill  # noqa: F401  (registers the quantized formats)
from distill.cli import main
from distill.compression.temperature import fold_temperature
from distill.errors import InputError
from distill.evaluation.fidelity import calibration_error, halves
from distill.tasks.scorers import whole
from tests.conftest import WORDS, make_tokenizer, tiny_bert, write_rows

TOO_SURE = 3.0
NAMES = ["negative", "positive"]


def texts(count):
    generator = np.random.default_rng(0)
    return sorted({" ".join(generator.choice(WORDS, int(generator.integers(3, 14)))) for _ in range(count)})


def logits_of(model, rows):
    inputs = make_tokenizer()(rows, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.double().numpy()


def write_recipe(folder, model, steps, kind="classification"):
    (folder / "recipe.yaml").write_text(
        f"data: {{kind: {kind}, path: {folder / 'data'}, max_length: 24}}\noutput_dir: {folder / 'run'}\n"
        "benchmark: {sequence_length: 16, throughput_batch_size: 2, rounds: 1}\n"
        f"steps:\n{steps.replace('MODEL', str(model))}"
    )
    return str(folder / "recipe.yaml")


@pytest.fixture(scope="module", params=["classification", "multi-label"])
def run(request, tmp_path_factory):
    """A run on labels drawn from a model's own probabilities, of that model made three times too sure."""
    folder, sets = tmp_path_factory.mktemp("temperature"), request.param == "multi-label"
    more = {"problem_type": "multi_label_classification"} if sets else {}
    names = dict(enumerate(NAMES))
    model = tiny_bert(num_hidden_layers=2, id2label=names, label2id={name: key for key, name in names.items()}, **more)
    rows = texts(1600)
    logits = logits_of(model, rows)
    logits = logits - logits.mean(0)
    with torch.no_grad():
        model.classifier.bias -= torch.tensor(logits_of(model, rows).mean(0) - logits.mean(0)).float()
        scale = 1.5 / logits.std()  # neither sure of everything nor of nothing
        model.classifier.weight *= scale
        model.classifier.bias *= scale
    logits = logits_of(model, rows)
    generator = np.random.default_rng(1)
    if sets:
        drawn = generator.random(logits.shape) < expit(logits)
        labels = [[NAMES[place] for place in np.flatnonzero(row)] for row in drawn]
    else:
        labels = [NAMES[generator.choice(2, p=row)] for row in softmax(logits, -1)]
    read = [{"text": text, "label": label} for text, label in zip(rows, labels, strict=True)]
    write_rows(folder / "data" / "train.jsonl", [row for row in read if row["label"]][:40])
    write_rows(folder / "data" / "validation.jsonl", read[40:])
    with torch.no_grad():
        model.classifier.weight *= TOO_SURE
        model.classifier.bias *= TOO_SURE
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    steps = (
        "  plain: {run: quantize, model: MODEL, format: int8, rest_dtype: fp32}\n"
        "  mended: {run: quantize, model: MODEL, format: int8, rest_dtype: fp32, calibrate: true}\n"
    )
    assert main(["run", write_recipe(folder, folder / "model", steps, request.param)]) == 0
    found = {
        name: AutoModelForSequenceClassification.from_pretrained(folder / "run" / name).eval()
        for name in ("plain", "mended")
    }
    truth = [[int(name in label) for name in NAMES] if sets else NAMES.index(label) for label in labels[40:]]
    return folder, {name: logits_of(each, rows[40:]) for name, each in found.items()}, np.array(truth)


def as_outcomes(logits, truth):
    if truth.ndim == 2:
        return np.stack([logits, np.zeros_like(logits)], -1), 1 - truth
    return logits[:, None], truth[:, None]


def negative_log_likelihood(temperature, logits, truth):
    logits, truth = as_outcomes(logits, truth)
    return -np.take_along_axis(log_softmax(logits / temperature, -1), truth[..., None], -1).mean()


def test_the_temperature_is_the_one_that_made_the_model_too_sure(run):
    folder, logits, truth = run
    decided = json.loads((folder / "run" / "mended" / "step.json").read_text())["decided"]
    fitted, _ = halves(len(truth))
    assert decided["temperature_rows"] == len(fitted)
    assert decided["temperature"] == pytest.approx(TOO_SURE, rel=0.2)
    losses = [
        negative_log_likelihood(value, logits["plain"][fitted], truth[fitted])
        for value in (TOO_SURE, decided["temperature"])
    ]
    distributions = len(fitted) * (truth.shape[1] if truth.ndim == 2 else 1)
    assert 0 <= 2 * distributions * (losses[0] - losses[1]) < stats.chi2(1).ppf(0.999)  # likelihood-ratio test
    best = optimize.minimize_scalar(
        lambda value: negative_log_likelihood(value, logits["plain"][fitted], truth[fitted]), bracket=(1, 2, 9)
    )
    assert decided["temperature"] == pytest.approx(best.x, rel=1e-3)
    assert np.allclose(logits["mended"], logits["plain"] / decided["temperature"], rtol=1e-4, atol=1e-4)


def test_no_label_changes_and_probabilities_of_other_rows_are_better(run):
    folder, logits, truth = run
    _, judged = halves(len(truth))
    if truth.ndim == 2:
        assert np.array_equal(logits["plain"] > 0, logits["mended"] > 0)
    else:
        assert np.array_equal(logits["plain"].argmax(-1), logits["mended"].argmax(-1))
    errors = {
        name: whole(calibration_error(*as_outcomes(each[judged], truth[judged])), len(judged))
        for name, each in logits.items()
    }
    assert errors["mended"] < 0.6 * errors["plain"]
    report = json.loads((folder / "run" / "report.json").read_text())
    models = {model["name"]: model for model in report["models"]}
    for name, error in errors.items():
        assert models[name]["calibration"]["ece"] == pytest.approx(error, abs=2e-3)
        assert models[name]["calibration"]["rows"] == len(judged)
    assert models["plain"]["metrics"] == pytest.approx(models["mended"]["metrics"])
    assert f"of the {len(judged)} rows that no model's temperature" in (folder / "run" / "report.md").read_text()
    assert "by a temperature of" in (folder / "run" / "mended" / "README.md").read_text()


def test_a_second_run_makes_nothing_and_other_validation_rows_make_it_anew(run, capsys):
    folder, _, _ = run
    recipe = str(folder / "recipe.yaml")
    assert main(["run", recipe, "--only", "plain", "mended"]) == 0
    assert capsys.readouterr().err.count("finished already") == 2
    assert main(["check", recipe, "--data.max_eval_rows", "400"]) == 0
    said = capsys.readouterr().out
    assert "a temperature, fitted on half of the validation rows" in said
    assert said.count("finished already") == 1


def test_the_option_leaves_the_fingerprints_of_other_steps_alone(tmp_path, pretrained):
    from distill.verbs.quantize import QUANTIZE, QuantizeOptions

    class Rows:
        train_fingerprint, fingerprint, max_length = "train", "all", 24

        class task:
            label_names = NAMES

    plain = QuantizeOptions(model="m", format="nf4")
    assert QUANTIZE.rows(plain, Rows) == [NAMES, 24]
    assert QUANTIZE.splits(plain, ["train", "validation"]) == set()
    mended = QuantizeOptions(model="m", format="nf4", rest_dtype="fp32", calibrate=True)
    assert QUANTIZE.rows(mended, Rows) == [NAMES, 24, "all"]
    assert QUANTIZE.splits(mended, ["train", "validation_matched", "test"]) == {"validation", "validation_matched"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("classification", "format: nf4", "say rest_dtype: fp32"),
        ("classification", "format: bf16, rest_dtype: fp32", "leave one out"),
        ("classification", "format: nf4, rest_dtype: fp32", "half of the validation rows (10) are too few"),
        ("regression", "format: nf4, rest_dtype: fp32", "regression has no probabilities"),
    ],
)
def test_what_cannot_be_calibrated_is_told_before_anything_runs(tmp_path, capsys, kind, options, message):
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts(40))]
    write_rows(tmp_path / "data" / "train.jsonl", rows[20:])
    write_rows(tmp_path / "data" / "validation.jsonl", rows[:20])
    of_scores = kind == "regression"
    labels = {"num_labels": 1} if of_scores else {"id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1}}
    tiny_bert(**labels, problem_type="regression" if of_scores else None).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    step = f"  small: {{run: quantize, model: MODEL, {options}, calibrate: true}}\n"
    assert main(["check", write_recipe(tmp_path, tmp_path / "model", step, kind)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "steps.small" in said


def test_a_head_that_is_no_float_layer_is_refused(bert):
    with pytest.raises(InputError, match="no plain output layer in float32"):
        fold_temperature(bert.to(torch.bfloat16), 2.0)


def test_logits_are_divided(bert):
    rows = texts(9)
    before = logits_of(bert, rows)
    assert np.allclose(logits_of(fold_temperature(bert, 2.5), rows), before / 2.5, rtol=1e-5, atol=1e-6)
