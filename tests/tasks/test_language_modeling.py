"""Masked and causal language models: masks, windows, perplexity by hand, and whole runs."""

import json
import math
from dataclasses import asdict

import datasets
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, pipeline

from distill import DistillationConfig, DistillationTrainer
from distill.data.load import DataOptions, load_data, tokenize
from distill.data.masking import Masking
from distill.errors import InputError
from distill.evaluation.evaluate import evaluate_model, metrics_while_training
from distill.recipes.check import estimate_step
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.report import write_report
from distill.runs.run import run_plan
from distill.tasks.kinds import own_task
from distill.tasks.language_modeling import mask_row
from distill.training.config import TrainingConfig
from tests.conftest import WORDS, make_tokenizer, sentences, tiny_config, write_rows

MASK = Masking.__call__


def test_masks_follow_bert():
    """80 % the mask token, 10 % random, 10 % as it was; never a special token."""
    tokenizer = make_tokenizer()
    ids = np.array([2, *range(5, 25), 3])
    drawn = [mask_row(ids, tokenizer, 0.15, np.random.default_rng(row)) for row in range(4000)]
    masked, labels = (np.stack(part) for part in zip(*drawn, strict=True))
    chosen = labels != -100
    assert not chosen[:, [0, -1]].any()
    assert (labels[chosen] == np.broadcast_to(ids, labels.shape)[chosen]).all()
    assert (masked[~chosen] == np.broadcast_to(ids, masked.shape)[~chosen]).all()
    assert chosen.any(1).all()
    # 20 tokens at 15 %, and one of them where there would be none
    assert chosen[:, 1:-1].mean() == pytest.approx(0.15 + 0.85**20 / 20, abs=0.005)
    assert (masked[chosen] == tokenizer.mask_token_id).mean() == pytest.approx(0.8 + 0.1 / 25, abs=0.02)
    assert (masked[chosen] == labels[chosen]).mean() == pytest.approx(0.1 + 0.1 / 25, abs=0.02)


