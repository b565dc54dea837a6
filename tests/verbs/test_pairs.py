"""Every pair of verbs, one after the other on a BERT: it runs and reloads bit for bit, or check says why not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill import load_exported  # which registers what plain transformers can't describe
from distill.errors import InputError
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.runs.run import run_plan
from tests.conftest import tiny_bert
from tests.verbs.test_trim_step import word_pieces

pytestmark = pytest.mark.slow

STEPS = {
    "finetuned": "{run: finetune, model: FROM, max_steps: 2, learning_rate: 1e-3}",
    "cut": "{run: distill, model: FROM, teacher: MODEL, num_layers: 2, max_steps: 2}",
    "trained": "{run: distill, model: FROM, teacher: MODEL, hidden_weight: 1, max_steps: 2}",
    "adapted": "{run: distill, model: FROM, teacher: MODEL, lora: {}, merge: true, max_steps: 2}",
    "adapter": "{run: distill, model: FROM, teacher: MODEL, lora: {}, max_steps: 2}",
    "aware": "{run: distill, model: FROM, teacher: MODEL, qat: nf4, max_steps: 2}",
    "trimmed": "{run: trim_vocabulary, model: FROM, vocab_size: VOCABULARY}",
    "narrow": "{run: prune, model: FROM, neurons: 0.5, calibration_rows: 20}",
    "pruned": "{run: prune, model: FROM, heads: [HEADS], neurons: [NEURONS], calibration_rows: 20}",
    "narrow-words": "{run: factorize, model: FROM, rank: 16, calibration_rows: 20}",
    "factorized": "{run: factorize, model: FROM, modules: all, energy: 0.7, method: fisher, calibration_rows: 20}",
    "shared": "{run: share, model: FROM, groups: 1, calibration_rows: 20}",
    "int8": "{run: quantize, model: FROM, format: int8}",
    "nf4": "{run: quantize, model: FROM, format: nf4, embeddings: nf4, gptq: true, calibration_rows: 20}",
    "mixed": "{run: quantize, model: FROM, bits_budget: 7, calibration_rows: 20}",
    "served": "{run: export, model: FROM}",
}
"""What may stand first or second."""

REASONS = {
    **{("adapter", second): "makes an adapter, and this starts from a whole model" for second in STEPS},
    **{(first, second): "is quantized; start from the model it was made from"
       for first in ("int8", "nf4", "mixed") for second in STEPS if second not in ("adapter", "adapted")},
    **{(first, "adapted"): "adapters merged into quantized weights would be rounded away"
       for first in ("int8", "nf4", "mixed")},
    **{("served", second): "is an export, the end of a chain" for second in STEPS},
    **{(first, "cut"): "its layers have other sizes than its config says"
       for first in ("pruned", "narrow-words", "factorized")},
    **{("factorized", second): "its layers are factorized or shared" for second in ("narrow", "pruned")},
    ("narrow-words", "narrow-words"): "has no embeddings left to factorize",
    ("factorized", "narrow-words"): "has no embeddings left to factorize",
    ("factorized", "factorized"): "left to factorize",
    ("shared", "cut"): "its layers have other sizes than its config says",
    **{("shared", second): "its layers are factorized or shared" for second in ("narrow", "pruned")},
    **{(first, "shared"): "its layers are factorized or shared already" for first in ("factorized", "shared")},
    ("pruned", "shared"): "has layers of other sizes than",
}  # fmt: skip
"""Of the pairs that are refused."""


def written(step, start, *, first=None):
    """One step, the sizes it leaves fitting to those that a first one left."""
    heads, neurons = [4, 0, 2], [0, 64, 128]
    if first in ("narrow", "pruned"):
        heads, neurons = [2, 0, 1], [0, 32, 64]
    if first == "cut":
        heads, neurons = [2, 0], [0, 64]
    return (
        STEPS[step]
        .replace("FROM", start)
        .replace("HEADS", ", ".join(map(str, heads)))
        .replace("NEURONS", ", ".join(map(str, neurons)))
        .replace("VOCABULARY", "88" if first is None else "72")
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "start"
    torch.manual_seed(0)
    tokenizer = word_pieces()
    model = tiny_bert(num_hidden_layers=3, intermediate_size=128, initializer_range=0.1, vocab_size=len(tokenizer))
    model.config.id2label = {0: "negative", 1: "positive"}
    model.config.label2id = {"negative": 0, "positive": 1}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_of(folder, data, steps, start):
    lines = "".join(f"  {name}: {step.replace('MODEL', str(start))}\n" for name, step in steps.items())
    path = folder / "r.yaml"
    path.write_text(
        f"task: sst2\noutput_dir: {folder / 'run'}\ndata: {{path: {data}, max_length: 24, max_train_rows: 40}}\n"
        f"steps:\n{lines}"
    )
    return load_recipe(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory, start, sst2_folder):
    """All first steps, and on each of them all second ones that check lets pass; and what it says of the others."""
    folder = tmp_path_factory.mktemp("pairs")
    firsts = {name: written(name, str(start)) for name in STEPS}
    seconds, refused = {}, {}
    for first in STEPS:
        steps = {f"{first}.{second}": written(second, first, first=first) for second in STEPS}
        try:
            make_plan(recipe_of(folder, sst2_folder, {first: firsts[first], **steps}, start))
        except InputError as error:
            for problem in error.problems:
                _, _, pair = problem.partition(f"steps.{first}.")
                refused[first, pair.partition(".")[0]] = problem
        seconds |= {name: step for name, step in steps.items() if (first, name.partition(".")[2]) not in refused}
    plan = make_plan(recipe_of(folder, sst2_folder, firsts | seconds, start))
    run_plan(plan)
    return plan, refused


def test_what_is_refused_is_refused_with_the_reason(made):
    _, refused = made
    assert refused.keys() == REASONS.keys()
    for pair, reason in REASONS.items():
        assert reason in refused[pair], pair


def whole_models(plan):
    """The folders that transformers loads by themselves."""
    return [each.folder for each in plan.steps.values() if not (each.plan.is_adapter or each.plan.is_export)]


LOGITS = """
import json, sys, torch, distill
from transformers import AutoModelForSequenceClassification
ids = json.loads(sys.argv[1])
found = {}
for folder in sys.stdin.read().split():
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()
    with torch.inference_mode():
        found[folder] = model(torch.tensor(ids) % model.config.vocab_size).logits.float().tolist()
