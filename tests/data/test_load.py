import gzip
import json

import datasets
import numpy as np
import pytest

from distill.data.fingerprints import token_fingerprint, tokenizer_fingerprint
from distill.data.load import DataOptions, load_data
from distill.data.split import _counts_to_cut
from distill.errors import InputError
from tests.conftest import make_tokenizer, sentences, write_rows

ROWS = [{"title": f"title {i}", "body": f"body {i}", "topic": ["sport", "tech"][i % 2]} for i in range(20)]
OWN = {"kind": "classification", "text": ["title", "body"], "label": "topic"}


def write(path, rows, suffix):
    table = datasets.Dataset.from_list(rows)
    if suffix == ".csv":
        table.to_csv(path)
    elif suffix == ".parquet":
        table.to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        write_rows(path, rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_file_format(tmp_path, suffix):
    write(tmp_path / f"train{suffix}", ROWS, suffix)
    write(tmp_path / f"validation{suffix}", ROWS[:4], suffix)
    data = load_data(None, DataOptions(**OWN, path=str(tmp_path)))
    assert data.task.label_names == ("sport", "tech")
    assert data.splits["train"]["label"][:3] == [0, 1, 0]
    assert data.splits["train"]["body"][1] == "body 1"
    assert len(data.splits["validation"]) == 4
    assert not data.notes


@pytest.mark.parametrize(("name", "separator"), [("train.csv", ";"), ("train.csv", "\t"), ("train.tsv", "\t")])
def test_the_header_tells_what_separates_cells(tmp_path, name, separator):
    lines = [f'title {i}{separator}"a{separator}b, and ""c"""{separator}{["None", "NA"][i % 2]}' for i in range(20)]
    text = "\n".join([separator.join(("title", "body", "topic")), *lines])
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    data = own(tmp_path)
    rows = [row for split in data.splits.values() for row in split]
    assert {row["body"] for row in rows} == {f'a{separator}b, and "c"'}
    assert data.task.label_names == ("NA", "None")
    assert len(rows) == 20


def test_glue_columns_and_labels_from_a_folder(sst2_folder):
    data = load_data("sst2", DataOptions(path=str(sst2_folder)))
    assert data.task.label_names == ("negative", "positive")
    assert data.scored_splits() == [("validation", "", "")]


def test_mnli_has_two_validation_splits_and_a_hidden_test(tmp_path):
    row = {"premise": "a", "hypothesis": "b", "label": 2}
    for split, label in (("train", 2), ("validation_matched", 1), ("validation_mismatched", 0), ("test", -1)):
        write_rows(tmp_path / f"{split}.jsonl", [{**row, "label": label}] * 3)
    data = load_data("mnli", DataOptions(path=str(tmp_path)))
    assert data.scored_splits() == [("validation_matched", "", ""), ("validation_mismatched", "", "_mm")]


def test_a_labelled_test_split_is_scored_with_a_prefix(tmp_path):
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.jsonl", sentences(8))
    assert ("test", "test_", "") in load_data("sst2", DataOptions(path=str(tmp_path))).scored_splits()


def test_class_folders(tmp_path):
    for label in ("one", "two"):
        for index in range(10):
            path = tmp_path / label / f"{index}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(f"{label} {index} £".encode("cp1252" if index == 3 else "utf-8"))
    data = load_data(None, DataOptions(kind="classification", path=str(tmp_path), validation_fraction=0.2))
    assert data.task.label_names == ("one", "two")
    assert sorted(data.splits["validation"]["label"]) == [0, 0, 1, 1]
    assert all("£" in text for split in data.splits.values() for text in split["text"])
    assert "4 rows (20%) cut from train" in data.notes[0]


def test_a_cut_validation_split_is_stratified_seeded_and_leaks_no_text(tmp_path):
    rows = [{"text": f"text {i % 60}", "label": "ab"[i % 60 >= 45]} for i in range(120)]  # every text twice
    path = write_rows(tmp_path / "rows.jsonl", rows)
    options = {"kind": "classification", "path": str(path), "validation_fraction": 0.2}
    data = load_data(None, DataOptions(**options))
    train, validation = data.splits["train"], data.splits["validation"]
    assert not set(train["text"]) & set(validation["text"])
    assert len(train) + len(validation) == 120
    assert (list(validation["label"]).count(0), list(validation["label"]).count(1)) == (18, 6)
    again, other = load_data(None, DataOptions(**options)), load_data(None, DataOptions(**options, seed=1))
    assert again.splits["validation"]["text"] == validation["text"]
    assert other.splits["validation"]["text"] != validation["text"]


@pytest.mark.parametrize(
    ("sizes", "fraction", "expected"),
    [
        ([150] * 4, 0.1, [15] * 4),
        ([511, 386, 417, 511, 401], 0.4, [204, 154, 167, 204, 160]),  # each rounded, as ever: one row less than 890
        ([20, 20, 1], 0.1, [2, 2, 0]),
        ([3, 1], 0.6, [2, 0]),
        ([100, *[1] * 100], 0.1, [20, *[0] * 100]),
    ],
)
def test_counts_of_a_cut_by_class(sizes, fraction, expected):
    assert _counts_to_cut(sizes, fraction, np.random.default_rng(0)) == expected


@pytest.mark.parametrize(("classes", "each"), [(150, 4), (20, 5), (77, 10), (50, 3), (2, 4), (400, 2)])
def test_a_tenth_is_cut_off_where_classes_are_small(classes, each):
    counts = _counts_to_cut([each] * classes, 0.1, np.random.default_rng(0))
    assert sum(counts) == round(classes * each / 10)
    assert set(counts) <= {each // 10, each // 10 + 1}
    assert counts == _counts_to_cut([each] * classes, 0.1, np.random.default_rng(0))


def test_small_classes_beside_a_large_one_give_their_share():
    counts = _counts_to_cut([5000, *[4] * 50], 0.1, np.random.default_rng(0))
    assert counts[0] == 500
    assert sum(counts[1:]) == 20


def test_a_cut_of_small_classes_is_told_and_leaves_every_class_in_train(tmp_path):
    rows = [{"text": f"text {c} {i}", "label": f"c{c}"} for c in range(30) for i in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "alone", "label": "rare"}])
    data = load_data(None, DataOptions(kind="classification", path=str(path)))
    assert len(data.splits["validation"]) == 12
    assert set(data.splits["train"]["label"]) == set(range(31))
    assert "12 rows (10%) cut from train" in data.notes[0]
    assert "19 of 31 classes have none of them" in data.notes[0]