def test_a_rows_masks_depend_on_seed_epoch_and_row_alone():
    tokenizer = make_tokenizer()
    ids = torch.tensor([[2, *range(5, 20), 3], [2, *range(5, 18), 3, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    mask = Masking(tokenizer, 0.3, 0)
    both = mask(batch, [7, 3], 1)
    alone = mask({name: values[1:, :15] for name, values in batch.items()}, [3], 1)
    assert torch.equal(both["input_ids"][1, :15], alone["input_ids"][0])
    assert torch.equal(both["labels"][1, :15], alone["labels"][0])
    assert (both["labels"][1, 15:] == -100).all()
    for other in (mask(batch, [7, 3], 2), mask(batch, [6, 2], 1), Masking(tokenizer, 0.3, 1)(batch, [7, 3], 1)):
        assert not torch.equal(both["labels"], other["labels"])


def load(folder, kind, **options):
    rows = [{"text": row["sentence"]} for row in sentences(64)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "validation.jsonl", [{"text": row["sentence"]} for row in sentences(24, seed=1)])
    return load_data(None, DataOptions(kind=kind, path=str(folder), **options))


def test_long_texts_become_windows(tmp_path):
    tokenizer = make_tokenizer()
    rows = datasets.Dataset.from_dict({"text": ["the film was good a cast", "plot"]})
    for kind, labels in (("masked-lm", False), ("causal-lm", True)):
        windows = tokenize(rows, own_task(kind, ("text",), ""), tokenizer, 5)
        words = [tokenizer.convert_ids_to_tokens(ids)[1:-1] for ids in windows["input_ids"]]
        assert words == [["the", "film", "was"], ["good", "a", "cast"]]  # one word alone predicts nothing
        assert ("labels" in windows.column_names) == labels


def test_scored_rows_have_their_masks_for_good(tmp_path):
    data = load(tmp_path, "masked-lm")
    tokenizer = make_tokenizer()
    assert "labels" not in data.tokenized("train", tokenizer).column_names
    first, again = (load(tmp_path, "masked-lm").tokenized("validation", tokenizer) for _ in range(2))
    assert first["labels"] == again["labels"]
    assert all(any(label != -100 for label in row) for row in first["labels"])


@pytest.mark.parametrize("kind", ["masked-lm", "causal-lm"])
def test_perplexity_is_that_of_the_models_own_loss(tmp_path, kind):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    if kind == "masked-lm":
        model = BertForMaskedLM(tiny_config(initializer_range=0.2)).eval()
    else:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS) + 5, bos_token_id=2, eos_token_id=3, **sizes)).eval()
    data = load(tmp_path, kind)
    found = evaluate_model(model, tokenizer, data, batch_size=5)
    total, count, right = 0.0, 0, 0
    for row in data.tokenized("validation", tokenizer):
        inputs = {name: torch.tensor([row[name]]) for name in tokenizer.model_input_names}
        labels = torch.tensor([row["labels"]])
        with torch.inference_mode():
            output = model(**inputs, labels=labels)  # transformers' own loss, shift included
        logits, shown = (output.logits[:, :-1], labels[:, 1:]) if kind == "causal-lm" else (output.logits, labels)
        predicted = int((shown != -100).sum())
        total, count = total + output.loss.item() * predicted, count + predicted
        right += int((logits.argmax(-1) == shown)[shown != -100].sum())
    assert found.metrics == pytest.approx({"perplexity": math.exp(total / count), "accuracy": right / count}, rel=1e-4)
    low, high = found.interval
    assert low < found.metrics["perplexity"] < high


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that a computed tensor had."""

    most = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor) and not isinstance(each, torch.nn.Parameter):
                self.most = max(self.most, each.numel())
        return result


def language_model(kind, vocabulary):
    torch.manual_seed(0)
    if kind == "masked-lm":
        return BertForMaskedLM(tiny_config(vocab_size=vocabulary)).eval()
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=2, eos_token_id=3, **sizes)).eval()


def test_a_masked_model_that_an_engine_computes_is_scored_alike(tmp_path, monkeypatch):
    """An engine computes its head at all tokens, since it is no module whose head could be kept back."""
    for module in ("tasks.outputs", "tasks.language_modeling"):
        monkeypatch.setattr(f"distill.{module}.CHUNK", 7)
    data, tokenizer = load(tmp_path, "masked-lm"), make_tokenizer()
    model = BertForMaskedLM(tiny_config(initializer_range=0.3)).eval()

    class Engine:
        config, device, dtype, forward = model.config, model.device, model.dtype, model.forward

        def __call__(self, **inputs):
            return model(**inputs)

        def to(self, device):
            return self

        def eval(self):
            return self

    expected = evaluate_model(model, tokenizer, data, batch_size=5)
    found = evaluate_model(type("BertForMaskedLM", (Engine,), {})(), tokenizer, data, batch_size=5)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert [each["tokens"] for each in found.predictions] == [each["tokens"] for each in expected.predictions]


@pytest.mark.parametrize("kind", ["masked-lm", "causal-lm"])
def test_an_evaluation_never_holds_the_logits_of_a_batch(tmp_path, kind, monkeypatch):
    """Nor does Trainer's, with a teacher; the numbers are those of whole batches, wherever padding stands."""
    data, tokenizer, vocabulary = load(tmp_path, kind), make_tokenizer(), 3000
    rows = data.tokenized("validation", tokenizer)
    model, whole = language_model(kind, vocabulary), sum(rows["length"]) * vocabulary
    monkeypatch.setattr("distill.tasks.outputs.CHUNK", 16)
    monkeypatch.setattr("distill.tasks.language_modeling.CHUNK", 16)
    monkeypatch.setattr("distill.training.trainer._LOGITS_AT_ONCE", 16 * vocabulary)
    with LargestTensor() as seen:
        found = evaluate_model(model, tokenizer, data, batch_size=24)
    head = 64 * vocabulary  # what torch computes of the weights themselves
    assert seen.most <= head < whole / 3
    tokenizer.padding_side = "left"
    assert evaluate_model(model, tokenizer, data, batch_size=5).metrics == pytest.approx(found.metrics, rel=1e-5)
    assert "forward" not in model.base_model.__dict__  # it is as it was

    args = DistillationConfig(
        output_dir=str(tmp_path), hard_weight=1.0, per_device_eval_batch_size=24, disable_tqdm=True, report_to=[]
    )

    def evaluated(**scoring):
        trainer = DistillationTrainer(
            model=model, teacher=language_model(kind, vocabulary), args=args, train_dataset=rows, eval_dataset=rows,
            processing_class=make_tokenizer(), **scoring,
        )  # fmt: skip
        with LargestTensor() as seen:
            metrics = trainer.evaluate()
        return metrics, seen.most

    for scoring in (metrics_while_training(data, rows), {}):
        metrics, most = evaluated(**scoring)
        assert most <= head < whole / 3
        assert math.exp(metrics["eval_loss/hard"]) == pytest.approx(found.metrics["perplexity"], rel=1e-4)
        if scoring:
            scores = {key: metrics[f"eval_{key}"] for key in found.metrics}
            assert scores == pytest.approx(found.metrics, rel=1e-4)


