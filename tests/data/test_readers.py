"""Files as people have them: what stands in them is what is read, and what can't be read is told with its line."""

import bz2
import csv
import gzip
import json
import lzma
import random
import re
import subprocess

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from distill.data.files.readers import read_splits
from distill.data.load import DataOptions, load_data
from distill.errors import InputError
from distill.tasks.kinds import own_task
from tests.conftest import write_rows

TASK = own_task("classification", ("text",), "label")
ROWS = [{"text": f"row {i}, of words", "label": ["ham", "spam"][i % 2]} for i in range(20)]


def read(path, task=TASK):
    return read_splits(task, str(path), None)


def rows_of(path, content, task=TASK):
    """The rows of a file of that content, and the notes."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read(path, task)
    return found.splits["train"], " ".join(found.notes)


def as_csv(rows, **how):
    lines = []
    target = type("Lines", (), {"write": lambda self, line: lines.append(line)})()
    writer = csv.writer(target, lineterminator="\n", **how)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return "".join(lines)


# --- csv ------------------------------------------------------------------------------------------------------------


def test_cells_are_read_as_python_reads_them(tmp_path):
    generator = random.Random(0)
    alphabet = ["a", " ", ",", '"', "\n", "é", "'", "\\", ";", "7"]
    rows = [{"text": "".join(generator.choices(alphabet, k=8)) + "x", "label": f"l{i % 3}"} for i in range(300)]
    found, notes = rows_of(tmp_path / "train.csv", as_csv(rows))
    assert found.to_list() == rows
    assert not notes


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["0", "1", "1"], [0, 1, 1]),
        (["-1", "", "12"], [-1, None, 12]),
        (["007", "7", "1"], ["007", "7", "1"]),
        (["1", "2", "late"], ["1", "2", "late"]),
        (["0.5", "3", "1e-3"], [0.5, 3.0, 0.001]),
        (["1.10", "v2", "1.1"], ["1.10", "v2", "1.1"]),
        (["true", "False", "true"], ["true", "False", "true"]),
        (["True", "0", "1"], ["True", "0", "1"]),
        (["99999999999999999999", "1", "2"], ["99999999999999999999", "1", "2"]),
        (["nan", "1", "2"], ["nan", "1", "2"]),
        (["NA", "None", "null"], ["NA", "None", "null"]),
    ],
)
def test_labels_are_numbers_only_where_every_cell_is_one(tmp_path, cells, values):
    content = "text,label\n" + "".join(f"12,{cell}\n" for cell in cells)
    rows, _ = rows_of(tmp_path / "train.csv", content)
    assert list(rows["label"]) == values
    assert list(rows["text"]) == ["12"] * 3


def test_a_late_word_counts_in_every_split(tmp_path):
    (tmp_path / "train.csv").write_text("text,label,other\na,1,TRUE\nb,2,false\n")
    (tmp_path / "val.csv").write_text("text,label,other\n" + "a,1,true\n" * 60_000 + "a,none,true\n")
    splits = read(tmp_path).splits
    assert list(splits["train"]["label"]) == ["1", "2"]
    assert splits["validation"]["label"][-1] == "none"
    assert list(splits["train"]["other"]) == [True, False]


def test_ids_and_scores_of_a_csv_are_read_as_before(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"t {i},{i % 2}\n" for i in range(20)))
    options = {"path": str(tmp_path / "train.csv"), "text": "text"}
    data = load_data(None, DataOptions(kind="classification", label_names=["ham", "spam"], **options))
    assert "0 is ham, 1 is spam" in " ".join(data.notes)
    assert set(data.splits["train"]["label"]) == {0, 1}
    scores = load_data(None, DataOptions(kind="regression", **options))
    assert set(scores.splits["train"]["label"]) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\na,ham\n"b,spam\nc,ham\n', "a quote that opens on line 3 never closes"),
        ('text,label\na,ham\n"b,ham\nc" d,ham\n', "lines 3 to 4: a quote opens or closes in the middle of a cell"),
        ('text,label\na,ham\nz,spam\n"b,ham\nc,spam\nd",ham\n', "a quote that opens on line 4 closes 2 lines later"),
        ('text,label\na,ham\nz,spam\n"b\nc,spam\nd",ham\n', "a quote that opens on line 4 closes 2 lines later"),
        ('label,text\nham,a\nspam,z\nham,"b\nspam,c"\n', "a quote that opens on line 4 closes 1 lines later"),
        ("text,label\na,ham\nb\n\nc\n", r"line 3 has 1 cells \(2 lines are like it\), and the header has 2 names"),
        ("text,label\n\n\na,b,ham\n", "line 4 has 3 cells, more cells than the header has names"),
        ("text,label,text\na,ham,b\n", "line 1 names column 'text' twice"),
        ("text,label\na,ham\nb\0,spam\n", "line 3 holds NUL bytes"),
        ("text,label\na,ham\n".encode("utf-16-le"), "NUL bytes: the file is damaged, no text, or UTF-16 without"),
        ("text,label\n\n", "the file holds no rows"),
        ('text,label\n"a,ham"\nb,spam\n', "line 3 is not one cell in quotes that holds several"),
    ],
)
def test_what_is_wrong_with_a_csv_is_told_with_its_line(tmp_path, content, message):
    with pytest.raises(InputError, match=f"train.csv: .*{message}"):
        rows_of(tmp_path / "train.csv", content)


def test_cells_of_several_lines_are_no_rows(tmp_path):
    rows, notes = rows_of(tmp_path / "train.csv", 'text,label\n"one, two\nthree, four\nfive",ham\nb,spam\nc,ham\n')
    assert list(rows["text"]) == ["one, two\nthree, four\nfive", "b", "c"]
    assert not notes


@pytest.mark.parametrize("header", ["label,text", "id,label,text", "label,text,note", "note,text,label"])
def test_cells_of_several_lines_stand_before_or_behind_the_label(tmp_path, header):
    names, text = header.split(","), '"Dear all\nthat is it\nbye"'
    cells = [{"id": "1", "label": label, "text": text, "note": text} for label in ("ham", "spam", "ham", "spam")]
    cells.append({"id": "2", "label": "ham", "text": "b", "note": "c"})
    content = "\n".join([header, *(",".join(row[name] for name in names) for row in [*cells, cells[-1], cells[-1]])])
    rows, _ = rows_of(tmp_path / "train.csv", content)
    assert list(rows["text"]) == ["Dear all\nthat is it\nbye"] * 4 + ["b"] * 3


@pytest.mark.parametrize("header", ["text", "text\tlabel, if any"])
def test_tabs_separate_in_a_tsv_where_its_header_leaves_it_open(tmp_path, header):
    rest = "\tham" * header.count("\t")
    rows, _ = rows_of(tmp_path / "train.tsv", f"{header}\none, two{rest}\nthree, four, five{rest}\n")
    assert list(rows["text"]) == ["one, two", "three, four, five"]


@pytest.mark.parametrize(
    ("content", "texts", "note"),
    [
        ('"text,label"\n"a ""b"", c,ham"\n"d,spam"\n', None, None),
        ('"text,label"\n"""a, b"",ham"\n"d,spam"\n', ["a, b", "d"], "every line stands in quotes as a whole"),
        ('text,label\n"a,ham"\n"d,spam"\n', ["a", "d"], "every line stands in quotes as a whole"),
        ('text,label\n"say \\"a\\", b",ham\nd,spam\n', ['say "a", b', "d"], "backslashes stand before quotes"),
        ('text\tlabel\n"a" b\tham\n"d\tspam\n', ['"a" b', '"d'], "quotes do not enclose cells"),
        ('text\tlabel\n"a b\tham\nc"\tspam\n', ['"a b', 'c"'], "quotes do not enclose cells"),
        ('text\tlabel\n"a\tb"\tham\nd\tspam\n', ["a\tb", "d"], ""),
        ("text, label\na, ham\nd, spam\n", ["a", "d"], ""),
        ("sep=;\ntext;label\na, b;ham\n", ["a, b"], ""),
        ("\n\ntext,label,\na,ham,\n,,\n \nd,spam,\n", ["a", "d"], "1 rows without a filled cell were left out"),
        ("text,label\ra,ham\rd,spam", ["a", "d"], ""),
        ("\ufefftext,label\r\na,ham\r\n\ufeffd,spam\r\n", ["a", "d"], ""),
    ],
)
def test_layouts_of_csv(tmp_path, content, texts, note):
    if texts is None:
        with pytest.raises(InputError, match="line 2 has 3 cells, more cells"):
            rows_of(tmp_path / "train.csv", content)
        return
    rows, notes = rows_of(tmp_path / "train.csv", content)
    assert list(rows["text"]) == texts
    assert list(rows["label"]) == ["ham", "spam"][: len(texts)]
    assert note in notes
    assert bool(note) == bool(notes)


