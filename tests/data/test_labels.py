"""Labels of whole data sets: names, ids, zeros and ones, tags and scores, and what is refused."""

import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, List, Value

from distill.data.load import DataOptions, load_data
from distill.errors import InputError
from tests.conftest import make_tokenizer, write_rows


def load(folder, splits, **options):
    """The data of files with these splits: lists of labels, whole data sets, or the text of a csv file."""
    for split, rows in splits.items():
        if isinstance(rows, datasets.Dataset):
            rows.to_parquet(folder / f"{split}.parquet")
        elif isinstance(rows, str):
            (folder / f"{split}.csv").write_text(rows)
        else:
            words = options.get("kind") == "token-classification"
            texts = [["word"] * len(each) if words else f"row {number}" for number, each in enumerate(rows)]
            named = [{"text": text, "label": each} for text, each in zip(texts, rows, strict=True)]
            write_rows(folder / f"{split}.jsonl", named)
    return load_data(None, DataOptions(**{"kind": "classification", "text": "text", "path": str(folder), **options}))


def of_classes(ids, names, of_lists=False):
    feature = ClassLabel(names=list(names))
    features = Features({"text": Value("string"), "label": List(feature) if of_lists else feature})
    rows = {"text": [f"row {number}" for number in range(len(ids))], "label": ids}
    return datasets.Dataset.from_dict(rows, features=features)


def labels(data, split="train"):
    return list(data.splits[split]["label"])


def refused(folder, splits, **options):
    with pytest.raises(InputError) as error:
        load(folder, splits, **options)
    return " ".join(error.value.problems)


# --- ids and names --------------------------------------------------------------------------------------------------


def test_a_split_without_one_of_the_classes_has_the_same_ids(tmp_path):
    splits = {"train": of_classes([0, 1, 2], "123"), "validation": of_classes([1, 2], "123")}
    data = load(tmp_path, splits)
    assert data.task.label_names == ("1", "2", "3")
    assert (labels(data), labels(data, "validation")) == ([0, 1, 2], [1, 2])  # and not the names 1 and 2


def test_class_labels_are_matched_by_name_between_splits(tmp_path):
    data = load(tmp_path, {"train": of_classes([0, 1, 2], "abc"), "validation": of_classes([0, 2], "cba")})
    assert labels(data, "validation") == [2, 0]


def test_label_names_in_another_order_move_the_ids_of_class_labels(tmp_path):
    splits = {"train": of_classes([0, 1, 1], ["no", "yes"]), "validation": of_classes([1], ["no", "yes"])}
    data = load(tmp_path, splits, label_names=["yes", "No"])
    assert (labels(data), labels(data, "validation")) == ([1, 0, 0], [0])
    assert "column 'label': 'no' as 'No'" in data.notes


def test_other_label_names_name_the_ids_of_class_labels_anew(tmp_path):
    data = load(
        tmp_path, {"train": of_classes([0, 1], "ab"), "validation": of_classes([1], "ab")}, label_names=["x", "y"]
    )
    assert (data.task.label_names, labels(data), labels(data, "validation")) == (("x", "y"), [0, 1], [1])
    assert "the classes of column 'label' have other names, read by their ids: a is x, b is y" in data.notes


@pytest.mark.parametrize(
    "train", [[0, 1, 2, 1], [0.0, 1.0, 2.0, 1.0], ["0", "1", "2", "1"], "text,label\na,0\nb,1\nc,2\nd,1\n"]
)
def test_numbers_are_ids_where_label_names_are_words_in_every_split(tmp_path, train):
    data = load(tmp_path, {"train": train, "validation": [1, 2]}, label_names=["a", "b", "c"])
    assert (labels(data), labels(data, "validation")) == ([0, 1, 2, 1], [1, 2])
    assert "column 'label' holds numbers, read as ids: 0 is a, 1 is b, 2 is c" in data.notes


def test_numbers_are_names_where_label_names_are_numbers_in_every_split(tmp_path):
    data = load(tmp_path, {"train": [1, 2, 3], "validation": [1, 2]}, label_names=["3", "2", "1"])
    assert (labels(data), labels(data, "validation")) == ([2, 1, 0], [2, 1])
    said = refused(tmp_path, {"train": [0, 1, 2], "validation": [1, 2]}, label_names=["1", "2", "3"])
    assert "holds '0', which is none of the classes (1, 2, 3)" in said
    assert "not ids" in said