def test_the_checkpoint_with_the_least_perplexity_is_kept(tmp_path):
    rows = load(tmp_path, "causal-lm").tokenized("validation", make_tokenizer())
    perplexities = iter([9.0, 11.0, 10.0])
    trainer = DistillationTrainer(
        model=language_model("causal-lm", 25),
        args=TrainingConfig(
            output_dir=str(tmp_path / "out"), max_steps=3, eval_strategy="steps", eval_steps=1, save_steps=1,
            save_total_limit=3, load_best_model_at_end=True, metric_for_best_model="perplexity", disable_tqdm=True,
        ),
        train_dataset=rows, eval_dataset=rows.select(range(2)), processing_class=make_tokenizer(),
        preprocess_logits_for_metrics=lambda logits, labels: logits[..., 0],
        compute_metrics=lambda output: {"perplexity": next(perplexities)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")


def test_vocabularies_may_differ_by_padding_alone(tmp_path):
    """A teacher with eight rows more than the tokenizer has words teaches what one without them would."""
    tokenizer = make_tokenizer()
    rows = load(tmp_path, "causal-lm").tokenized("train", tokenizer)

    def model(vocabulary, seed):
        torch.manual_seed(seed)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=2, eos_token_id=3, **sizes)).eval()

    def losses(vocabulary, processing_class=tokenizer):
        teacher = model(25, 0)
        if vocabulary != 25:
            teacher.resize_token_embeddings(vocabulary, mean_resizing=False)
        args = DistillationConfig(
            output_dir=str(tmp_path), max_steps=2, temperature=2.0, logging_steps=1, save_strategy="no",
            disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model=model(25, 1), teacher=teacher, args=args, train_dataset=rows, processing_class=processing_class
        )
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    assert losses(33) == pytest.approx(losses(25), rel=1e-5)
    with pytest.raises(InputError, match=r"a vocabulary of 24 and the student of 25; .* 25 words"):
        losses(24)
    with pytest.raises(InputError, match="processing_class: missing"):
        losses(33, None)


def test_masking_needs_a_tokenizer_with_a_mask(tmp_path):
    rows = tokenize(
        load(tmp_path, "masked-lm").splits["train"], own_task("masked-lm", ("text",), ""), make_tokenizer(), 32
    )
    args = DistillationConfig(output_dir=str(tmp_path), soft_weight=0, hard_weight=1.0)
    with pytest.raises(InputError, match="processing_class: missing"):
        DistillationTrainer(model=BertForMaskedLM(tiny_config()), args=args, train_dataset=rows)
    tokenizer = make_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(InputError, match="has no mask token"):
        Masking(tokenizer, 0.15, 0)