def test_long_cells_are_read_and_the_process_keeps_its_limit(tmp_path):
    limit = csv.field_size_limit()
    rows, _ = rows_of(tmp_path / "train.csv", f"text,label\n{'a' * 200_000},ham\n")
    assert len(rows["text"][0]) == 200_000
    assert csv.field_size_limit() == limit


# --- encodings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.csv.gz"])
def test_encodings_that_can_be_told_are_read(tmp_path, encoding, name):
    text = "a café for “ten” £"
    row = f"{text},ham" if ".csv" in name else json.dumps({"text": text, "label": "ham"}, ensure_ascii=False)
    content = "\n".join(["text,label"] * (".csv" in name) + [row, ""]).encode(encoding)
    rows, notes = rows_of(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert list(rows["text"]) == [text]
    expected = {"cp1252": "1 lines are not UTF-8 and were read as cp1252", "utf-16": "read as UTF-16"}
    assert expected.get(encoding, "") in notes
    assert bool(notes) == (encoding not in ("utf-8", "utf-8-sig"))


def test_single_bytes_of_cp1252_leave_the_rest_as_it_is(tmp_path):
    content = "text,label\ncafé,ham\n".encode() + "a naïve “caf\u00e9”,spam\n".encode("cp1252")
    rows, notes = rows_of(tmp_path / "train.csv", content)
    assert list(rows["text"]) == ["café", "a naïve “café”"]
    assert "the first is line 3" in notes


@pytest.mark.parametrize(("encoding", "text"), [("shift_jis", "映画はとても良い"), ("cp1251", "очень хороший фильм")])
def test_other_encodings_are_refused_with_what_mends_them(tmp_path, encoding, text):
    with pytest.raises(InputError, match="line 2 is not UTF-8") as error:
        rows_of(tmp_path / "train.csv", f"text,label\n{text},ham\n".encode(encoding))
    command = re.search(r"iconv .* mv converted train.csv", str(error.value))
    subprocess.run(command[0].replace("ENCODING", encoding), shell=True, check=True, cwd=tmp_path)
    assert list(read(tmp_path).splits["train"]["text"]) == [text]


# --- json -----------------------------------------------------------------------------------------------------------


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def test_half_a_surrogate_pair_is_told_and_whole_ones_are_read(tmp_path):
    content = lines(r'{"text": "fun \ud83d\ude00", "label": "a"}', "", r'{"text": "cut \ud83d", "label": "b"}')
    rows, notes = rows_of(tmp_path / "train.jsonl", content)
    assert list(rows["text"]) == ["fun 😀", "cut �"]
    assert "1 rows of column 'text' hold half of a surrogate pair" in notes
    assert "the first is line 3" in notes


@pytest.mark.parametrize("late", [3, 60_000])
def test_a_column_of_numbers_and_words_is_text(tmp_path, late):
    rows = [{"text": "a", "label": i % 2} for i in range(late)] + [{"text": 7, "label": "n/a"}]
    found, notes = rows_of(tmp_path / "train.jsonl", lines(*rows))
    assert list(found["label"][:2]) == ["0", "1"]
    assert found["label"][-1] == "n/a"
    assert found["text"][-1] == "7"
    assert f"column 'label' holds numbers, from line {late + 1} on text too; all are read as text" in notes


def test_what_is_missing_is_no_text(tmp_path):
    rows = [{"text": "a", "label": value} for value in ("a", None, float("nan"), 1)]
    found, _ = rows_of(tmp_path / "train.jsonl", lines(*rows))
    assert list(found["label"]) == ["a", None, None, "1"]


def test_json_gives_columns_their_types(tmp_path):
    rows = [
        {"text": "2020-01-01", "label": 1, "score": 1, "tags": [], "far": 10**30, "mixed": {"a": 1}},
        {"text": "007", "label": 0, "score": 0.5, "tags": ["a"], "far": 1, "mixed": "b"},
        {"text": "x", "label": 2},
    ]
    found, notes = rows_of(tmp_path / "train.jsonl", lines(*rows))
    assert list(found["text"]) == ["2020-01-01", "007", "x"]
    assert list(found["label"]) == [1, 0, 2]
    assert list(found["score"]) == [1.0, 0.5, None]
    assert list(found["tags"]) == [[], ["a"], None]
    assert list(found["mixed"]) == ['{"a": 1}', '"b"', None]
    assert not notes


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.json.gz"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_of_rows_is_read(tmp_path, name, indent):
    for content in (ROWS, {"version": 1, "data": ROWS}):
        raw = json.dumps(content, indent=indent).encode()
        if isinstance(content, dict) and not (indent or ".jsonl" not in name):
            continue  # a line of jsonl is a row
        if isinstance(content, dict) and indent is None:
            continue
        rows, _ = rows_of(tmp_path / name, gzip.compress(raw) if name.endswith(".gz") else raw)
        assert rows.to_list() == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(ROWS[0], '{"text": "a"'), r"cannot be read as jsonl \(line 2: "),
        (lines(ROWS[0], ["a", "ham"]), "line 2 is no object with a value for each column, but lists"),
        (lines(ROWS[0], '{"text": "a", "text": "b", "label": "c"}'), "line 2: key 'text' stands twice"),
        (lines({"text": ["a", ["b"]], "label": "ham"}), "column 'text' holds nested values beside plain ones"),
        (lines(ROWS[0], {"text": ["a"], "label": "ham"}), "column 'text' holds text at first, but lists on line 2"),
    ],
)
def test_what_is_wrong_with_a_jsonl_is_told_with_its_line(tmp_path, content, message):
    with pytest.raises(InputError, match=f"train.jsonl: .*{message}"):
        rows_of(tmp_path / "train.jsonl", content)


