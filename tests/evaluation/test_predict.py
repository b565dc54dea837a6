"""`distill predict`: what each kind says of rows without labels, as `pipeline` does, in the order of the rows."""

import csv
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import pipeline

import distill.evaluation.predict as module
from distill.cli import main
from distill.evaluation.predict import predict_lines
from distill.models.load import find_model, load_classifier, load_processor
from distill.recipes.rows import rows_to_predict
from tests.conftest import GOOD, OTHER, WORDS, make_tokenizer, tiny_config, write_rows


def gpt2():
    size = {"vocab_size": len(WORDS) + 5, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**size, initializer_range=0.3, bos_token_id=2, eos_token_id=3)
    )


def vit(names):
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**size, image_size=8, patch_size=4, id2label=names, initializer_range=0.3)
    return transformers.ViTForImageClassification(config)


def bert(head, names=None, **settings):
    labels = {} if names is None else {"id2label": names, "label2id": {name: key for key, name in names.items()}}
    config = tiny_config(num_hidden_layers=2, initializer_range=0.4, **labels, **settings)
    return getattr(transformers, f"BertFor{head}")(config)


CLASSES, TAGS = {0: "negative", 1: "neutral", 2: "positive"}, {0: "O", 1: "B-X", 2: "I-X"}
MODELS = {
    "classification": lambda: bert("SequenceClassification", CLASSES),
    "multi-label": lambda: bert("SequenceClassification", CLASSES, problem_type="multi_label_classification"),
    "regression": lambda: bert("SequenceClassification", {0: "score"}, problem_type="regression"),
    "token-classification": lambda: bert("TokenClassification", TAGS),
    "question-answering": lambda: bert("QuestionAnswering"),
    "masked-lm": lambda: bert("MaskedLM"),
    "causal-lm": gpt2,
    "image-classification": lambda: vit(CLASSES),
}


def texts(count, seed=0, longest=20):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, int(generator.integers(1, longest)))) for _ in range(count)]


def rows_of(kind, folder):
    found = texts(70)
    if kind == "token-classification":
        return [{"tokens": text.split()} for text in found]
    if kind == "question-answering":
        return [{"question": "was the film", "context": text} for text in found]
    if kind == "masked-lm":
        return [{"text": f"{text} [MASK] a {'[MASK] film' * (len(text) % 2)}"} for text in found]
    if kind == "causal-lm":
        return [{"text": f"a {text}"} for text in found]
    if kind == "image-classification":
        pixels = np.random.default_rng(0).integers(0, 255, (12, 9, 9, 3)).astype(np.uint8)
        for number, each in enumerate(pixels):
            Image.fromarray(each).save(folder / f"{number}.png")
        return [{"image": f"{number}.png"} for number in range(len(pixels))]
    return [{"text": text} for text in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    for kind, make in MODELS.items():
        torch.manual_seed(0)
        (folder / kind).mkdir()
        make().eval().save_pretrained(folder / kind)
        if kind == "image-classification":
            transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / kind)
        else:
            tokenizer = make_tokenizer()
            tokenizer.model_max_length = 64
            tokenizer.save_pretrained(folder / kind)
        write_rows(folder / f"{kind}.jsonl", rows_of(kind, folder))
    return folder


def predict(folder, kind, *more, output="out.jsonl"):
    arguments = ["predict", folder / kind, "--data.path", folder / f"{kind}.jsonl", "--output", output, *more]
    return main([str(each) for each in arguments])


def lines_of(folder, kind, **changes):
    source = find_model(str(folder / kind))
    wanted = rows_to_predict(source, None, {"path": str(folder / f"{kind}.jsonl"), **changes.pop("data", {})})
    model, processor = load_classifier(source.location, wanted.new.task), load_processor(source.location, kind)
    return list(predict_lines(model, processor, wanted.new, wanted.encoded(processor, model.config), **changes))


def given(folder, kind):
    return [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]