@pytest.mark.parametrize(
    "train",
    [[1.0, 2.0, 10.0, 1.0], ["1.0", "2.0", "10.0", "1.0"], "text,label\na,1.0\nb,2.0\nc,10.0\nd,1.0\n"],
)
def test_whole_numbers_written_as_floats_are_classes(tmp_path, train):
    data = load(tmp_path, {"train": train, "validation": [1]})
    assert data.task.label_names == ("1", "2", "10")
    assert (labels(data), labels(data, "validation")) == ([0, 1, 2, 0], [0])
    assert "column 'label' holds whole numbers written as floats, read as classes 1, 2, 10" in data.notes


def test_floats_have_the_names_that_the_user_gives_them(tmp_path):
    splits = {"train": [1.0, 2.0], "validation": [2.0]}
    assert labels(load(tmp_path, splits, label_names=["2", "1"])) == [1, 0]
    assert labels(load(tmp_path, splits, label_names=["2.0", "1.0"])) == [1, 0]


def test_numbers_with_leading_zeros_are_names(tmp_path):
    data = load(tmp_path, {"train": ["007", "01", "1"], "validation": ["1"]})
    assert data.task.label_names == ("007", "01", "1")


def test_a_number_and_its_text_are_one_class(tmp_path):
    data = load(tmp_path, {"train": [1, 2, 1], "validation": ["2", "1"]})
    assert (data.task.label_names, labels(data, "validation")) == (("1", "2"), [1, 0])
    mixed = load(tmp_path, {"train": [1, "1", "good", 2], "validation": ["good"]})
    assert mixed.task.label_names == ("1", "2", "good")
    assert labels(mixed) == [0, 0, 2, 1]


def test_booleans(tmp_path):
    data = load(tmp_path, {"train": [True, False], "validation": ["true"]})
    assert (data.task.label_names, labels(data), labels(data, "validation")) == (("False", "True"), [1, 0], [1])
    named = load(tmp_path, {"train": [True, False], "validation": [True]}, label_names=["no", "yes"])
    assert (labels(named), labels(named, "validation")) == ([1, 0], [1])
    assert "column 'label' holds booleans: false is no, true is yes" in named.notes


def test_names_that_differ_by_spelling_are_read_and_told(tmp_path):
    data = load(tmp_path, {"train": ["Good", " bad"], "validation": ["good"]}, label_names=["good", "bad"])
    assert (labels(data), labels(data, "validation")) == ([0, 1], [0])
    assert "column 'label': ' bad' as 'bad', 'Good' as 'good'" in data.notes
    apart = load(
        tmp_path, {"train": ["Good", "good", "bad"], "validation": ["good"]}, label_names=["bad", "good", "Good"]
    )
    assert labels(apart) == [2, 1, 0]


def test_labels_that_no_training_row_has_are_told(tmp_path):
    names = ["a", "b", "c", "d"]
    data = load(tmp_path, {"train": ["a", "b"], "validation": ["a", "c"]}, label_names=names)
    assert labels(data, "validation") == [0, 2]
    assert "no training row is labelled c, d" in data.notes
    assert "validation has labels that no training row has: c (1)" in data.notes
    said = refused(tmp_path, {"train": ["a", "b"], "validation": ["a", "c"]})
    assert "of validation holds 'c', which is none of the classes (a, b); the first is row 1. No training row" in said


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        ([1, 2, 3], {"label_names": ["a", "b", "c"]}, r"holds 3 \(1 rows\); its ids go from 0 to 2 .*from 0, or write"),
        (of_classes([0, 1, -1], "ab"), {}, r"holds -1 \(1 rows\).*remove rows without a label"),
        (of_classes([0, 1], "ab"), {"label_names": ["a", "c"]}, r"holds 'b', which is none of the classes \(a, c\)"),
        (["a", "b"], {"label_names": ["a", "b", "a"]}, "label_names: 'a' stands there twice"),
        (["a", "b"], {"label_names": ["a", " "]}, "label_names: one of them is empty"),
        (["a", "b"], {"label_names": ["a"]}, "'a' is one class; classification needs two or more"),
        (["a", None, "b", None], {}, r"no label in 2 of 4 rows \(the first is row 1\)"),
        (["a", "b", "  "], {}, r"no label in 1 of 3 rows \(the first is row 2\)"),
        ([1.0, 2.0, float("nan")], {}, r"no label in 1 of 3 rows \(the first is row 2\)"),
        ([1.0, 2.5], {}, "holds scores like 2.5; say kind: regression"),
        (["1,5", "2,5"], {}, "holds scores like 1,5; say kind: regression"),
        ("text,label\na,1.5\nb,2.0\n", {}, "holds scores like 1.5; say kind: regression"),
        ([{"a": 1}, {"a": 2}], {}, "holds nested values"),
        ([1, 2], {"kind": "regression", "label_names": ["a", "b"]}, "label_names: not for regression"),
    ],
)
def test_wrong_classes(tmp_path, train, options, message):
    said = refused(tmp_path, {"train": train}, **options)
    assert re.search(message, said), said


