"""The trim_vocabulary verb in whole runs: pairs, tagged words and language models, with distill and quantize on top."""

import json
import string
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

from distill import cli, prune_model
from distill.common.records import read_record
from distill.compression.vocabulary import trim_vocabulary
from distill.data.fingerprints import token_fingerprint
from distill.errors import InputError
from distill.models.load import load_tokenizer, size_on_disk
from distill.recipes.check import estimate_step
from distill.recipes.finished import is_finished
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.report import write_report
from distill.runs.run import run_plan
from tests.conftest import BAD, GOOD, OTHER, WORDS, make_tokenizer, sentences, tiny_bert, tiny_config, write_rows

RARE = ["zebra", "quartz"]
UNUSED = [f"{letter}unused" for letter in string.ascii_lowercase]
ALWAYS = 5 + 26 + 26  # special tokens, letters, and letters within a word

STEPS = """
  teacher: {run: finetune, model: START, max_steps: 30, learning_rate: 2e-3}
  trimmed: {run: trim_vocabulary, model: teacher, vocab_size: 74}
  student: {run: distill, teacher: teacher, model: trimmed, num_layers: 2, max_steps: 3}
  small: {run: quantize, model: student, format: int8}
"""


def word_pieces():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [f"##{letter}" for letter in string.ascii_lowercase]
    tokens = dict.fromkeys([*special, *string.ascii_lowercase, *pieces, *UNUSED, *RARE, *WORDS])  # "a" stands twice
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})