def test_a_general_student_and_what_it_is_good_for(tmp_path, pretrained, sst2_folder, monkeypatch):
    """A student distilled on text alone, scored by perplexity, then fine-tuned on labels."""
    load(tmp_path, "masked-lm")
    path = tmp_path / "general.yaml"
    path.write_text(f"""
output_dir: {tmp_path / "run"}
data: {{kind: masked-lm, path: {tmp_path}, max_length: 24}}
benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 1}}
steps:
  teacher: {{run: finetune, model: {pretrained}, max_steps: 40, learning_rate: 3e-3, eval_strategy: "no"}}
  student: {{run: distill, teacher: teacher, num_layers: 2, max_steps: 40, learning_rate: 3e-3, hard_weight: 0.5,
             hidden_weight: 0.1, eval_strategy: steps, eval_steps: 40}}
  untrained: {{run: finetune, model: {pretrained}, num_layers: 2, max_steps: 1, learning_rate: 1e-6}}
""")
    made = make_plan(load_recipe(path))
    masked = []
    with monkeypatch.context() as patch:
        patch.setattr(Masking, "__call__", lambda self, batch, *_: masked.append(1) or MASK(self, batch, *_))
        estimate_step(made, made.steps["student"])  # `distill check` times masked rows too
    assert len(masked) > 1
    run_plan(made)
    report = asdict(write_report(made))
    by_name = {model["name"]: model for model in report["models"]}
    assert by_name["student"]["metrics"]["perplexity"] < 0.8 * by_name["untrained"]["metrics"]["perplexity"]
    assert by_name["student"]["retention"] == pytest.approx(
        by_name["teacher"]["metrics"]["perplexity"] / by_name["student"]["metrics"]["perplexity"]
    )
    record = json.loads((made.steps["student"].folder / "step.json").read_text())
    scored = [line["eval_perplexity"] for line in record["log"] if "eval_perplexity" in line]
    assert scored[-1] == pytest.approx(by_name["student"]["metrics"]["perplexity"], rel=1e-3)
    fill = pipeline("fill-mask", str(made.steps["student"].folder))
    assert len(fill("the [MASK] was good")) == 5

    tuned = tmp_path / "tuned.yaml"
    tuned.write_text(f"""
task: sst2
output_dir: {tmp_path / "tuned"}
data: {{path: {sst2_folder}, max_length: 24}}
steps:
  tuned: {{run: finetune, model: {made.steps["student"].folder}, max_steps: 5}}
""")
    run_plan(make_plan(load_recipe(tuned)))


def test_a_causal_student_writes(tmp_path):
    load(tmp_path, "causal-lm")
    base = tmp_path / "config"
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "bos_token_id": 2, "eos_token_id": 3}
    GPT2Config(vocab_size=len(WORDS) + 5, **sizes).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    path = tmp_path / "causal.yaml"
    path.write_text(f"""
output_dir: {tmp_path / "run"}
data: {{kind: causal-lm, path: {tmp_path}, max_length: 24}}
benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 1}}
steps:
  teacher: {{run: finetune, model: {base}, from_scratch: true, max_steps: 60, learning_rate: 3e-3}}
  student: {{run: distill, teacher: teacher, num_layers: 2, max_steps: 60, learning_rate: 3e-3, temperature: 2.0}}
""")
    made = make_plan(load_recipe(path))
    run_plan(made)
    by_name = {model["name"]: model for model in asdict(write_report(made))["models"]}
    assert by_name["teacher"]["metrics"]["perplexity"] < 24
    assert by_name["student"]["metrics"]["perplexity"] < 1.3 * by_name["teacher"]["metrics"]["perplexity"]
    write = pipeline("text-generation", str(made.steps["student"].folder))
    assert write("the film", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("the film")


def test_other_tokenizers_are_refused_for_language_models(tmp_path, pretrained):
    load(tmp_path, "masked-lm")
    other = tmp_path / "other"
    BertForMaskedLM(BertConfig(**{**tiny_config().to_dict(), "vocab_size": 24})).save_pretrained(other)
    make_tokenizer(WORDS[:-1]).save_pretrained(other)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
output_dir: {tmp_path / "run"}
data: {{kind: masked-lm, path: {tmp_path}}}
steps:
  student: {{run: distill, teacher: {other}, model: {pretrained}}}
""")
    with pytest.raises(InputError, match=r"its tokenizer is not that of .*other, and masked-lm compares"):
        make_plan(load_recipe(path, {"data.max_length": "32"}, draft=True))