def test_row_limits_take_a_seeded_part(sst2_folder):
    options = {"path": str(sst2_folder), "max_train_rows": 10, "max_eval_rows": 5}
    first, second = (load_data("sst2", DataOptions(**options)) for _ in range(2))
    assert (len(first.splits["train"]), len(first.splits["validation"])) == (10, 5)
    assert first.splits["train"]["sentence"] == second.splits["train"]["sentence"]


def test_the_fingerprint_follows_rows_and_options(tmp_path, sst2_folder):
    base = load_data("sst2", DataOptions(path=str(sst2_folder))).fingerprint
    assert load_data("sst2", DataOptions(path=str(sst2_folder))).fingerprint == base
    assert load_data("sst2", DataOptions(path=str(sst2_folder), max_train_rows=10)).fingerprint != base
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text((sst2_folder / f"{split}.jsonl").read_text())
    (tmp_path / "train.jsonl").open("a").write(json.dumps(sentences(1, seed=9)[0]) + "\n")
    assert load_data("sst2", DataOptions(path=str(tmp_path))).fingerprint != base


def test_integers_are_classes_and_regression_takes_floats(tmp_path):
    rows = [{"text": f"t {i}", "stars": i % 3 + 1} for i in range(30)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    classes = load_data(None, DataOptions(kind="classification", path=str(path), label="stars"))
    assert classes.task.label_names == ("1", "2", "3")
    scores = load_data(None, DataOptions(kind="regression", path=str(path), label="stars"))
    assert scores.task.num_labels == 1
    assert set(scores.splits["train"]["label"]) == {1.0, 2.0, 3.0}


def own(path, **changes):
    return load_data(None, DataOptions(**{**OWN, "path": str(path), **changes}))


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (ROWS, {"label": "topik"}, r"has no column 'topik'; did you mean 'topic'"),
        (ROWS, {"text": "boddy"}, r"has no column 'boddy'; did you mean 'body'"),
        ([{**row, "body": 3} for row in ROWS], {}, "column 'body' of train holds no text but int64"),
        ([{**row, "body": " "} for row in ROWS], {}, "column 'body' of train holds no text: every row is empty"),
        ([*ROWS, {**ROWS[0], "body": None}], {}, r"no text in 1 of 21 rows \(the first is row 20\)"),
        ([*ROWS, {**ROWS[0], "topic": None}], {}, "no label in 1 of 21 rows"),
        ([{**row, "topic": 0.5} for row in ROWS], {}, "scores like 0.5; say kind: regression"),
        ([{**row, "topic": "x"} for row in ROWS], {}, "holds 1 class"),
        (ROWS, {"kind": "regression"}, "'sport', which is no number"),
        (ROWS, {"label_names": ["sport", "science"]}, r"'tech', which is none of the classes \(sport, science\)"),
        (ROWS, {"text": ["title", "body", "topic"]}, "1 or 2 for classification, not 3 columns"),
        (ROWS[:1], {}, "class"),
    ],
)
def test_wrong_rows_are_told_in_words(tmp_path, rows, changes, message):
    with pytest.raises(InputError, match=message):
        own(write_rows(tmp_path / "train.jsonl", rows), **changes)