def test_texts_that_look_like_scores_are_classes_where_they_are_named(tmp_path):
    data = load(tmp_path, {"train": ["3.10", "3.9"], "validation": ["3.9"]}, label_names=["3.9", "3.10"])
    assert (labels(data), labels(data, "validation")) == ([1, 0], [0])


def test_a_model_names_ids_and_never_the_classes_of_a_column(tmp_path):
    options = {"path": str(tmp_path), "kind": "classification"}
    load(tmp_path, {"train": [1, 0, 1], "validation": [1]})
    ids = load_data(None, DataOptions(**options), model_labels=["no", "yes", "maybe"])
    assert (ids.task.label_names, labels(ids)) == (("no", "yes", "maybe"), [1, 0, 1])
    load(tmp_path, {"train": ["yes", "no"], "validation": ["no"]})
    with pytest.raises(InputError, match=r"holds 'no', which is none of the classes \(N, Y\).* label_map says"):
        load_data(None, DataOptions(**options), model_labels=["N", "Y"])
    for path in tmp_path.iterdir():
        path.unlink()
    load(tmp_path, {"train": of_classes([0, 1], ["no", "yes"]), "validation": of_classes([0], ["no", "yes"])})
    for of_model in (["YES", "NO"], ["LABEL_0", "LABEL_1"], ["cat", "dog"]):  # which label_order has to match
        data = load_data(None, DataOptions(**options), model_labels=of_model)
        assert (data.task.label_names, labels(data)) == (("no", "yes"), [0, 1])


# --- several labels a row -------------------------------------------------------------------------------------------

HOT = [[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("form", [int, float, bool, str])
@pytest.mark.parametrize("names", [None, ["x", "y", "z"]])
def test_zeros_and_ones_have_a_place_a_label(tmp_path, form, names):
    rows = [[str(each) if form is str else form(each) for each in row] for row in HOT]
    data = load(tmp_path, {"train": rows, "validation": rows[:1]}, kind="multi-label", label_names=names)
    assert labels(data) == HOT
    assert labels(data, "validation") == HOT[:1]
    assert data.task.label_names == (("x", "y", "z") if names else ("0", "1", "2"))
    assert any("called 0, 1, 2 by their places" in note for note in data.notes) == (names is None)


def test_what_zeros_and_ones_are_is_decided_for_all_splits(tmp_path):
    data = load(tmp_path, {"train": [[1, 1], [0, 1]], "validation": [[1, 0], [0, 1]]}, kind="multi-label")
    assert labels(data, "validation") == [[1.0, 0.0], [0.0, 1.0]]
    ids = load(tmp_path, {"train": [[1, 0], [0]], "validation": [[1, 0], [0, 1]]}, kind="multi-label")
    assert labels(ids, "validation") == [[1.0, 1.0], [1.0, 1.0]]


def test_a_model_names_the_places_of_zeros_and_ones(tmp_path):
    load(tmp_path, {"train": HOT, "validation": HOT}, kind="multi-label")
    options = DataOptions(kind="multi-label", path=str(tmp_path))
    data = load_data(None, options, to_score=True, model_labels=["x", "y", "z"])
    assert (data.task.label_names, labels(data, "validation")) == (("x", "y", "z"), HOT)


def test_ids_of_labels_in_lists(tmp_path):
    data = load(
        tmp_path, {"train": [[0, 2], [], [1]], "validation": [[0, 1]]}, kind="multi-label", label_names=[*"xyz"]
    )
    assert labels(data) == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    splits = {name: of_classes([[0, 1], [], [1]], "pqr", of_lists=True) for name in ("train", "validation")}
    for path in tmp_path.iterdir():
        path.unlink()
    column = load(tmp_path, splits, kind="multi-label")
    assert column.task.label_names == ("p", "q", "r")
    assert labels(column) == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert "no training row is labelled r" in column.notes


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        ([[1, 0], [0, 1]], ["x", "y"], "lists like [1, 0], which may be ids or zeros and ones; write names"),
        ([[1, 0], [0, 1]], None, "which may be ids or zeros and ones"),
        (HOT, ["x", "y"], "has 3 zeros and ones in row 0, but there are 2 labels (x, y)"),
        ([*HOT, [1, 1]], None, "has 2 zeros and ones in row 4, but there are 3 in most of the rows"),
        ([[0.3, 0.7], [0.1, 0.2]], None, "holds numbers like 0.1; names, ids, or zeros and ones are right"),
        ([[0.3, 0.7], [0.1, 0.2]], ["x", "y"], "holds '0.1', which is none of the labels (x, y)"),
        ([["a", None], ["b"]], None, "holds an empty label in 1 of 2 rows (the first is row 0)"),
        ([["a", "b"], None], None, "no label in 1 of 2 rows (the first is row 1)"),
        (["a", "b"], None, "holds no lists, which multi-label rows need"),
    ],
)
def test_wrong_lists_of_labels(tmp_path, rows, names, message):
    assert message in refused(tmp_path, {"train": rows, "validation": rows}, kind="multi-label", label_names=names)