def near(value, expected):
    assert value == pytest.approx(expected, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("kind", ["classification", "multi-label", "regression", "image-classification"])
def test_predictions_are_those_of_pipeline(folder, tmp_path, kind):
    assert predict(folder, kind, output=tmp_path / "out.jsonl") == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model = load_classifier(
        str(folder / kind),
        rows_to_predict(find_model(str(folder / kind)), None, {"path": str(folder / f"{kind}.jsonl")}).new.task,
    )
    processor = load_processor(str(folder / kind), kind)
    if kind == "image-classification":
        shown = pipeline(kind, model=model, image_processor=processor)
        expected = [shown(str(folder / row["image"]), top_k=3) for row in given(folder, kind)]
    else:
        shown = pipeline("text-classification", model=model, tokenizer=processor)
        more = {"function_to_apply": "none"} if kind == "regression" else {"top_k": None}
        expected = [shown([row["text"]], truncation=True, **more)[0] for row in given(folder, kind)]
    assert len(lines) == len(expected)
    for line, of_row in zip(lines, expected, strict=True):
        if kind == "regression":
            near(line["score"], of_row["score"])
            continue
        scores = {each["label"]: each["score"] for each in of_row}
        near(line["probabilities"], scores)
        if kind == "multi-label":
            assert line["labels"] == [name for name in CLASSES.values() if scores[name] > 0.5]
        else:
            assert line["label"] == max(scores, key=scores.get)


def test_each_word_has_the_tag_that_pipeline_gives_it(folder):
    shown = pipeline("token-classification", str(folder / "token-classification"), ignore_labels=[])
    for line, row in zip(lines_of(folder, "token-classification"), given(folder, "token-classification"), strict=True):
        expected = shown(" ".join(row["tokens"]))
        assert [each["word"] for each in line["words"]] == row["tokens"]
        assert [each["tag"] for each in line["words"]] == [each["entity"] for each in expected]
        near([each["score"] for each in line["words"]], [float(each["score"]) for each in expected])


def test_words_that_are_not_read_have_no_tag(folder):
    lines = lines_of(folder, "token-classification", data={"max_length": 4})
    for line, row in zip(lines, given(folder, "token-classification"), strict=True):
        tags = [each["tag"] for each in line["words"]]
        assert [each["word"] for each in line["words"]] == row["tokens"]
        assert None not in tags[:2]
        assert set(tags[2:]) <= {None}


def test_answers_are_the_best_spans_with_their_probabilities(folder):
    """The windows hold the whole context here, so that a plain search over all pairs of words is the right answer."""
    model = transformers.BertForQuestionAnswering.from_pretrained(folder / "question-answering").eval()
    tokenizer = make_tokenizer()
    for line, row in zip(lines_of(folder, "question-answering"), given(folder, "question-answering"), strict=True):
        words = row["context"].split()
        inputs = tokenizer(row["question"], row["context"], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        places = [0, *range(5, 5 + len(words))]  # [CLS] was the film [SEP] …
        start, end = (
            torch.softmax(logits[0, places].double(), 0) for logits in (outputs.start_logits, outputs.end_logits)
        )
        pairs = [(first, last) for first in range(len(words)) for last in range(first, len(words))]
        first, last = max(pairs, key=lambda pair: float(start[1 + pair[0]] * end[1 + pair[1]]))
        assert line["answer"] == " ".join(words[first : last + 1]) == row["context"][line["start"] : line["end"]]
        near(line["score"], float(start[1 + first] * end[1 + last]))
        near(line["no_answer_score"], float(start[0] * end[0]))


def test_a_long_context_is_answered_from_all_of_its_windows(folder):
    whole = lines_of(folder, "question-answering")
    cut = lines_of(folder, "question-answering", data={"max_length": 14, "stride": 2})
    assert len(whole) == len(cut)
    assert all(line["answer"] for line in cut)


def test_masks_are_filled_as_by_pipeline(folder):
    shown = pipeline("fill-mask", str(folder / "masked-lm"))
    for line, row in zip(lines_of(folder, "masked-lm"), given(folder, "masked-lm"), strict=True):
        expected = shown(row["text"])
        expected = expected if isinstance(expected[0], list) else [expected]
        assert [[each["token"] for each in mask] for mask in line["fillings"]] == [
            [each["token_str"] for each in mask] for mask in expected
        ]
        for mask, of_mask in zip(line["fillings"], expected, strict=True):
            near([each["score"] for each in mask], [each["score"] for each in of_mask])


def test_a_text_without_a_mask_is_refused(folder, tmp_path, capsys):
    write_rows(tmp_path / "masked-lm.jsonl", [{"text": "a [MASK] film"}, {"text": "a film"}])
    command = [
        "predict",
        folder / "masked-lm",
        "--data.path",
        tmp_path / "masked-lm.jsonl",
        "--output",
        tmp_path / "o.csv",
    ]
    assert main([str(each) for each in command]) == 2
    assert "row 1 holds no [MASK]" in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()


def test_perplexity_is_that_of_the_models_loss(folder, tmp_path):
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "causal-lm").eval()
    tokenizer = make_tokenizer()
    for line, row in zip(lines_of(folder, "causal-lm"), given(folder, "causal-lm"), strict=True):
        inputs = tokenizer(row["text"], return_tensors="pt")
        ids = inputs["input_ids"]
        with torch.no_grad():
            loss = float(model(**inputs, labels=ids).loss)
        near(line["perplexity"], np.exp(loss))
        assert line["tokens"] == ids.shape[1] - 1
        near(line["nll"], loss * line["tokens"])


def test_a_text_that_says_nothing_has_no_perplexity(folder, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"text": "a film"}, {"text": ""}, {"text": "a plot"}])
    lines = lines_of(folder, "causal-lm", data={"path": str(tmp_path / "rows.jsonl")})
    assert lines[1] == {"perplexity": None, "nll": 0.0, "tokens": 0}
    assert lines[0]["tokens"] == lines[2]["tokens"] == 3