def test_glue_labels_out_of_range(tmp_path):
    write_rows(tmp_path / "train.jsonl", [*sentences(4), {"sentence": "a", "label": 7}])
    with pytest.raises(InputError, match=r"holds 7 \(1 rows\); its ids go from 0 to 1 \(negative, positive\)"):
        load_data("sst2", DataOptions(path=str(tmp_path)))


def test_labels_that_only_validation_has(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "validation.jsonl", [{**ROWS[0], "topic": "art"}])
    with pytest.raises(InputError, match="of validation holds 'art', which is none of the classes"):
        own(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", b"", "the file is empty"),
        ("train.jsonl", b"", "the file is empty"),
        ("train.parquet", b"not parquet", "cannot be read as parquet"),
        ("train.jsonl", b"{broken", "cannot be read as jsonl"),
        ("train.jsonl.gz", b"not gzip", "cannot be read as jsonl.gz"),
        ("train.csv", b"title,body,topic\n", "holds no rows"),
        (
            "train.csv",
            "title,body,topic\na,b,c\nочень,хороший,фильм\n".encode("cp1251"),
            "line 3 is not UTF-8, and not cp1252 either; .*iconv -f ENCODING -t UTF-8 train.csv",
        ),
        ("train.csv", b"title,body,topic\n" + b"a, b,c,d\n" * 5, "more cells than the header has names; .* hold ','"),
        ("train.csv", b"title,body,topic\na,b,c\na, b,c,d\n", "line 3 has 4 cells"),
        ("rows.xlsx", b"x", r"neither train\.\*"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        own(tmp_path)


def test_missing_paths_packages_and_hub_data():
    with pytest.raises(InputError, match="no such file or folder"):
        own("/nowhere/at/all")
    with pytest.raises(InputError, match="not installed here"):
        own("package:no-such-distribution/data")
    with pytest.raises(InputError, match="not to be had from the Hub nor from its cache"):
        own("some-org/some-data")
    with pytest.raises(InputError, match="did you mean 'sst2'"):
        load_data("sst-2", DataOptions())


def test_every_problem_is_told_at_once(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(InputError) as error:
        own(path, text=["titel", "body"], label="topik")
    assert len(error.value.problems) == 2


def test_a_task_brings_its_own_columns(sst2_folder):
    with pytest.raises(InputError, match=r"data\.text: task 'sst2' brings its own columns"):
        load_data("sst2", DataOptions(path=str(sst2_folder), text="sentence"))


def test_the_tokenizers_fingerprint_follows_its_vocabulary_and_not_its_use():
    tokenizer = make_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["good film"], truncation=True, max_length=3, padding=True)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(make_tokenizer(["other", "words"])) != before


@pytest.mark.parametrize(
    ("name", "value", "same_tokens"),
    [
        ("model_input_names", ["input_ids", "attention_mask"], True),
        ("padding_side", "left", False),
        ("truncation_side", "left", False),
        ("pad_token", "[UNK]", False),
        ("cls_token", "[MASK]", False),
    ],
)
def test_the_tokenizers_fingerprint_follows_what_rows_become(name, value, same_tokens):
    tokenizer, other = make_tokenizer(), make_tokenizer()
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    setattr(other, name, value)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    assert (token_fingerprint(other) == token_fingerprint(tokenizer)) is same_tokens


def test_rows_are_cut_and_counted(sst2_folder):
    data = load_data("sst2", DataOptions(path=str(sst2_folder), max_length=5))
    tokenized = data.tokenized("train", make_tokenizer())
    assert max(tokenized["length"]) == 5
    assert tokenized["length"] == [len(ids) for ids in tokenized["input_ids"]]
    assert data.tokenized("train", make_tokenizer()) is tokenized


def test_unlabelled_rows_join_those_that_a_teacher_labels(tmp_path, sst2_folder, tokenizer):
    write_rows(tmp_path / "more.jsonl", [{"sentence": "the film was bad", "other": 1}] * 3)
    data = load_data("sst2", DataOptions(path=str(sst2_folder), unlabelled=str(tmp_path / "more.jsonl")))
    assert list(data.splits["unlabelled"]["label"]) == [-100] * 3
    assert len(data.training_rows(tokenizer, unlabelled=True)) == 99
    assert list(data.training_rows(tokenizer, unlabelled=True)["labels"])[96:] == [-100] * 3
    assert len(data.training_rows(tokenizer, unlabelled=False)) == 96
    assert [split for split, _, _ in data.scored_splits()] == ["validation"]
    plain = load_data("sst2", DataOptions(path=str(sst2_folder)))
    write_rows(tmp_path / "more.jsonl", [{"sentence": "another"}])
    changed = load_data("sst2", DataOptions(path=str(sst2_folder), unlabelled=str(tmp_path / "more.jsonl")))
    assert len({data.train_fingerprint, plain.train_fingerprint, changed.train_fingerprint}) == 3


def pairs_of_questions(folder, kind="qqp"):
    words = ["how", "why", "when", "cook", "rice", "code", "python", "sleep", "well", "fast"]
    texts = [f"{a} {b} {c}" for a in words[:3] for b in words[3:] for c in words[3:] if b != c]
    label = (lambda row: row % 2) if kind == "qqp" else (lambda row: row % 6 * 1.0)
    names = ("question1", "question2") if kind == "qqp" else ("sentence1", "sentence2")
    rows = [
        {names[0]: texts[row], names[1]: texts[(row * 7 + 1) % len(texts)], "label": label(row)}
        for row in range(len(texts))
    ]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "validation.jsonl", rows[:20])
    return rows


@pytest.mark.parametrize("task", ["qqp", "stsb"])
def test_sampled_pairs_are_new_alike_and_seeded(tmp_path, task):
    rows = pairs_of_questions(tmp_path, task)
    names = list(rows[0])[:2]
    data = load_data(task, DataOptions(path=str(tmp_path), sampled_pairs=150))
    pairs = list(zip(*(data.splits["unlabelled"][name] for name in names), strict=True))
    assert len(set(pairs)) == len(pairs) == 150
    assert not set(pairs) & {(row[names[0]], row[names[1]]) for row in rows}
    overlap = [len(set(first.split()) & set(second.split())) for first, second in pairs]
    assert sum(overlap) / len(overlap) > 1.5  # of three words; random pairs share 0.9
    assert all(first != second for first, second in pairs)
    labels = data.splits["unlabelled"]["label"]
    assert all(label == -100 for label in labels) if task == "qqp" else np.isnan(list(labels)).all()
    again = load_data(task, DataOptions(path=str(tmp_path), sampled_pairs=150))
    assert list(again.splits["unlabelled"]) == list(data.splits["unlabelled"]) or task == "stsb"
    assert "150 unlabelled pairs" in " ".join(data.notes)


@pytest.mark.parametrize(
    "words", [["電影", "很好", "演員", "天氣", "下雨", "明天"], ["หนัง", "สนุก", "นักแสดง", "อากาศ", "ฝนตก", "พรุ่งนี้"]]
)
def test_pairs_are_alike_where_words_are_not_separated(tmp_path, words):
    generator = np.random.default_rng(0)
    topics = [
        ["".join(generator.permutation(words[at : at + 3])) + str(number) for number in range(60)] for at in (0, 3)
    ]
    rows = [{"question1": one, "question2": other, "is_duplicate": 0} for one, other in zip(*topics, strict=True)]
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", [{**row, "label": number % 2} for number, row in enumerate(rows)])
    pairs = load_data("qqp", DataOptions(path=str(tmp_path), sampled_pairs=80)).splits["unlabelled"]
    of_one_topic = [
        {any(word in text for word in words[:3]) for text in pair}
        for pair in zip(pairs["question1"], pairs["question2"], strict=True)
    ]
    assert np.mean([len(topic) == 1 for topic in of_one_topic]) == 1


def test_sampled_pairs_have_no_stored_predictions(tmp_path):
    pairs_of_questions(tmp_path)
    with pytest.raises(InputError, match="new pairs have no stored predictions"):
        load_data("qqp", DataOptions(path=str(tmp_path), sampled_pairs=10, teacher_logits="label"))


def test_sampled_pairs_need_two_columns(sst2_folder):
    with pytest.raises(InputError, match="pairs need two text columns"):
        load_data("sst2", DataOptions(path=str(sst2_folder), sampled_pairs=10))


@pytest.mark.parametrize("columns", ["p", ["p0", "p1"]])
def test_stored_predictions_become_a_column(tmp_path, tokenizer, columns):
    rows = [{"text": "a good film", "label": row % 2, "p": [0.75, 0.25], "p0": 0.75, "p1": 0.25} for row in range(8)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "validation.jsonl", [{"text": "bad", "label": 0}, {"text": "good", "label": 1}])
    options = DataOptions(kind="classification", path=str(tmp_path), text="text", teacher_probabilities=columns)
    data = load_data(None, options)
    assert data.tokenized("train", tokenizer)["teacher_probabilities"][0] == [0.75, 0.25]
    assert "teacher_probabilities" not in data.tokenized("validation", tokenizer).column_names


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"p": [0.5, 0.6]}, "a sum that is not 1"),
        ({"p": [0.5]}, "1 values in row 0, but there are 2 outputs"),
        ({"p": [0.5, None]}, "no number|not finite"),
        ({"q": [0.5, 0.5]}, "train has no column 'p'; did you mean|train has no column 'p'; known"),
    ],
)
def test_wrong_stored_predictions(tmp_path, stored, message):
    write_rows(tmp_path / "train.jsonl", [{"text": "a", "label": row % 2, **stored} for row in range(8)])
    options = DataOptions(kind="classification", path=str(tmp_path), text="text", teacher_probabilities="p")
    with pytest.raises(InputError, match=message):
        load_data(None, options)


