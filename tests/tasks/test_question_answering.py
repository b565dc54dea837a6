"""Extractive question answering: windows, answers and scores by hand, and a whole run."""

import json
import re
import string
from dataclasses import asdict

import numpy as np
import pytest
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from distill.data.load import DataOptions, load_data
from distill.errors import InputError
from distill.evaluation.intervals import score_interval
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.report import write_report
from distill.runs.run import run_plan
from distill.tasks.question_answering import answer_scores, answers_of, normalised, span_scores
from tests.conftest import GOOD, OTHER, make_tokenizer, write_rows


def asked(count, seed=0):
    """The answer is the one word of praise in the context."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = generator.choice(OTHER, int(generator.integers(4, 9))).tolist()
        answer = str(generator.choice(GOOD))
        words.insert(int(generator.integers(len(words))), answer)
        context = " ".join(words)
        start = len(" ".join(words[: words.index(answer)]) + " ") * bool(words.index(answer))
        rows.append(
            {"question": "was the film", "context": context, "answers": {"text": [answer], "answer_start": [start]}}
        )
    return rows


def load(folder, rows, **options):
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "validation.jsonl", rows[:4])
    return load_data(None, DataOptions(kind="question-answering", path=str(folder), **options))


def test_the_answer_is_found_in_the_windows_that_hold_it(tmp_path):
    words = ["a"] * 10 + ["good", "film"] + ["the"] * 6
    context = " ".join(words)
    row = {"question": "was the film", "context": context, "answers": {"text": ["good film"], "answer_start": [20]}}
    data = load(tmp_path, [row] * 8, max_length=14, stride=2)
    tokenizer = make_tokenizer()
    windows = data.tokenized("train", tokenizer).select(range(3))
    assert windows["row"] == [0, 0, 0]
    # [CLS] 3 [SEP] and [SEP] leave 8 tokens of the context, 2 of which the next window has too: from 0, 6, 12
    spans = [(0, 0), (5 + 10 - 6, 5 + 11 - 6), (0, 0)]
    assert list(zip(windows["start_positions"], windows["end_positions"], strict=True)) == spans
    assert [starts[5] for starts in windows["starts"]] == [len("a " * 0), len("a " * 6), len("a " * 10 + "good film ")]
    assert windows[1]["starts"][:5] == [-1] * 5
    ids = windows[1]["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[spans[1][0] : spans[1][1] + 1]) == ["good", "film"]


def test_an_answer_cut_by_a_window_is_none_of_it(tmp_path):
    row = {"question": "was", "context": "a a a good film", "answers": {"text": ["good film"], "answer_start": [6]}}
    windows = load(tmp_path, [row] * 8, max_length=8, stride=0).tokenized("train", make_tokenizer())
    assert [tuple(windows[0][name] for name in ("start_positions", "end_positions"))] == [(0, 0)]


def test_a_question_without_end_leaves_room_for_its_context(tmp_path):
    row = {"question": "was " * 200, "context": "a good film", "answers": {"text": ["good"], "answer_start": [2]}}
    windows = load(tmp_path, [row] * 8, max_length=120).tokenized("train", make_tokenizer())
    assert windows[0]["start_positions"] == 1 + 64 + 1 + 1


def test_a_wide_overlap_leaves_less_to_the_question(tmp_path):
    row = {"question": "was " * 200, "context": "a good film " * 9, "answers": {"text": ["good"], "answer_start": [2]}}
    windows = load(tmp_path, [row] * 8, max_length=40, stride=17).tokenized("train", make_tokenizer())
    assert max(map(len, windows["input_ids"])) == 40
    assert windows[0]["start_positions"] == 1 + (40 - 17 - 3 - 1) + 1 + 1


def test_a_wrong_stride_is_refused(tmp_path):
    with pytest.raises(InputError, match="leaves no room for questions; say at most 17"):
        load(tmp_path, asked(8), max_length=40, stride=21)
    with pytest.raises(InputError, match=r"data\.stride: for question answering, not for classification"):
        load_data("sst2", DataOptions(path=str(tmp_path), stride=4))


def test_the_best_span_of_all_windows_is_the_answer():
    context = "the cast was good"
    starts, ends = [-1, 0, 4, 9, 13], [-1, 3, 8, 12, 17]
    first, second = np.full((2, 5), -9.0), np.full((2, 5), -9.0)
    first[0, 2], first[1, 3] = 2.0, 1.0  # cast was: 3
    second[0, 4], second[1, 1], second[1, 4] = 4.0, 9.0, 0.5  # an end before its start is none; good: 4.5
    windows = [(0, starts, ends, first), (0, starts, ends, second)]
    assert answers_of([context], windows, may_be_none=False) == ["good"]
    assert answers_of([context], windows[:1], may_be_none=False) == ["cast was"]
    first[:, 0] = 2.0  # no answer: 4
    assert answers_of([context], windows[:1], may_be_none=True) == [""]
    assert answers_of([context], windows[:1], may_be_none=False) == ["cast was"]


def test_scores_by_hand():
    answers = ["The good, film!", "good film", "bad", "", "x"]
    accepted = [["good film"], ["bad", "a good film plot"], ["good"], [], []]
    expected = [[1, 1], [2 * 2 / (2 + 3), 0], [0, 0], [1, 1], [0, 0]]
    np.testing.assert_allclose(answer_scores(answers, accepted), expected)


NO_ANSWER = [
    {"text": [], "answer_start": []}, {"text": [""], "answer_start": [-1]}, {"text": [""], "answer_start": []},
    {"text": None, "answer_start": None}, None,
]  # fmt: skip


@pytest.mark.parametrize("answers", NO_ANSWER)
def test_every_form_of_no_answer_is_one(tmp_path, answers):
    plausible = {"text": ["good"], "answer_start": [2]}
    row = {"question": "was", "context": "a good film", "is_impossible": False, "answers": plausible}
    rows = [row, {**row, "answers": answers}, {**row, "is_impossible": True}]
    data = load(tmp_path, rows)
    assert data.labels("train") == [plausible] + [{"text": [], "answer_start": []}] * 2
    assert data.tokenized("train", make_tokenizer())["start_positions"] == [4, 0, 0]
    assert span_scores(data.task, ["good", "", ""], data.labels("train")) == {"f1": 1, "exact_match": 1}
    assert score_interval(data.task, ["good", "", ""], data.labels("train")) == (1, 1)


def test_answers_as_in_squads_own_file(tmp_path):
    answers = [{"text": "good", "answer_start": 2}, {"text": "good film", "answer_start": 2}]
    row = {"question": "was", "context": "a good film", "answers": answers}
    data = load(tmp_path, [row, {**row, "answers": []}])
    assert data.labels("train") == [
        {"text": ["good", "good film"], "answer_start": [2, 2]}, {"text": [], "answer_start": []}
    ]  # fmt: skip


def test_answers_that_are_all_missing_are_told(tmp_path):
    with pytest.raises(InputError, match="has no answer in any row"):
        load(tmp_path, [{"question": "was", "context": "a good film", "answers": None}] * 3)


def squads_own(text):
    """`normalize_answer` of SQuAD's evaluate-v2.0.py."""

    def remove_articles(text):
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def remove_punctuation(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return " ".join(remove_articles(remove_punctuation(text.lower())).split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The «Théâtre»", "«théâtre»"),  # guillemets are no ASCII punctuation
        ("l'été", "lété"),
        ("a\u00a0film,\u3000an end", "film end"),  # spaces beyond ASCII part words
        ("İzmir the", "i\u0307zmir"),
        ("Theä thé", "theä thé"),  # no article stands there
        ("20–30 %", "20–30"),
        ("東京、日本。", "東京、日本。"),
    ],
)
def test_answers_are_normalised_as_by_squads_script(text, expected):
    assert normalised(text) == squads_own(text) == expected


