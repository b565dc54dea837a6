"""How many rows `max_length` cuts, by the tokenizer's own word."""

import datasets
import pytest
from transformers import ByT5Tokenizer, ViTImageProcessor

from distill.data.load import DataOptions, describe_cut, load_data
from distill.data.tokenized import cut_rows, same_specials, same_tokens, tokenize
from distill.tasks.base import GLUE
from distill.tasks.kinds import own_task
from tests.conftest import make_tokenizer, write_rows


def encoded(task, max_length, tokenizer=None, **columns):
    return tokenize(datasets.Dataset.from_dict(columns), task, tokenizer or make_tokenizer(), max_length)


def test_a_row_that_just_fits_is_not_cut():
    texts = ["good film", "the good film", "the very good film", ""]  # 4, 5, 6 and 2 tokens
    rows = encoded(GLUE["sst2"], 5, sentence=texts, label=[0] * 4)
    assert rows["cut"] == [False, False, True, False]
    assert (rows["length"], cut_rows(rows)) == ([4, 5, 5, 2], 1)


def test_either_text_of_a_pair_may_be_cut():
    first, second = ["the film", "the film", "the film was good", "a"], ["was good", "was", "good", "the film was good"]
    rows = encoded(GLUE["rte"], 6, sentence1=first, sentence2=second, label=[0] * 4)  # three tokens are special
    assert rows["cut"] == [True, False, True, True]


def test_words_are_cut_as_texts():
    task = own_task("token-classification", ("tokens",), "label").with_label_names(("O", "B"))
    words = [["the", "film"], ["the", "good", "film"], ["good-film", "was"]]  # the hyphen is a token
    rows = encoded(task, 5, tokens=words, label=[[0] * len(row) for row in words])
    assert rows["cut"] == [False, False, True]
    assert rows["words"] == [[0, 1], [0, 1, 2], [0]]


def test_windows_lose_nothing_but_long_questions_do():
    task = own_task("question-answering", ("question", "context"), "answers")
    answers = {"text": ["good"], "answer_start": [0]}
    contexts = ["good " * 30, "good"]
    rows = encoded(task, 12, question=["was the film"] * 2, context=contexts, label=[answers] * 2)
    assert len(rows) > 2
    assert cut_rows(rows) == 0
    rows = encoded(task, 12, question=["was " * 9, "was"], context=contexts, label=[answers] * 2)
    assert sum(rows["cut"]) > 1
    assert cut_rows(rows) == 1
    texts = encoded(own_task("causal-lm", ("text",), ""), 5, text=["the film " * 9])
    assert len(texts) > 2
    assert cut_rows(texts) == 0


@pytest.mark.parametrize("pairs", [False, True])
def test_tokenizers_in_python_are_counted_too(pairs):
    tokenizer = ByT5Tokenizer()  # a token a byte, and one at the end of each text
    texts = {"sentence1": ["abc", "abcd", "abcde"], **({"sentence2": ["x", "x", "x"]} if pairs else {})}
    task = GLUE["rte"] if pairs else own_task("classification", ("sentence1",), "label")
    rows = encoded(task, 5 + 2 * pairs, tokenizer, **texts, label=[0] * 3)
    assert (rows["cut"], max(rows["length"])) == ([False, False, True], 5 + 2 * pairs)
    assert rows["input_ids"][2] == tokenizer(
        *(values[2] for values in texts.values()), truncation=True, max_length=5 + 2 * pairs
    )["input_ids"]  # fmt: skip


def test_every_split_is_counted(tmp_path):
    short, long = ({"sentence": text, "label": 0} for text in ("good", "the very good film"))
    write_rows(tmp_path / "train.jsonl", [short, long, long])
    write_rows(tmp_path / "validation.jsonl", [short, {**long, "label": 1}])
    write_rows(tmp_path / "test.jsonl", [{**short, "label": 1}])
    data = load_data("sst2", DataOptions(path=str(tmp_path), max_length=5))
    counts = data.truncated(make_tokenizer())
    assert counts == {
        "train": {"rows": 3, "cut": 2}, "validation": {"rows": 2, "cut": 1}, "test": {"rows": 1, "cut": 0}
    }  # fmt: skip
    assert describe_cut(counts) == "cut at max_length: 2 of 3 train rows, 1 of 2 validation rows"
    assert describe_cut({"train": {"rows": 3, "cut": 0}}) is None
    assert describe_cut(None) is None


def test_rows_that_two_vocabularies_read_as_the_same_tokens():
    whole, trimmed = make_tokenizer(["the", "film", "was", "good"]), make_tokenizer(["good", "film", "the"])
    texts = ["the film", "the film was good", "good good film", "was", "[UNK] film", ""]
    both = [encoded(GLUE["sst2"], 8, each, sentence=texts, label=[0] * 6) for each in (trimmed, whole)]
    assert both[0]["input_ids"][0] != both[1]["input_ids"][0]  # other ids
    same = [True, False, True, False, True, True]
    assert same_tokens(*both, trimmed, whole).tolist() == same
    assert same_tokens(*both[::-1], whole, trimmed).tolist() == same
    longer = encoded(GLUE["sst2"], 8, whole, sentence=["the film film", *texts[1:]], label=[0] * 6)
    assert same_tokens(both[0], longer, trimmed, whole).tolist() == [False, *same[1:]]
    assert same_tokens(both[0].select([]), both[1].select([]), trimmed, whole).tolist() == []
    assert same_specials(trimmed, whole)
    assert not same_specials(whole, ByT5Tokenizer())
    assert not same_specials(whole, ViTImageProcessor())