def save_start(folder, head, **settings):
    tokenizer = word_pieces()
    sizes = {"vocab_size": len(tokenizer) + 3, "num_hidden_layers": 4, "initializer_range": 0.2, **settings}
    getattr(transformers, f"BertFor{head}")(tiny_config(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder, data, steps, **places):
    for name, place in places.items():
        steps = steps.replace(name.upper(), str(place))
    path = folder / "r.yaml"
    path.write_text(
        f"output_dir: {folder / 'run'}\ndata: {{{data}}}\n"
        "benchmark: {sequence_length: 16, throughput_batch_size: 2, rounds: 1}\n"
        f"steps:{steps}"
    )
    return path


def pairs_of(count, seed):
    """Rows of two texts, every tenth with a word that no other has."""
    rows = zip(sentences(count, seed), sentences(count, seed + 1), strict=True)
    return [
        {"a": first["sentence"] + (f" {RARE[seed % 2]}" if number % 10 == 0 else ""), "b": second["sentence"],
         "label": ("no", "yes")[first["label"]]}
        for number, (first, second) in enumerate(rows)
    ]  # fmt: skip


PAIRS = "kind: classification, path: DATA, text: [a, b], max_length: 48"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Rows of pairs, and a model to start from; the rare word of the validation rows stands in no training row."""
    folder = tmp_path_factory.mktemp("pairs")
    write_rows(folder / "data" / "train.jsonl", pairs_of(80, seed=0))
    write_rows(folder / "data" / "validation.jsonl", pairs_of(40, seed=7))
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    return {"start": save_start(folder / "start", "SequenceClassification", **names), "data": folder / "data"}


def of_pairs(folder, places, steps=STEPS, overrides=None, data=PAIRS):
    path = write_recipe(folder, data.replace("DATA", str(places["data"])), steps, start=places["start"])
    return make_plan(load_recipe(path, overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, places):
    made = of_pairs(tmp_path_factory.mktemp("runs"), places)
    run_plan(made)
    return made


def test_the_tokens_that_stay_are_those_of_the_plain_function(finished, places):
    folder = finished.steps["trimmed"].folder
    teacher = AutoModelForSequenceClassification.from_pretrained(finished.steps["teacher"].folder)
    rows = [json.loads(line) for line in (places["data"] / "train.jsonl").read_text().splitlines()]
    texts = [(row["a"], row["b"]) for row in rows]
    model, tokenizer = trim_vocabulary(teacher, word_pieces(), texts, vocab_size=74)
    loaded, trimmed = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert trimmed.get_vocab() == tokenizer.get_vocab()
    assert len(trimmed) == loaded.config.vocab_size == 80  # a multiple of 8
    assert {*GOOD, *BAD, *OTHER, RARE[0]} <= trimmed.get_vocab().keys()
    assert RARE[1] not in trimmed.get_vocab()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


_PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
pairs, *folders = json.load(sys.stdin)
logits = []
for folder in folders:
    inputs = AutoTokenizer.from_pretrained(folder)(*pairs, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits.append(AutoModelForSequenceClassification.from_pretrained(folder).eval()(**inputs).logits)
assert "distill" not in sys.modules
print(float((logits[0] - logits[1]).abs().max()), float(logits[0].std()))
"""


def test_plain_transformers_reads_the_folder_and_computes_the_same(finished):
    rows = [row for row in pairs_of(40, seed=7) if RARE[1] not in row["a"]]
    columns = [[row[name] for row in rows] for name in ("a", "b")]
    given = json.dumps([columns, *(str(finished.steps[name].folder) for name in ("trimmed", "teacher"))])
    done = subprocess.run([sys.executable, "-c", _PLAIN], input=given, capture_output=True, text=True, check=True)
    difference, spread = map(float, done.stdout.split())
    assert difference == 0.0
    assert spread > 0.1


def test_check_says_what_the_step_makes(finished, capsys):
    planned = finished.steps["trimmed"]
    expected = estimate_step(finished, planned)
    header = int.from_bytes((planned.folder / "model.safetensors").read_bytes()[:8], "little") + 8
    assert size_on_disk(planned.folder) == expected.weight_bytes + header
    assert planned.plan.config.vocab_size == 80
    # Later steps are planned with the very tokenizer, which lies elsewhere before the step has run.
    before, after = (load_tokenizer(str(place)) for place in (planned.plan.tokenizer_location, planned.folder))
    assert planned.plan.tokenizer_location != str(planned.folder)
    assert token_fingerprint(before) == token_fingerprint(after)
    assert finished.steps["student"].plan.inputs["model"].tokenizer_location == planned.plan.tokenizer_location

    assert cli.main(["check", str(finished.recipe.path)]) == 0
    said = capsys.readouterr().out
    assert f"{len(word_pieces()) + 3} → 80 tokens of the vocabulary, chosen by " in said
    assert "trimmed: trim_vocabulary of teacher" in said
    assert cli.main(["run", str(finished.recipe.path)]) == 0
    assert "trimmed: finished already" in capsys.readouterr().err


def test_what_was_touched_is_recorded_and_told(finished):
    record = read_record(finished.steps["trimmed"].folder)
    rows = pairs_of(40, seed=7)
    tokens = sum(len(f"{row['a']} {row['b']}".split()) for row in rows)
    assert record["decided"] == {
        "vocab_size_before": len(word_pieces()) + 3,
        "vocab_size": 80,
        "tokens": sum(len(f"{row['a']} {row['b']}".split()) for row in pairs_of(80, seed=0)),
        "touched": {"validation": {"rows": 40, "touched_rows": 4, "tokens": tokens, "touched_tokens": 4}},
    }
    write_report(finished)
    card = ModelCard.load(finished.steps["trimmed"].folder / "README.md")
    assert f"Vocabulary: {len(word_pieces()) + 3} → 80 tokens (`vocab_size: 74`)" in card.text
    assert "Tokens that are gone stand in 10.0% of the validation rows" in card.text
    assert "`teacher` with a vocabulary of the tokens that the training rows use most" in card.text
    assert "trim_vocabulary" in card.data.tags
    of_student = ModelCard.load(finished.steps["small"].folder / "README.md").text
    assert "`trimmed` (trim_vocabulary)" in of_student
    assert "### trimmed" in of_student


def test_a_student_learns_from_a_teacher_with_all_tokens_and_is_quantized(finished):
    entries = {each["name"]: each for each in asdict(write_report(finished))["models"]}
    assert list(entries) == ["teacher", "trimmed", "student", "small"]
    assert entries["trimmed"]["agreement"] > 0.85  # on all rows but those with the word that is gone
    for name in ("student", "small"):
        assert load_tokenizer(str(finished.steps[name].folder)).get_vocab().keys() == (
            load_tokenizer(str(finished.steps["trimmed"].folder)).get_vocab().keys()
        )
        assert entries[name]["divergence"]["mean"] >= 0
    compared = make_plan(load_recipe(finished.recipe.path, {"student.hidden_weight": "1.0"}))
    assert not compared.steps["student"].plan.same_tokens  # rows that both read alike are compared


@pytest.mark.parametrize("limit", ["coverage: 0.9", "min_count: 20"])
def test_the_size_that_was_decided_gives_the_same_model(tmp_path, places, limit):
    step = "\n  MADE: {run: trim_vocabulary, model: START, LIMIT}\n".replace("LIMIT", limit)
    first = of_pairs(tmp_path, places, step.replace("MADE", "a"))
    run_plan(first)
    record = read_record(first.steps["a"].folder)
    size = record["decided"]["vocab_size"]
    assert ALWAYS < size < len(word_pieces())
    again = of_pairs(tmp_path, places, step.replace("MADE", "b").replace(limit, f"vocab_size: {size}"))
    run_plan(again)
    for file in ("model.safetensors", "tokenizer.json"):
        assert (first.steps["a"].folder / file).read_bytes() == (again.steps["b"].folder / file).read_bytes()


def test_rows_without_labels_and_more_texts_are_counted_and_stand_in_the_fingerprint(tmp_path, places):
    step = "\n  a: {run: trim_vocabulary, model: START, min_count: 30MORE}\n"
    unlabelled = write_rows(tmp_path / "u.jsonl", [{"a": "bunused cunused", "b": RARE[1]}] * 30)
    text = write_rows(tmp_path / "t.jsonl", [{"number": 1, "words": "dunused"}] * 30)
    of_rows = PAIRS + f", unlabelled: {unlabelled}"
    plain = of_pairs(tmp_path, places, step.replace("MORE", "")).steps["a"]
    more = of_pairs(tmp_path, places, step.replace("MORE", ""), data=of_rows).steps["a"]
    texts = of_pairs(tmp_path, places, step.replace("MORE", f", text: {text}"), data=of_rows).steps["a"]
    added = [
        {*load_tokenizer(big.plan.tokenizer_location).get_vocab()}
        - {*load_tokenizer(small.plan.tokenizer_location).get_vocab()}
        for small, big in ((plain, more), (more, texts))
    ]
    assert added[0] >= {"bunused", "cunused", RARE[1]}
    assert added[1] >= {"dunused"}
    assert texts.plan.counted == more.plan.counted + 30 == plain.plan.counted + 120
    assert len({planned.fingerprint for planned in (plain, more, texts)}) == 3

    write_rows(text, [{"number": 1, "words": "dunused"}] * 31)
    other = of_pairs(tmp_path, places, step.replace("MORE", f", text: {text}"), data=of_rows).steps["a"]
    assert other.fingerprint != texts.fingerprint


def test_other_rows_or_options_make_the_step_anew(tmp_path, finished):
    assert is_finished(finished.steps["trimmed"])
    for overrides in ({"trimmed.vocab_size": "64"}, {"data.max_train_rows": "40"}, {"data.max_length": "40"}):
        changed = make_plan(load_recipe(finished.recipe.path, overrides))
        assert not is_finished(changed.steps["trimmed"])
    scored = make_plan(load_recipe(finished.recipe.path, {"data.max_eval_rows": "10"}))
    assert is_finished(scored.steps["trimmed"])


@pytest.mark.parametrize(
    ("steps", "problems"),
    [
        ("a: {run: trim_vocabulary, model: START, vocab_size: 24}",
         [f"steps.a.vocab_size: 24 is too few; {ALWAYS} tokens always stay"]),
        ("a: {run: trim_vocabulary, model: START, vocab_size: 5000}",
         ["steps.a.vocab_size: 5,000 is more than the"]),
        ("a: {run: trim_vocabulary, model: START}", ["say exactly one of vocab_size, coverage and min_count"]),
        ("a: {run: trim_vocabulary, model: START, coverage: 0.9, min_count: 2}", ["coverage, min_count: say exactly"]),
        ("a: {run: trim_vocabulary, model: START, coverage: 95}", ["steps.a.coverage: 95.0 is no share of the tokens"]),
        ("a: {run: trim_vocabulary, model: START, coverage: 0.9, text: /no/such.txt}", ["steps.a.text: "]),
        ("a: {run: trim_vocabulary, model: START, coverage: 0.9, text: NUMBERS}",
         ["has no column of texts; it has number"]),
        ("q: {run: quantize, model: START, format: nf4}\n  a: {run: trim_vocabulary, model: q, vocab_size: 80}",
         ["steps.a.model: q is quantized; start from the model it was made from (START)"]),
        ("a: {run: trim_vocabulary, model: WHOLE_WORDS, coverage: 0.9}",
         ["steps.a.model: its tokenizer: a WordLevel vocabulary cannot be trimmed"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_before_anything_runs(tmp_path, places, steps, problems):
    numbers = write_rows(tmp_path / "numbers.jsonl", [{"number": 3}])
    whole = tmp_path / "whole"
    tiny_bert(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}).save_pretrained(whole)
    make_tokenizer().save_pretrained(whole)
    steps = steps.replace("NUMBERS", str(numbers)).replace("WHOLE_WORDS", str(whole))
    with pytest.raises(InputError) as error:
        of_pairs(tmp_path, places, f"\n  {steps}\n")
    for found, problem in zip(error.value.problems, problems, strict=True):
        assert problem.replace("START", str(places["start"])) in found


def test_a_pruned_model_keeps_its_structure(tmp_path, places):
    model = prune_model(AutoModelForSequenceClassification.from_pretrained(places["start"]), heads=[4, 2, 2, 0],
                        neurons=[128, 32, 64, 96], importance="magnitude", reconstruct=False)  # fmt: skip
    pruned = tmp_path / "pruned"
    model.save_pretrained(pruned)
    word_pieces().save_pretrained(pruned)
    made = of_pairs(
        tmp_path, {**places, "start": pruned}, "\n  a: {run: trim_vocabulary, model: START, vocab_size: 80}\n"
    )
    expected = estimate_step(made, made.steps["a"])
    run_plan(made)
    folder = made.steps["a"].folder
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little") + 8
    assert size_on_disk(folder) - header == pytest.approx(expected.weight_bytes, abs=100)  # a byte for what is left out
    trimmed = AutoModelForSequenceClassification.from_pretrained(folder)
    texts = [f"{row['a']} {row['b']}" for row in pairs_of(30, seed=0)]
    logits = []
    for each, tokenizer in ((model, word_pieces()), (trimmed, AutoTokenizer.from_pretrained(folder))):
        with torch.no_grad():
            logits.append(each.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits)
    assert torch.equal(*logits)


def test_images_have_no_vocabulary(tmp_path):
    from PIL import Image

    for split, count in (("train", 8), ("validation", 4)):
        for name in ("red", "blue"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), name).save(folder / f"{number}.png")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16, id2label={0: "blue", 1: "red"})
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    path = write_recipe(
        tmp_path,
        f"kind: image-classification, path: {tmp_path / 'images'}",
        f"\n  a: {{run: trim_vocabulary, model: {tmp_path / 'vit'}, vocab_size: 80}}\n",
    )
    with pytest.raises(InputError, match=r"a\.model: .*vit reads images, so it has no vocabulary; leave the step out"):
        make_plan(load_recipe(path))


def test_tagged_words(tmp_path):
    """Words come one by one, and are counted as the tokens that they become."""
    rows = [
        {"tokens": [*row["sentence"].split(), *([RARE[0]] if number == 0 else [])],
         "label": ["O"] * len(row["sentence"].split()) + ["B-X"] * (number == 0)}
        for number, row in enumerate(sentences(60))
    ]  # fmt: skip
    rows[1]["label"][0] = "B-X"
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "validation.jsonl", rows[:20])
    start = save_start(tmp_path / "start", "TokenClassification")
    data = f"kind: token-classification, path: {tmp_path / 'data'}, max_length: 24"
    steps = STEPS.replace("vocab_size: 74", "min_count: 2")
    path = write_recipe(tmp_path, data, steps, start=start)
    with pytest.raises(InputError, match="its tokenizer is not that of teacher"):
        make_plan(load_recipe(path))
    made = make_plan(load_recipe(path, {"student.teacher": "trimmed"}))
    run_plan(made)
    decided = read_record(made.steps["trimmed"].folder)["decided"]
    assert decided["tokens"] == sum(len(row["tokens"]) for row in rows)
    assert decided["touched"]["validation"]["touched_rows"] in (0, 1)  # filled up to a multiple of 8
    entries = {each["name"]: each for each in asdict(write_report(made))["models"]}
    assert entries["trimmed"]["agreement"] > 0.9
    assert entries["small"]["agreement"] is not None


def test_language_models_learn_from_a_trimmed_teacher(tmp_path):
    for split, count in (("train", 60), ("validation", 20)):
        rows = [{"text": row["sentence"]} for row in sentences(count, seed=count)]
        rows[0]["text"] = " ".join([rows[0]["text"], *[RARE[split == "validation"]] * 3])
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    start = save_start(tmp_path / "start", "MaskedLM")
    data = f"kind: masked-lm, path: {tmp_path / 'data'}, max_length: 24"
    path = write_recipe(tmp_path, data, STEPS, start=start)
    with pytest.raises(InputError, match="its tokenizer is not that of teacher, and masked-lm compares what both read"):
        make_plan(load_recipe(path))
    made = make_plan(load_recipe(path, {"student.teacher": "trimmed"}))
    estimate_step(made, made.steps["student"])
    run_plan(made)
    assert read_record(made.steps["trimmed"].folder)["decided"]["touched"]["validation"]["touched_rows"] == 1
    model = transformers.AutoModelForMaskedLM.from_pretrained(made.steps["student"].folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.shape[0] == 80
    # Perplexities over other tokens don't compare.
    report = asdict(write_report(made))
    assert report["comparisons"] == []  # of the student and the one trained teacher
    entries = {each["name"]: each for each in report["models"]}
    of_teacher, of_student = (entries[name]["agreement"] for name in ("teacher", "student"))
    assert made.baseline == "trimmed"
    assert of_teacher is None
    assert of_student is not None
    assert [entries[name]["retention"] is None for name in ("teacher", "trimmed", "student")] == [True, False, False]


def test_no_folder_names_another_place(finished):
    for file in Path(finished.steps["trimmed"].folder).glob("*.json"):
        if file.name != "step.json":
            assert "/tmp" not in file.read_text()