# --- parquet --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.string()]
)
@pytest.mark.parametrize("lists", [pa.large_list, pa.list_view, pa.large_list_view, pa.list_])
def test_parquet_is_read_whoever_wrote_it(tmp_path, text, lists):
    words = [["a", "film"], ["bad"]]
    tags = [[0, 1], [1]]
    inner = text if not pa.types.is_dictionary(text) else pa.large_string()
    table = pa.table(
        {"tokens": pa.array(words, lists(inner)), "label": pa.array(tags, lists(pa.int8())), "text": ["a", "b"]}
    )
    table = table.set_column(2, "text", table["text"].cast(text))
    folder = tmp_path / "lang=en"  # no column, as a partition of hive would be
    folder.mkdir()
    pa.parquet.write_table(table, folder / "train.parquet")
    rows = read(folder / "train.parquet", own_task("token-classification", ("tokens",), "label")).splits["train"]
    assert rows.features["text"] == datasets.Value("string")
    assert rows.features["tokens"] == datasets.List(datasets.Value("string"))
    assert isinstance(rows.features["label"], datasets.List)
    assert rows.to_list() == [{"tokens": w, "label": t, "text": x} for w, t, x in zip(words, tags, "ab", strict=True)]


def test_a_column_of_parquet_that_stands_twice_is_told(tmp_path):
    table = pa.table([["a"], ["b"], ["c"]], names=["text", "label", "text"])
    pa.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(InputError, match="column 'text' stands there twice"):
        read(tmp_path)