@pytest.mark.parametrize("yes_and_no", [(True, False), (1.0, 0.0), ("yes", "no"), ("True", "False"), ("1", "0")])
def test_columns_of_zeros_and_ones_in_several_forms(tmp_path, yes_and_no):
    yes, no = yes_and_no
    rows = [{"text": f"row {n}", "a": [yes, no][n % 2], "b": [yes, no][n // 2 % 2]} for n in range(8)]
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    options = {"kind": "multi-label", "path": str(tmp_path), "text": "text", "label": ["a", "b"]}
    data = load_data(None, DataOptions(**options))
    assert labels(data)[:4] == [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    with pytest.raises(InputError, match=r"data\.label_names: the columns name the labels; leave it out"):
        load_data(None, DataOptions(**options, label_names=["x", "y"]))
    write_rows(tmp_path / "train.jsonl", [*rows, {**rows[0], "b": None}])
    with pytest.raises(InputError, match=r"column 'b' of train has no label in 1 of 9 rows \(the first is row 8\)"):
        load_data(None, DataOptions(**options))


# --- tags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [int, float, bool, str])
def test_tags_that_are_numbers_need_names(tmp_path, form):
    rows = [[form(each) if form is not str else str(each) for each in row] for row in ([0, 1], [0, 0], [1, 0])]
    splits = {"train": rows, "validation": rows[:1]}
    assert "name them in the order of their ids" in refused(tmp_path, splits, kind="token-classification")
    data = load(tmp_path, splits, kind="token-classification", label_names=["O", "B-x"])
    assert (labels(data), labels(data, "validation")) == ([[0, 1], [0, 0], [1, 0]], [[0, 1]])


def test_tags_are_named_by_their_column(tmp_path):
    feature = Features({"text": List(Value("string")), "label": List(ClassLabel(names=["O", "B-x", "I-x"]))})
    rows = {"text": [["a", "b"], ["c"]], "label": [[1, 2], [0]]}
    split = datasets.Dataset.from_dict(rows, features=feature)
    data = load(tmp_path, {"train": split, "validation": split.select([1])}, kind="token-classification")
    assert (data.task.label_names, labels(data)) == (("O", "B-x", "I-x"), [[1, 2], [0]])
    assert labels(data, "validation") == [[0]]


def test_tags_without_an_outside_one_are_told(tmp_path):
    splits = {"train": [["noun", "verb"], ["noun"]], "validation": [["verb"]]}
    data = load(tmp_path, splits, kind="token-classification")
    assert any("none of the labels is O" in note for note in data.notes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["O", None], ["B-x"]], "holds an empty label in 1 of 2 rows (the first is row 0)"),
        (["O", "B-x"], "holds no lists, which token classification needs"),
        ([[["O"]], [["B-x"]]], "holds nested values"),
    ],
)
def test_wrong_tags(tmp_path, rows, message):
    assert message in refused(tmp_path, {"train": rows}, kind="token-classification")


def test_a_word_that_is_missing(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"tokens": ["a", None], "label": ["O", "B-x"]}])
    with pytest.raises(InputError, match=r"has an empty word in 1 rows \(the first is row 0\)"):
        load_data(None, DataOptions(kind="token-classification", path=str(tmp_path)))


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_written_as_text(tmp_path):
    data = load(tmp_path, {"train": ["1.5", " 2e-1 ", "-3", "+.5"], "validation": [1]}, kind="regression")
    assert labels(data) == [1.5, 0.2, -3.0, 0.5]
    classes = {"train": of_classes([1, 0], ["1", "5"]), "validation": of_classes([0], ["1", "5"])}
    for path in tmp_path.iterdir():
        path.unlink()
    assert labels(load(tmp_path, classes, kind="regression")) == [5.0, 1.0]  # and not the ids


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1.5", "3,5"], "holds '3,5', which is no number; numbers need a decimal point and nothing between thousands"),
        (["1.5", "1,000.5"], "holds '1,000.5', which is no number; regression needs scores (row 1)"),
        (["45%", "3.5"], "holds '45%', which is no number; regression needs scores (row 0)"),
        (["nan", "3.5"], "holds 'nan', which is no number"),
        ([True, False], "holds True, which is no score; say kind: classification (row 0)"),
        ([[1.0], [2.0]], "holds [1.0], which is no number"),
        ([1.0, float("nan"), None], "has no label in 2 of 3 rows (the first is row 1)"),
        ([1.0, float("inf")], "holds inf; scores that are not finite teach nothing, remove the row (row 1)"),
        (of_classes([0, 1], ["bad", "good"]), "holds 'bad', which is no number"),
    ],
)
def test_wrong_scores(tmp_path, rows, message):
    assert message in refused(tmp_path, {"train": rows, "validation": [1.0]}, kind="regression")