def test_unlabelled_rows_without_the_text_column(tmp_path, sst2_folder):
    write_rows(tmp_path / "more.jsonl", [{"sentense": "x"}])
    with pytest.raises(InputError, match=r"train has no text column 'sentence'; did you mean 'sentense'\?"):
        load_data("sst2", DataOptions(path=str(sst2_folder), unlabelled=str(tmp_path / "more.jsonl")))
    with pytest.raises(InputError, match=r"data\.unlabelled: .*nowhere"):
        load_data("sst2", DataOptions(path=str(sst2_folder), unlabelled="./nowhere"))


LABEL_SETS = [{"text": f"row {row}", "tags": [["a"], ["a", "b"], []][row % 3]} for row in range(12)]


@pytest.mark.parametrize("form", ["names", "ids", "columns"])
def test_label_sets_from_lists_and_from_columns(tmp_path, form):
    rows, label = LABEL_SETS, "tags"
    if form == "ids":
        rows = [{**row, "tags": ["ab".index(tag) for tag in row["tags"]]} for row in rows]
    elif form == "columns":
        rows = [{"text": row["text"], "a": int("a" in row["tags"]), "b": int("b" in row["tags"])} for row in rows]
        label = ["a", "b"]
    write_rows(tmp_path / "train.jsonl", rows)
    data = load_data(None, DataOptions(kind="multi-label", path=str(tmp_path), text="text", label=label))
    assert data.task.label_names == (("0", "1") if form == "ids" else ("a", "b"))
    found = dict(zip(data.splits["train"]["text"], data.splits["train"]["label"], strict=True))
    expected = {row["text"]: [float("a" in row["tags"]), float("b" in row["tags"])] for row in LABEL_SETS}
    assert all(labels == expected[text] for text, labels in found.items())
    assert {1.0, 0.0} == {value for labels in found.values() for value in labels}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (LABEL_SETS, {"kind": "classification", "label": "tags"}, "holds lists; say kind: multi-label"),
        ([{"text": "x", "tags": "a"}] * 9, {"kind": "multi-label", "label": "tags"}, "holds no lists"),
        ([{"text": "x", "a": 2, "b": 0}] * 9, {"kind": "multi-label", "label": ["a", "b"]}, "holds 2; zeros and ones"),
        ([{"text": "x", "a": 1, "b": 0}] * 9, {"kind": "multi-label", "label": ["a", "c"]}, "no column 'c'"),
        ([{"text": "x", "a": 1, "b": 0}] * 9, {"kind": "classification", "label": ["a", "b"]}, "are for kind: multi"),
        (LABEL_SETS, {"kind": "multi-label", "label": "tags", "label_names": ["a", "c"]}, "holds 'b', which is none"),
    ],
)
def test_wrong_label_sets(tmp_path, rows, options, message):
    write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(InputError, match=message):
        load_data(None, DataOptions(path=str(tmp_path), text="text", **options))