def test_class_labels_of_parquet_keep_their_names(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("large_string"), "label": datasets.ClassLabel(names=["n", "p"])}
    )
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(
        str(tmp_path / "train.parquet")
    )
    rows = read(tmp_path).splits["train"]
    assert rows.features["label"].names == ["n", "p"]
    assert rows.features["text"] == datasets.Value("string")


# --- files of a folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val", "valid", "dev", "eval", "Dev"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".csv.gz", ".tsv.bz2", ".csv.xz"])
def test_validation_files_under_their_other_names(tmp_path, name, suffix):
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    content = lines(*ROWS).encode() if "json" in suffix else as_csv(ROWS).encode()
    content = packed.get(f".{suffix.split('.')[-1]}", bytes)(content)
    (tmp_path / f"train{suffix}").write_bytes(content)
    (tmp_path / f"{name}{suffix}").write_bytes(content)
    data = load_data(None, DataOptions(kind="classification", path=str(tmp_path)))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 20, "validation": 20}
    assert f"validation: {name}{suffix}" in data.notes


@pytest.mark.parametrize(
    "names", [("val.csv", "dev.csv"), ("validation.csv", "validation.jsonl"), ("dev.csv", "dev-1.csv")]
)
def test_several_validation_files_are_told(tmp_path, names):
    for name in ("train.csv", *names):
        (tmp_path / name).write_text(as_csv(ROWS))
    with pytest.raises(InputError, match=r"and each could be the validation split; keep one of them") as error:
        read(tmp_path)
    assert all(name in str(error.value) for name in names)