# --- columns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["label", "labels", "length", "input_ids", "row", "text", "teacher_logits"])
def test_a_text_column_called_as_one_of_ours(tmp_path, column):
    rows = [{column: f"good film {number}", "topic": "ab"[number % 2]} for number in range(8)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "validation.jsonl", rows[:2])
    write_rows(tmp_path / "more.jsonl", [{column: "bad film"}])
    options = {"path": str(tmp_path), "text": column, "label": "topic", "unlabelled": str(tmp_path / "more.jsonl")}
    data = load_data(None, DataOptions(kind="classification", **options))
    tokenizer = make_tokenizer()
    found = data.training_rows(tokenizer, unlabelled=True)
    texts = [*(row[column] for row in rows), "bad film"]
    assert list(found["input_ids"]) == tokenizer(texts)["input_ids"]
    assert list(found["labels"]) == [0, 1] * 4 + [-100]
    assert list(found["length"]) == [len(ids) for ids in found["input_ids"]]
    assert "teacher_logits" not in found.column_names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], "holds no text but int64"),
        ([{"a": 1}, {"a": 2}], "but {'a': 1} in row 0"),
        ([["a"], ["b"]], r"but \['a'\] in row 0"),
    ],
)
def test_columns_that_are_no_text(tmp_path, values, message):
    rows = [{"text": value, "label": label} for value, label in zip(values, "ab", strict=True)]
    write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(InputError, match=message):
        load_data(None, DataOptions(kind="classification", path=str(tmp_path)))


@pytest.mark.parametrize("none", [-1, "-1", None])
def test_a_test_split_whose_labels_are_withheld_is_left_out(tmp_path, none):
    data = load(tmp_path, {"train": ["a", "b"], "validation": ["a"], "test": [none, none]})
    assert sorted(data.splits) == ["train", "validation"]


def test_texts_that_are_the_label_or_stand_there_twice(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"label": "good film", "topic": "a"}])
    options = {"kind": "classification", "path": str(tmp_path)}
    with pytest.raises(
        InputError, match=r"data\.label: missing, as 'label' is the text; say which column is the label"
    ):
        load_data(None, DataOptions(**options, text="label"))
    with pytest.raises(InputError, match=r"data\.text: 'topic' stands there twice"):
        load_data(None, DataOptions(**options, text=["topic", "topic"]))
    with pytest.raises(InputError, match=r"data\.text: 'topic' is the label; leave it out"):
        load_data(None, DataOptions(kind="multi-label", path=str(tmp_path), text="topic", label=["topic", "label"]))


@pytest.mark.parametrize("of_text", [pa.string(), pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("of_list", [pa.list_, pa.large_list])
def test_parquet_files_of_all_types_of_text_and_list(tmp_path, of_text, of_list):
    table = pa.table(
        {
            "words": pa.array([["good", "film"], ["bad"]] * 4, of_list(of_text)),
            "tags": pa.array([["O", "B-x"], ["O"]] * 4, of_list(of_text)),
            "text": pa.array(["good film", "bad"] * 4, of_text),
            "topic": pa.array(["a", "b"] * 4).dictionary_encode(),
        }
    )
    for split in ("train", "validation"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    found = {
        kind: load_data(None, DataOptions(kind=kind, path=str(tmp_path), text=text, label=label))
        for kind, text, label in (
            ("classification", "text", "topic"),
            ("token-classification", "words", "tags"),
            ("multi-label", "text", "tags"),
        )
    }
    assert labels(found["classification"])[:2] == [0, 1]
    assert labels(found["token-classification"])[:2] == [[1, 0], [1]]  # B-x, O
    assert np.array_equal(labels(found["multi-label"])[:2], [[1, 1], [0, 1]])
    assert all(data.tokenized("train", make_tokenizer())["length"][:2] == [4, 3] for data in found.values())
