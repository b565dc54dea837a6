"""The code on an export's card prints what its engine computes, for every kind of task."""

import contextlib
import io

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import pipeline

from distill import export_model
from distill.export.record import ExportRecord, write_export
from distill.runs.usage import export_usage
from tests.conftest import make_tokenizer, tiny_config
from tests.export.families import family_model, image_processor


def bert(head, **settings):
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=1, initializer_range=0.2, **settings)
    return getattr(transformers, f"BertFor{head}")(config).eval()


MODELS = {
    "multi-label": lambda: bert("SequenceClassification", problem_type="multi_label_classification", num_labels=3),
    "regression": lambda: bert("SequenceClassification", problem_type="regression", num_labels=1),
    "token-classification": lambda: bert("TokenClassification", id2label={0: "B-PER", 1: "B-LOC"}),
    "question-answering": lambda: bert("QuestionAnswering"),
    "masked-lm": lambda: bert("MaskedLM"),
    "image-classification": lambda: family_model("ViT"),
}
_QUICK = "question-answering"


def printed(folder, kind, *, pairs):
    """The code, and what it prints in the folder above."""
    code, out = export_usage(folder, kind, folder.name, max_length=24, pairs=pairs), io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return code, out.getvalue()


def exported(kind, folder):
    processor = image_processor() if kind == "image-classification" else make_tokenizer()
    model = MODELS[kind]()
    export_model(model, processor, folder)
    return model


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == _QUICK else pytest.mark.slow) for kind in MODELS]
)
def test_the_code_prints_what_the_model_predicts(kind, tmp_path, monkeypatch):
    model = exported(kind, tmp_path / "it")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((40, 40, 3), 90, dtype=np.uint8)).save("photo.jpg")
    folder, tokenizer = tmp_path / "it", None if kind == "image-classification" else make_tokenizer()
    pairs = kind == "regression"
    code, said = printed(folder, kind, pairs=pairs)
    assert ("transformers" in code) is (kind == "image-classification")
    text = "The plot is thin, but the cast was great."
    if kind == "image-classification":
        shown = pipeline(kind, model=model, image_processor=image_processor())("photo.jpg")
        assert [each["label"] for each in eval(said)] == [each["label"] for each in shown]
        return
    question = ("Where do bees live?", "Bees live in hives.")
    given = {"regression": ("A man is asleep.", "He sleeps."), "question-answering": question}.get(kind, (text,))
    given = ("The cast was [MASK].",) if kind == "masked-lm" else given
    inputs = tokenizer(*given, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    if kind == "multi-label":
        assert list(eval(said).values()) == pytest.approx(outputs.logits[0].sigmoid().tolist(), abs=1e-5)
    elif kind == "regression":
        assert eval(said) == pytest.approx(outputs.logits[0].tolist(), abs=1e-5)
    elif kind == "token-classification":
        tags = [model.config.id2label[int(tag)] for tag in outputs.logits[0].argmax(-1)][1:-1]
        tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])[1:-1]
        assert said == "".join(f"{token} {tag}\n" for token, tag in zip(tokens, tags, strict=True))
    elif kind == "masked-lm":
        best = outputs.logits[0, inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)].topk(5).indices
        assert eval(said) == tokenizer.convert_ids_to_tokens(best)
    else:
        assert said.strip() == answer(outputs, inputs, tokenizer)


def answer(outputs, inputs, tokenizer):
    """The tokens of the context with the largest sum of their start's and their end's logit."""
    context = [place for place, number in enumerate(inputs["token_type_ids"][0].tolist()) if number == 1][:-1]
    spans = [(start, end) for start in context for end in context if start <= end]
    start, end = max(spans, key=lambda span: float(outputs.start_logits[0, span[0]] + outputs.end_logits[0, span[1]]))
    return tokenizer.decode(inputs["input_ids"][0, start : end + 1], skip_special_tokens=True)


def test_a_repository_is_fetched_and_a_folder_is_not(tmp_path):
    record = ExportRecord(
        engine="openvino", format="fp32", architecture="BertForSequenceClassification", largest_difference=0.0,
        file="openvino/openvino_model.xml", inputs=["input_ids", "attention_mask"], outputs=["logits"],
    )  # fmt: skip
    (tmp_path / "openvino").mkdir()
    (tmp_path / record.file).touch()
    write_export(tmp_path, record)
    make_tokenizer().save_pretrained(tmp_path)
    code = export_usage(tmp_path, "classification", "me/served", max_length=24, pairs=True)
    assert 'folder = Path(snapshot_download("me/served"))' in code
    assert '[("A man is asleep.", "He sleeps.")]' in code
    assert "type_ids" not in code
    assert '"CPU", {"INFERENCE_PRECISION_HINT": "f32"})' in code  # else in bfloat16 where a CPU has it
    code = export_usage(tmp_path, "classification", "served", max_length=24, pairs=False)
    assert 'folder = Path("served")' in code
    assert "huggingface_hub" not in code