def test_an_answer_of_which_nothing_is_left_is_none():
    np.testing.assert_array_equal(answer_scores(["", "x"], [["The"], ["", "x"]]), [[1, 1], [1, 1]])


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["good"], "answer_start": [1]}, "says where 'good' stands in the context of row 0"),
        ({"text": ["good"]}, "has no text and answer_start in row 0"),
        ({"text": ["good"], "answer_start": []}, "1 answers but 0 places in row 0"),
    ],
)
def test_wrong_answers_are_told(tmp_path, answers, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, [{"question": "was", "context": "a good film", "answers": answers}] * 4)


def test_rows_with_one_context_are_not_split(tmp_path):
    rows = [{**row, "context": asked(40)[number // 4]["context"], "answers": asked(40)[number // 4]["answers"]}
            for number, row in enumerate(asked(40))]  # fmt: skip
    write_rows(tmp_path / "train.jsonl", rows)
    data = load_data(None, DataOptions(kind="question-answering", path=str(tmp_path), validation_fraction=0.3))
    train, validation = (set(data.splits[name]["context"]) for name in ("train", "validation"))
    assert train
    assert validation
    assert not train & validation


def test_a_whole_run(tmp_path, pretrained):
    write_rows(tmp_path / "train.jsonl", asked(96))
    write_rows(tmp_path / "validation.jsonl", asked(40, seed=1))
    path = tmp_path / "questions.yaml"
    path.write_text(f"""
output_dir: {tmp_path / "run"}
data: {{kind: question-answering, path: {tmp_path}, max_length: 12, stride: 2}}
benchmark: {{sequence_length: 12, throughput_batch_size: 2, rounds: 1}}
steps:
  teacher: {{run: finetune, model: {pretrained}, max_steps: 200, learning_rate: 2e-3}}
  student: {{run: distill, teacher: teacher, num_layers: 2, max_steps: 100, learning_rate: 1e-3,
             eval_strategy: steps, eval_steps: 50}}
  small: {{run: quantize, model: student, format: int8}}
""")
    made = make_plan(load_recipe(path))
    run_plan(made)
    by_name = {model["name"]: model for model in asdict(write_report(made))["models"]}
    assert by_name["teacher"]["metrics"]["exact_match"] > 0.9
    assert by_name["student"]["metrics"]["f1"] > 0.85
    assert by_name["student"]["agreement"] > 0.85
    assert by_name["small"]["agreement"] > 0.8
    record = json.loads((made.steps["student"].folder / "step.json").read_text())
    scored = [line["eval_f1"] for line in record["log"] if "eval_f1" in line]
    assert scored[-1] == pytest.approx(by_name["student"]["metrics"]["f1"])  # the same answers from Trainer's logits
    student = AutoModelForQuestionAnswering.from_pretrained(
        made.steps["student"].folder
    )  # transformers 5 has no pipeline
    row = asked(40, seed=1)[0]
    inputs = AutoTokenizer.from_pretrained(made.steps["student"].folder)(
        row["question"], row["context"], return_tensors="pt"
    )
    found = student(**inputs)
    span = inputs["input_ids"][0, found.start_logits.argmax() : found.end_logits.argmax() + 1]
    assert make_tokenizer().decode(span) == row["answers"]["text"][0]
