"""Token classification from files to pipeline, on tiny models."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    pipeline,
)

from distill.cli import main
from distill.data.load import DataOptions, load_data, tokenize
from distill.errors import InputError
from distill.evaluation.evaluate import evaluate_model, metrics_while_training
from distill.evaluation.intervals import paired_difference
from distill.models.load import load_processor
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.report import write_report
from distill.runs.run import run_plan
from distill.tasks.entities import entity_counts, scores
from distill.tasks.token_classification import tag_scores, words_of
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
        # as seqeval 1.2.2 reads them: IOB1, IOBES, an I after an E, letters alone, letters behind, and BILOU (strict)
        (["I-a", "I-a", "B-a", "O", "I-b"], {("a", 0, 2), ("a", 2, 3), ("b", 4, 5)}),
        (["B-a", "I-a", "E-a", "S-a", "S-b"], {("a", 0, 3), ("a", 3, 4), ("b", 4, 5)}),
        (["E-a", "I-a", "B-b", "E-b"], {("a", 0, 1), ("a", 1, 2), ("b", 2, 4)}),
        (["B", "I", "O", "I", "B", "B"], {("_", 0, 2), ("_", 3, 4), ("_", 4, 5), ("_", 5, 6)}),
        (["a-B", "a-I", "b-I", "O", "a-S"], {("a", 0, 2), ("b", 2, 3), ("a", 4, 5)}),
        (["U-a", "U-a", "B-b", "I-b", "L-b", "O"], {("a", 0, 1), ("a", 1, 2), ("b", 2, 5)}),
        (["E-MAIL-B", "E-MAIL-I", "O"], {("E-MAIL", 0, 2)}),
        ([], set()),
    ],
)
def test_entities_are_found_as_by_the_conll_script(tags, found):
    names = sorted({*tags, "O"})
    row = [names.index(tag) for tag in tags]
    outside = names.index("O")
    assert entity_counts([row], [row], names).tolist() == [[len(found)] * 3]
    for kind, begin, end in found:  # its words alone, before O, are that one entity
        alone = [tag if begin <= place < end else outside for place, tag in enumerate(row)]
        assert entity_counts([alone], [row], names).tolist() == [[1, 1, len(found)]], kind


def test_f1_of_entities_by_hand():
    truth = [[1, 2, 0, 3], [0, 0, 1]]
    predicted = [[1, 2, 0, 0], [0, 3, 1]]  # two of three are found, one is none; the second row is right but for it
    counts = entity_counts(predicted, truth, NAMES)
    assert counts.tolist() == [[1, 1, 2], [1, 2, 1]]
    assert scores(counts) == pytest.approx({"entity_f1": 2 / 3, "entity_precision": 2 / 3, "entity_recall": 2 / 3})
    assert scores(entity_counts([[0]], [[0]], NAMES))["entity_f1"] == 0


def test_f1_of_iobes_is_seqevals():
    names = ["O", "B-a", "I-a", "B-b", "I-b", "S-a"]
    truth = [[1, 2, 0, 3, 0], [3, 4, 1], [0, 0, 5]]
    predicted = [[1, 2, 0, 1, 0], [3, 4, 2], [0, 4, 5]]
    found = scores(entity_counts(predicted, truth, names))
    assert found == pytest.approx({"entity_f1": 8 / 11, "entity_precision": 4 / 6, "entity_recall": 4 / 5})


class WordsForTokenClassification(torch.nn.Module):
    """Says of each token that it begins praise if it is a good word, else that it is none."""

    def __init__(self, tokenizer):
        super().__init__()
        self.praise = torch.tensor(tokenizer.convert_tokens_to_ids(GOOD))
        self.device, self.dtype, self.config = torch.device("cpu"), torch.float32, SimpleNamespace(num_labels=5)

    def forward(self, input_ids, attention_mask):
        return {"logits": torch.nn.functional.one_hot(torch.isin(input_ids, self.praise).long(), 5).float()}


@pytest.mark.parametrize("side", ["right", "left"])
def test_words_that_the_model_does_not_read_count_alike_everywhere(tmp_path, side):
    """Entities beyond max_length are missed, and so are words that become no token, wherever they stand."""
    rows = [
        {"tokens": ["good", "film", "the", "plot", "was", "good"], "label": ["B-praise", *["O"] * 4, "B-praise"]},
        {"tokens": ["the", "\u200b", "", "good"], "label": ["O", "B-praise", "O", "B-praise"]},
        {"tokens": ["nice", "cast"], "label": ["O", "B-blame"]},
    ]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "validation.jsonl", rows)
    data = load(tmp_path, max_length=6, label_names=NAMES)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.padding_side = side
    model = WordsForTokenClassification(tokenizer)
    found = evaluate_model(model, tokenizer, data)
    assert found.predictions == [[1, 0, 0, 0, -100, -100], [0, -100, -100, 1], [1, 0]]
    # found: good, good, nice, of which two are there; there: five. Right are 4 of 6 words, 2 of 4, and none of 2.
    expected = {"entity_f1": 2 * 2 / (3 + 5), "entity_precision": 2 / 3, "entity_recall": 2 / 5, "accuracy": 6 / 12}
    assert found.metrics == pytest.approx(expected)
    assert found.interval[0] <= found.metrics["entity_f1"] <= found.interval[1]
    labels = data.labels("validation")
    difference, _ = paired_difference(data.task, found.predictions, [[0] * len(row) for row in labels], labels)
    assert difference == pytest.approx(expected["entity_f1"])
    assert found.truncated == {"validation": {"rows": 3, "cut": 1}}

    read = data.tokenized("validation", tokenizer)
    batch = DataCollatorForTokenClassification(tokenizer)(
        [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in read]
    )
    scoring = metrics_while_training(data, read)
    logits = model(batch["input_ids"], batch["attention_mask"])["logits"]
    tags = scoring["preprocess_logits_for_metrics"](logits, batch["labels"]).numpy()
    assert scoring["compute_metrics"](EvalPrediction(tags, batch["labels"].numpy())) == pytest.approx(expected)


def byte_level(splits_first=False):
    """A byte-level BPE that knows the words of a text, with the space before them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(["a film was good and a cast was good"] * 9, trainer)
    if splits_first:  # as Llama 3 and Qwen
        split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\s+"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return backend


