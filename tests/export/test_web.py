"""What transformers.js can't read is told, and what it reads it computes as Python does."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers.normalizers import Nmt, Sequence
from transformers import AlbertConfig, AlbertForTokenClassification, BertTokenizer, GPT2Config
from transformers.models.auto import modeling_auto

from distill import InputError, export_model, load_exported
from distill.export.graph import float_graph
from distill.export.record import read_export
from distill.export.web import FAMILIES, HEADS, TYPED_TOKENIZERS, WITHOUT, web_problems
from scripts.web_demo import TRANSFORMERS_JS
from tests.conftest import make_tokenizer
from tests.export.families import family_model, image_processor
from tests.web import LABELS, PAIRS, TEXTS, calibration, need, web_model, wordpiece_tokenizer

_MAPPINGS = {
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "ForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
FORMATS = {"fp32": ("fp32", 1e-4), "fp16": ("fp16", 1e-2), "int8": ("q8", 1e-2), "int4": ("q4", 1e-2)}


def test_what_transformers_js_cannot_read_is_told():
    tokenizer = wordpiece_tokenizer()
    assert web_problems(web_model(), tokenizer, "onnxruntime") == []
    (problem,) = web_problems(web_model(), tokenizer, "openvino")
    assert problem == "web: browsers run exports for onnxruntime, not for openvino"
    (problem,) = web_problems(family_model("ViT"), image_processor(), "onnxruntime")
    assert "resizes images in another way" in problem
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "embedding_size": 8}
    (problem,) = web_problems(AlbertForTokenClassification(AlbertConfig(**sizes)), tokenizer, "onnxruntime")
    assert "transformers.js has no AlbertForTokenClassification; its families are albert, bert," in problem
    writer = transformers.GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))
    assert any("has no GPT2LMHeadModel" in problem for problem in web_problems(writer, tokenizer, "onnxruntime"))


def test_tokenizers_that_transformers_js_reads_otherwise_are_told():
    kind, types = web_problems(web_model(), make_tokenizer(), "onnxruntime")
    assert kind == "web: transformers.js has no model WordLevel, which this tokenizer.json has"
    assert "gives no token_type_ids for a" in types
    assert "BertTokenizer for BERT" in types
    tokenizer = wordpiece_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Sequence([tokenizer.backend_tokenizer.normalizer, Nmt()])
    (problem,) = web_problems(web_model(), tokenizer, "onnxruntime")
    assert problem == "web: transformers.js has no normalizer Nmt, which this tokenizer.json has"


def test_an_export_that_is_none_for_the_web_is_refused_before_it_is_made(tmp_path):
    with pytest.raises(InputError, match="web: browsers run exports for onnxruntime"):
        export_model(web_model(), wordpiece_tokenizer(), tmp_path / "out", engine="openvino", web=True)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Folders `fp32`, `fp16` and `int8` of one model."""
    root = tmp_path_factory.mktemp("web")
    model, tokenizer = web_model(), wordpiece_tokenizer()
    graph = float_graph(model, calibration()[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.export.export.float_graph", lambda model, inputs: graph)
        for format in FORMATS:
            export_model(
                model, tokenizer, root / format, format=format, web=True, batches=calibration(), agreement=0.8,
                divergence=0.1,
            )  # fmt: skip
        export_model(model, tokenizer, root / "plain")
    return root


def test_config_names_the_file_that_transformers_js_takes_by_itself(exports):
    for format, (dtype, _) in FORMATS.items():
        config = json.loads((exports / format / "config.json").read_text())
        assert config.pop("transformers.js_config") == {"dtype": dtype}
        assert config == json.loads((exports / "plain" / "config.json").read_text())
        assert read_export(exports / format).web
        assert load_exported(exports / format).config.id2label == dict(enumerate(LABELS))
        assert (exports / format / "tokenizer.json").is_file()
    assert not read_export(exports / "plain").web


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A folder with transformers.js installed as npm has it."""
    need("node", "npm")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text("{}")
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", TRANSFORMERS_JS]
    subprocess.run(command, cwd=folder, check=True)
    yield folder
    shutil.rmtree(folder)  # half a gigabyte


@pytest.mark.web
def test_node_computes_what_python_does(exports, library):
    script = shutil.copy(Path(__file__).with_name("predict.mjs"), library)
    short = TEXTS[:-1]  # its pipeline cuts the special token off that ends a longer text
    assert len(short) == 20
    pairs = [PAIRS[0], ("very good", "a bad end")]
    names = [
        mapping[family]
        for head, mapping in _MAPPINGS.items()
        for family in FAMILIES - WITHOUT.get(head, set())
        if family in mapping
    ]
    assert len(names) > 50
    given = {"root": str(exports), "folders": list(FORMATS), "texts": short, "pairs": pairs, "names": names}
    run = subprocess.run(["node", script], input=json.dumps(given), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["lacking"] == []
    tokenizer = wordpiece_tokenizer()
    for format, (_, tolerance) in FORMATS.items():
        exported = load_exported(exports / format, threads=1)
        for text, scores in zip(short, found["pipelines"][format], strict=True):
            expected = exported(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist()
            assert max(scores, key=scores.get) == LABELS[expected.index(max(expected))]
            assert [scores[label] for label in LABELS] == pytest.approx(expected, abs=tolerance)
        inputs = tokenizer(*map(list, zip(*pairs, strict=True)), return_tensors="pt", padding=True)
        expected = exported(**inputs).logits.softmax(-1)
        torch.testing.assert_close(torch.tensor(found["pairs"][format]).softmax(-1), expected, rtol=0, atol=tolerance)


def test_heads_and_typed_tokenizers_are_names_of_transformers():
    assert set(HEADS) == set(_MAPPINGS)
    assert all(hasattr(transformers, f"{name}Tokenizer") for name in TYPED_TOKENIZERS)
    assert FAMILIES.issubset(_MAPPINGS["ForSequenceClassification"])
    assert type(wordpiece_tokenizer()) is BertTokenizer