print(json.dumps(found))
"""


def test_every_pair_reloads_bit_for_bit(made, tmp_path):
    plan, _ = made
    folders = whole_models(plan)
    assert len(folders) > 80
    ids = torch.randint(5, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    here = {}
    for folder in folders:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()
        AutoTokenizer.from_pretrained(folder)
        again = tmp_path / folder.name
        model.save_pretrained(again)
        with torch.inference_mode():
            logits = model(ids % model.config.vocab_size).logits.float()
            other = AutoModelForSequenceClassification.from_pretrained(again, dtype="auto").eval()
            assert torch.equal(other(ids % model.config.vocab_size).logits.float(), logits), folder.name
        assert logits.isfinite().all()
        here[str(folder)] = logits.tolist()
    fresh = subprocess.run(
        [sys.executable, "-c", LOGITS, json.dumps(ids.tolist())],
        input="\n".join(here), capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert json.loads(fresh.stdout.splitlines()[-1]) == here


PLAIN = """
import json, sys, transformers
transformers.utils.logging.set_verbosity_error()
refused = []
for folder in sys.stdin.read().split():
    try:
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    except Exception:
        refused.append(folder)
assert "distill" not in sys.modules
print(json.dumps(refused))
"""


def test_plain_transformers_refuses_what_it_cannot_describe(made):
    plan, _ = made
    folders = whole_models(plan)
    described = {
        str(folder) for folder in folders if "quantization_config" in json.loads((folder / "config.json").read_text())
    }
    assert described
    fresh = subprocess.run(
        [sys.executable, "-c", PLAIN], input="\n".join(map(str, folders)), capture_output=True, text=True, check=True
    )
    assert set(json.loads(fresh.stdout.splitlines()[-1])) == described


def test_exports_of_what_every_verb_made_compute_what_it_does(made):
    plan, _ = made
    ids = torch.randint(5, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    exports = [planned for planned in plan.steps.values() if planned.plan.is_export]
    assert len(exports) > 7
    for planned in exports:
        parent = AutoModelForSequenceClassification.from_pretrained(planned.plan.source.location, dtype=torch.float32)
        inputs = ids % parent.config.vocab_size
        with torch.inference_mode():
            expected = parent.eval()(inputs).logits
        found = load_exported(planned.folder, threads=1)(input_ids=inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