@pytest.mark.parametrize("made", ["roberta", "gpt2", "generic", "splitting"])
def test_byte_level_tokenizers_read_words_as_in_a_text(tmp_path, made):
    if made in ("roberta", "gpt2"):
        parts = json.loads(byte_level().to_str())["model"]
        of_class = {"roberta": RobertaTokenizer, "gpt2": GPT2Tokenizer}[made]
        tokenizer = of_class(vocab=parts["vocab"], merges=[tuple(pair) for pair in parts["merges"]])
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(made == "splitting"), pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = load_processor(str(tmp_path / "tokenizer"), "token-classification", 24)
    words = found(["film", "was"], is_split_into_words=True, add_special_tokens=False).tokens()
    assert words == ["Ġfilm", "Ġwas"]
    assert (found.model_max_length, found.pad_token is not None) == (24, True)
    found.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again("film was", add_special_tokens=False).tokens() == words
    untouched = load_processor(str(tmp_path / "tokenizer"), "classification")
    assert untouched("film was", add_special_tokens=False).tokens()[0] != "Ġfilm"


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


@pytest.mark.parametrize("column", ["teacher_logits", "teacher_probabilities"])
@pytest.mark.parametrize("values", [[0.2] * 5, [[0.2] * 5], "x"], ids=["as many as labels", "one a word", "no list"])
def test_stored_predictions_are_refused(tmp_path, column, values):
    write(tmp_path / "train.jsonl", [{"tokens": ["the"], "label": ["O"], "logits": values}] * 2)
    write(tmp_path / "validation.jsonl", [{"tokens": ["the"], "label": ["O"]}])
    with pytest.raises(InputError) as caught:
        load(tmp_path, label_names=NAMES, **{column: "logits"})
    assert caught.value.problems == (f"data.{column}: not for token-classification; leave it out",)


def test_metrics_ignore_tokens_without_a_label(folder):
    task = load(folder, label_names=NAMES).task
    labels = np.array([[-100, 1, 2, -100], [-100, 0, 3, -100]])
    logits = np.zeros((2, 4, 5))
    logits[0, 1, 1] = logits[0, 2, 2] = logits[1, 1, 0] = logits[1, 2, 0] = 1.0
    found = tag_scores(task, words_of(logits.argmax(-1), labels), words_of(labels, labels))
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
    report = asdict(write_report(made))
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
