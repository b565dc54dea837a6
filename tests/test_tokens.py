"""Token classification from files to pipeline, on tiny models."""

import json

import numpy as np
import pytest
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from distill.cli import main
from distill.data import DataOptions, load_data, tokenize
from distill.entities import entities_of, entity_counts, scores
from distill.errors import InputError
from distill.metrics import compute_metrics
from distill.pipeline import run_plan
from distill.plan import make_plan
from distill.recipe import load_recipe
from distill.report import write_report
from tests.conftest import BAD, GOOD, OTHER, make_tokenizer

NAMES = ["O", "B-praise", "I-praise", "B-blame", "I-blame"]


def tagged(count, seed=0):
    """Praise and blame are one or two words of their kind in a row."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        tokens, tags = [], []
        for _ in range(3):
            words = generator.choice(OTHER, 2)
            tokens += words.tolist()
            tags += ["O"] * 2
            kind, vocabulary = ("praise", GOOD) if generator.random() < 0.5 else ("blame", BAD)
            length = int(generator.integers(1, 3))
            tokens += generator.choice(vocabulary, length).tolist()
            tags += [f"B-{kind}", f"I-{kind}"][:length]
        rows.append({"tokens": tokens, "label": tags})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.jsonl", tagged(96))
    write(tmp_path / "validation.jsonl", tagged(40, seed=1))
    return tmp_path


def load(folder, **options):
    return load_data(None, DataOptions(**{"kind": "token-classification", "path": str(folder), **options}))


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        (["B-a", "I-a", "O", "B-b"], {("a", 0, 2), ("b", 3, 4)}),
        (["I-a", "I-a", "I-b"], {("a", 0, 2), ("b", 2, 3)}),
        (["B-a", "B-a"], {("a", 0, 1), ("a", 1, 2)}),
        (["O", "O"], set()),
        (["B-a", "I-b", "I-b"], {("a", 0, 1), ("b", 1, 3)}),
        (["PER", "PER", "O", "LOC"], {("PER", 0, 2), ("LOC", 3, 4)}),
        ([], set()),
    ],
)
def test_entities_are_found_as_by_the_conll_script(tags, found):
    assert entities_of(tags) == found


def test_f1_of_entities_by_hand():
    truth = [[1, 2, 0, 3], [0, 0, 1]]
    predicted = [[1, 2, 0, 0], [0, 3, 1]]  # two of three are found, one is none; the second row is right but for it
    counts = entity_counts(predicted, truth, NAMES)
    assert counts.tolist() == [[1, 1, 2], [1, 2, 1]]
    assert scores(counts) == pytest.approx({"entity_f1": 2 / 3, "entity_precision": 2 / 3, "entity_recall": 2 / 3})
    assert scores(entity_counts([[0]], [[0]], NAMES))["entity_f1"] == 0


def test_labels_stand_on_the_first_token_of_each_word(folder):
    data = load(folder, label_names=NAMES)
    assert data.task.label_names == tuple(NAMES)
    tokenizer = make_tokenizer()
    rows = data.tokenized("train", tokenizer)
    words, tags = data.splits["train"][0]["tokens"], data.splits["train"][0]["label"]
    assert rows[0]["labels"] == [-100, *tags, -100]
    assert rows[0]["input_ids"][1:-1] == tokenizer.convert_tokens_to_ids(words)
    short = tokenize(data.splits["train"], data.task, tokenizer, 5)
    assert short[0]["labels"] == [-100, *tags[:3], -100]


def test_a_word_of_two_tokens_has_one_label(folder):
    data = load(folder)
    tokenizer = make_tokenizer()
    rows = data.splits["train"].select([0]).map(lambda row: {"tokens": ["good-film", *row["tokens"][1:]]})
    labels = tokenize(rows, data.task, tokenizer, 32)[0]["labels"]
    assert labels[1] >= 0
    assert labels[2:4] == [-100, -100]  # the hyphen, and the rest of the word


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"tokens": "the film", "label": ["O", "O"]}, {}, "holds no lists of words"),
        ({"tokens": ["the", "film"], "label": ["O"]}, {}, "has 1 labels in row 0, which has 2 words"),
        ({"tokens": ["the"], "label": ["X"]}, {"label_names": NAMES}, "holds 'X', which is none of the labels"),
        ({"tokens": [], "label": []}, {"label_names": NAMES}, "has no words in 1 rows"),
    ],
)
def test_wrong_rows_are_told(tmp_path, row, options, message):
    write(tmp_path / "train.jsonl", [row, {"tokens": ["a"], "label": ["O"]}][: 1 + (not row["tokens"])])
    write(tmp_path / "validation.jsonl", [{"tokens": ["the"], "label": ["O"]}])
    with pytest.raises(InputError, match=message):
        load(tmp_path, **options)


def test_metrics_ignore_tokens_without_a_label(folder):
    task = load(folder, label_names=NAMES).task
    labels = np.array([[-100, 1, 2, -100], [-100, 0, 3, -100]])
    logits = np.zeros((2, 4, 5))
    logits[0, 1, 1] = logits[0, 2, 2] = logits[1, 1, 0] = logits[1, 2, 0] = 1.0
    found = compute_metrics(task, logits, labels)
    assert found == pytest.approx({"entity_f1": 2 / 3, "entity_precision": 1.0, "entity_recall": 0.5, "accuracy": 0.75})


def test_a_whole_run(folder, pretrained, capsys):
    path = folder / "tags.yaml"
    path.write_text(f"""
output_dir: {folder / "run"}
data: {{kind: token-classification, path: {folder}, label_names: {json.dumps(NAMES)}, max_length: 24}}
benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 2}}
steps:
  teacher: {{run: finetune, model: {pretrained}, max_steps: 150, learning_rate: 2e-3, per_device_train_batch_size: 16}}
  student: {{run: distill, teacher: teacher, num_layers: 2, max_steps: 120, learning_rate: 1e-3}}
  small: {{run: distill, teacher: teacher, student_arch: distilbert, num_layers: 2, max_steps: 4, hard_weight: 1.0}}
  student-int8: {{run: quantize, model: student, format: int8}}
""")
    made = make_plan(load_recipe(path))
    run_plan(made)
    report = write_report(made)
    by_name = {model["name"]: model for model in report["models"]}
    assert report["metric"] == "entity_f1"
    assert by_name["teacher"]["metrics"]["entity_f1"] > 0.9
    assert by_name["student"]["retention"] > 0.9
    assert by_name["student"]["agreement"] > 0.9
    low, high = by_name["student"]["interval"]
    assert low <= by_name["student"]["metrics"]["entity_f1"] <= high
    student = AutoModelForTokenClassification.from_pretrained(made.steps["student"].folder)
    assert list(student.config.id2label.values()) == NAMES
    tag = pipeline("token-classification", str(made.steps["small"].folder))
    assert {found["entity"] for found in tag("the film was good")} <= set(NAMES)
    assert AutoTokenizer.from_pretrained(made.steps["student"].folder).model_max_length == 24

    # Rows of ids, whose names only the model knows.
    ids = [{**row, "label": [NAMES.index(tag) for tag in row["label"]]} for row in tagged(40, seed=1)]
    write(folder / "ids.jsonl", ids)
    capsys.readouterr()
    command = ["eval", str(made.steps["student"].folder), "--data.kind", "token-classification"]
    assert main([*command, "--data.path", str(folder / "ids.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["metrics"] == pytest.approx(by_name["student"]["metrics"])