def test_files_that_are_not_read_are_told(tmp_path):
    for name in ("train.csv", "val.xlsx"):
        (tmp_path / name).write_text(as_csv(ROWS))
    assert "val.xlsx is not read" in " ".join(read(tmp_path).notes)


@pytest.mark.parametrize("inside", ["", "data"])
@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["train-00000-of-00002-ab12.parquet", "train-00001-of-00002-cd34.parquet"],
        ["train9.parquet", "train10.parquet"],
        ["train_part_0.parquet", "train_part_1.parquet"],
        ["train/b.parquet", "train/c.parquet"],
        ["train-0.csv", "train-1.csv"],
    ],
)
def test_shards_are_one_split(tmp_path, inside, names):
    for number, name in enumerate(names):
        path = tmp_path / inside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = datasets.Dataset.from_list(ROWS[number * 10 : number * 10 + 10])
        part.to_csv(str(path)) if name.endswith(".csv") else part.to_parquet(str(path))
    (tmp_path / inside / "dev-00000-of-00001.jsonl").write_text(lines(*ROWS[:4]))
    found = read(tmp_path)
    assert found.splits["train"].to_list() == ROWS
    assert len(found.splits["validation"]) == 4
    assert "train: 2 files read as one" in " ".join(found.notes)


def test_a_missing_shard_is_told(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "train-00000-of-00002.parquet"))
    with pytest.raises(InputError, match="holds 1 of the 2 files of the train split"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["data [x]", "data*q?", "a{b,c}"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_paths_are_no_patterns(tmp_path, name, suffix):
    for folder in (tmp_path / name, tmp_path / "data x"):
        folder.mkdir(exist_ok=True)
        rows = datasets.Dataset.from_list(ROWS)
        {".csv": rows.to_csv, ".jsonl": rows.to_json, ".parquet": rows.to_parquet}[suffix](
            str(folder / f"train{suffix}")
        )
    assert read(tmp_path / name).splits["train"].to_list() == ROWS


# --- test splits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "why"),
    [
        ({}, "it has no column 'label'"),
        ({"label": -1}, "its labels are hidden"),
        ({"label": None}, "its labels are hidden"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_test_split_without_labels_is_left_out_and_told(tmp_path, hidden, why, suffix):
    rows = [{"text": row["text"], "label": i % 2} for i, row in enumerate(ROWS)]
    for split, of_split in (("train", rows), ("dev", rows), ("test", [{"text": r["text"], **hidden} for r in rows])):
        table = datasets.Dataset.from_list(of_split)
        (table.to_csv if suffix == ".csv" else table.to_json)(str(tmp_path / f"{split}{suffix}"))
    data = load_data(None, DataOptions(kind="classification", path=str(tmp_path)))
    assert sorted(data.splits) == ["train", "validation"]
    assert f"the test split (20 rows) is left out: {why}" in data.notes


def test_a_test_split_alone_is_scored(tmp_path):
    write_rows(tmp_path / "test.jsonl", ROWS)
    options = DataOptions(kind="classification", path=str(tmp_path))
    data = load_data(None, options, to_score=True)
    assert data.scored_splits() == [("validation", "", "")]
    assert len(data.splits["validation"]) == 20
    assert "the rows of the test split are scored" in " ".join(data.notes)
    with pytest.raises(InputError, match=r"no train split in .*; found test"):
        load_data(None, options)
    write_rows(tmp_path / "test.jsonl", [{"text": row["text"]} for row in ROWS])
    with pytest.raises(InputError, match=r"no labelled rows to score .*it has no column 'label'"):
        load_data(None, options, to_score=True)


def test_validation_alone_is_scored_and_not_trained_on(tmp_path):
    write_rows(tmp_path / "dev.jsonl", ROWS)
    options = DataOptions(kind="classification", path=str(tmp_path))
    assert len(load_data(None, options, to_score=True).splits["validation"]) == 20
    with pytest.raises(InputError, match=r"no train split in .*; found validation"):
        load_data(None, options)