def flat(value):
    if isinstance(value, dict):
        return [each for inner in value.values() for each in flat(inner)]
    return [each for inner in value for each in flat(inner)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("kind", MODELS)
def test_neither_the_batch_size_nor_the_grouping_changes_a_line(folder, monkeypatch, kind):
    whole = lines_of(folder, kind)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 9)
    for other in (lines_of(folder, kind, batch_size=1), lines_of(folder, kind, batch_size=5)):
        assert len(other) == len(whole)
        for line, expected in zip(other, whole, strict=True):
            for value, wanted in zip(flat(line), flat(expected), strict=True):
                assert value == (pytest.approx(wanted, rel=1e-4, abs=1e-6) if isinstance(wanted, float) else wanted)


def test_csv_has_a_column_for_each_number_and_the_columns_that_go_along(folder, tmp_path):
    rows = [{"id": f"n{number}", "text": text, "verdict": None} for number, text in enumerate(texts(5))]
    write_rows(tmp_path / "rows.jsonl", rows)
    command = ["predict", folder / "classification", "--data.path", tmp_path / "rows.jsonl", "--keep", "id", "text"]
    assert main([str(each) for each in [*command, "--output", tmp_path / "o.csv"]]) == 0
    with (tmp_path / "o.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(row["id"], row["text"]) for row in found] == [(row["id"], row["text"]) for row in rows]
    probabilities = [f"probabilities.{name}" for name in CLASSES.values()]
    assert list(found[0]) == ["id", "text", "label", *probabilities]
    for row in found:
        values = [float(row[name]) for name in probabilities]
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert row["label"] == CLASSES[int(np.argmax(values))]


def test_a_file_that_is_there_stays_unless_it_may_be_replaced(folder, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    assert predict(folder, "regression", output=output) == 2
    assert "is there already; name another file, or say --overwrite" in " ".join(capsys.readouterr().err.split())
    assert output.read_text() == "mine\n"
    assert predict(folder, "regression", "--overwrite", output=output) == 0
    assert len(output.read_text().splitlines()) == 70


def test_an_interrupted_run_leaves_nothing(folder, tmp_path, monkeypatch):
    (tmp_path / "out.jsonl").write_text("mine\n")
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 9)
    before, calls = module._read, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return before(*arguments, **options)

    monkeypatch.setattr(module, "_read", interrupted)
    assert predict(folder, "classification", "--overwrite", output=tmp_path / "out.jsonl") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("classification", ["--data.text", "txt"], "has no column 'txt'"),
        ("classification", ["--data.kind", "multi-label", "--data.text", "text"], None),
        ("multi-label", ["--data.kind", "classification"], "it was made for multi-label"),
        ("regression", ["--data.kind", "classification"], "it was made for regression"),
        ("classification", ["--data.kind", "question-answering"], "it was made for classification"),
        ("classification", ["--data.kind", "regression"], "it was made for classification"),
        ("classification", ["--data.label", "label"], "--data.label: rows to predict have no use for it"),
        ("classification", ["--data.max_length", "65"], "takes at most 64 tokens"),
        ("classification", ["--data.stride", "3"], "for question answering"),
        ("classification", ["--keep", "id"], "--keep"),
        ("classification", ["--output", "o.txt"], "should end in .jsonl or .csv"),
        ("classification", ["--output", "nowhere/o.csv"], "is no folder"),
        ("classification", ["--student.temperature", "1"], "no such option"),
        ("classification", ["--everything"], "predict takes --data.<option>"),
        ("classification", ["--data.path", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_written(folder, tmp_path, monkeypatch, capsys, kind, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = predict(folder, kind, *arguments)
    except SystemExit as stopped:
        status = stopped.code
    said = " ".join(capsys.readouterr().err.split())
    assert (status, [path.name for path in tmp_path.iterdir()]) == ((2, []) if message else (0, ["out.jsonl"]))
    assert message is None or message in said


def test_a_model_without_a_head_is_told(folder, tmp_path, pretrained, capsys):
    command = ["predict", pretrained, "--data.path", folder / "classification.jsonl", "--output", tmp_path / "o.csv"]
    assert main([str(each) for each in command]) == 2
    assert "names no head that predicts" in " ".join(capsys.readouterr().err.split())
    assert main([str(each) for each in [*command, "--data.kind", "classification"]]) == 2
    assert "error" in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()


def test_the_rows_themselves_are_never_replaced(folder, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a film"}])
    command = ["predict", folder / "classification", "--data.path", rows, "--output", rows, "--overwrite"]
    assert main([str(each) for each in command]) == 2
    assert "holds the rows to predict" in " ".join(capsys.readouterr().err.split())


def test_a_column_that_hides_a_prediction_is_told(folder, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a film", "label": "x"}])
    command = [
        "predict",
        folder / "classification",
        "--data.path",
        rows,
        "--keep",
        "label",
        "--output",
        tmp_path / "o.csv",
    ]
    assert main([str(each) for each in command]) == 2
    assert "--keep: 'label' is what a prediction is called" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o.csv").exists()


def test_a_runs_model_reads_the_columns_of_its_run(folder, tmp_path):
    rows = [{"review": text, "verdict": CLASSES[number % 3]} for number, text in enumerate(texts(40))]
    write_rows(tmp_path / "reviews.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(
        f"data: {{kind: classification, path: {tmp_path / 'reviews.jsonl'}, text: review, label: verdict, "
        "max_length: 8}\n"
        f"output_dir: {tmp_path / 'run'}\n"
        f"steps: {{int8: {{run: quantize, model: {folder / 'classification'}, format: int8}}}}\n"
    )
    assert main(["run", str(tmp_path / "recipe.yaml"), "--only", "int8"]) == 0
    new = write_rows(tmp_path / "new.jsonl", [{"review": f"{GOOD[0]} {' '.join(OTHER)}"}, {"review": "bad"}])
    command = ["predict", tmp_path / "run" / "int8", "--data.path", new, "--output", tmp_path / "o.jsonl"]
    assert main([str(each) for each in command]) == 0
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [set(line["probabilities"]) for line in lines] == [set(CLASSES.values())] * 2
