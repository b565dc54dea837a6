"""LoRA: adapters alone are trained, saved, read again, merged; and refused where they could not be read."""

import json
import shutil
from dataclasses import asdict

import pytest
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, pipeline

from distill import DistillationConfig, DistillationTrainer, build_student
from distill.cli import main
from distill.errors import InputError
from distill.models.adapters import lora_config, with_adapters
from distill.models.load import find_model, load_classifier
from distill.recipes.check import print_plan
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.report import write_report
from distill.runs.run import run_plan
from distill.tasks.kinds import own_task
from tests.architectures import ARCHITECTURES, small_model
from tests.conftest import make_tokenizer, sentences, write_rows
from tests.training.test_exactness import make_models, make_rows

RECIPE = """
task: sst2
output_dir: {folder}/run
data: {{path: {data}, max_length: 32}}
benchmark: {{sequence_length: 16, rounds: 1}}
steps:
  teacher: {{run: finetune, model: {model}, max_steps: 30, learning_rate: 1e-3}}
  student: {{run: distill, teacher: teacher, num_layers: 2, max_steps: 5, learning_rate: 1e-3}}
  nf4: {{run: quantize, model: student, format: nf4}}
  {step}
"""


def plan_of(tmp_path, sst2_folder, pretrained, step):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, data=sst2_folder, model=pretrained, step=step))
    return make_plan(load_recipe(path, draft=True))


def test_a_student_is_cut_from_a_step_that_makes_adapters(tmp_path, sst2_folder, pretrained):
    """Of the adapters added to their model; told while planning or made, not after the teacher was trained."""
    step = (
        "adapted: {run: finetune, model: teacher, lora: {r: 4}, max_steps: 20, learning_rate: 1e-2}\n"
        "  cut: {run: distill, teacher: adapted, num_layers: 4, max_steps: 1, learning_rate: 1e-9}"
    )
    plan = plan_of(tmp_path, sst2_folder, pretrained, step)
    run_plan(plan, only=["teacher", "adapted", "cut"])
    logits = []
    for name in ("adapted", "cut", "teacher"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / name).eval()
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([[2, 7, 8, 3]])).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-3, rtol=1e-3)
    assert (logits[2] - logits[0]).abs().max() > 1e-2


def make_trainer(folder, **options):
    teacher, student = make_models()
    args = DistillationConfig(
        output_dir=str(folder), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=4, disable_tqdm=True,
        hard_weight=0.5, hidden_weight=0.5, save_steps=2, save_total_limit=2, logging_steps=1, **options,
    )  # fmt: skip
    return DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=make_rows(), processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", lora_dropout=0.1),
    )  # fmt: skip


def test_adapters_alone_are_trained_and_a_resumed_run_ends_the_same(tmp_path):
    trainer = make_trainer(tmp_path / "whole")
    before = {name: weight.clone() for name, weight in trainer.student.state_dict().items()}
    trainer.train()
    changed = {name for name, weight in trainer.student.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files

    again = make_trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in trainer.student.state_dict().items():
        torch.testing.assert_close(again.student.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


def test_an_adapters_dropout_stays_what_its_config_says(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = set()
    trainer.student.register_forward_hook(
        lambda *_: seen.update(
            m.p for n, m in trainer.student.named_modules() if "lora_dropout" in n and hasattr(m, "p")
        )
    )
    trainer.train()
    assert seen == {0.1}


@pytest.mark.parametrize("family", ["Bert", "Roberta", "ModernBert"])
@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering"])
def test_heads_of_tokens_and_spans_are_trained_as_a_whole(family, head):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3,
    )  # fmt: skip
    kind = {"TokenClassification": "token-classification", "QuestionAnswering": "question-answering"}[head]
    model = get_peft_model(getattr(transformers, f"{family}For{head}")(config), lora_config({"r": 2}, kind))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    name = "qa_outputs" if hasattr(model, "qa_outputs") else "classifier"
    assert any(f"{name}.modules_to_save.default.weight" in each for each in trained)
    assert not any(f"{name}.lora" in each for each in trained)
    assert any(".lora_A." in each for each in trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["query", "vlaue"]}, r"lora\.target_modules: no module 'vlaue'; did you mean 'value'"),
        ({"target_modules": []}, r"lora\.target_modules: names no module"),
        ({"target_modules": "query"}, r"lora\.target_modules: the pattern 'query' matches no module; .* \(\[query\]\)"),
        ({"target_modules": "all_linear"}, r"lora\.target_modules: the pattern 'all_linear' matches no module"),
        ({"target_modules": "(query"}, r"lora\.target_modules: '\(query' is no regular expression"),
        ({"target_modules": ["LayerNorm"]}, r"lora: Target module LayerNorm"),
        ({"modules_to_save": ["pooler", "heads"]}, r"lora\.modules_to_save: no module 'heads'"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_target_that_is_no_module_is_refused(options, message, device):
    with pytest.raises(InputError, match=message):
        with_adapters(make_models()[0].to(device), lora_config(options, "classification"))


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["query"], 4),
        (r".*layer\.[01]\..*\.(query|value)", 4),
        ("all-linear", 4 * 6 + 1),
        (["0.attention.self.key"], 1),
    ],
)
def test_a_text_is_one_pattern_and_a_list_is_names(targets, count):
    model = with_adapters(make_models()[0], lora_config({"target_modules": targets}, "classification"))
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(adapted) == count  # make_models' teacher has 4 blocks of 6 linear layers, and a pooler


@pytest.mark.parametrize("start", ["student", "nf4"])
def test_an_adapter_goes_from_recipe_to_report_and_pipeline(tmp_path, sst2_folder, pretrained, start):
    options = f"run: distill, teacher: teacher, model: {start}, lora: {{r: 2}}, max_steps: 5, learning_rate: 1e-2"
    plan = plan_of(tmp_path, sst2_folder, pretrained, f"adapter: {{{options}}}")
    run_plan(plan)
    folder = tmp_path / "run" / "adapter"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    report = asdict(write_report(plan))
    entries = {model["name"]: model for model in report["models"]}
    own = (folder / "adapter_model.safetensors").stat().st_size
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"].startswith("/")
    rows = ["--task", "sst2", "--data.path", str(sst2_folder), "--data.max_length", "32"]
    assert main(["eval", str(folder), *rows]) == 0
    assert main(["bench", str(folder), "--sequence_length", "16", "--rounds", "1"]) == 0
    assert entries["adapter"]["size_on_disk_bytes"] == entries[start]["size_on_disk_bytes"] + own
    assert entries["adapter"]["num_parameters"] > entries[start]["num_parameters"]

    ids = torch.tensor([[2, 7, 8, 9, 3]])
    ours = load_classifier(str(folder), plan.data.task)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / start).eval()
    assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not torch.allclose(plain(input_ids=ids).logits, base(input_ids=ids).logits)
    assert pipeline("text-classification", str(folder))("a good film", truncation=True)[0]["label"] in (
        "negative",
        "positive",
    )
    assert json.loads((folder / "step.json").read_text())["options"]["lora"] == {"r": 2}


def test_merged_adapters_make_a_whole_model(tmp_path, sst2_folder, pretrained):
    step = "merged: {run: distill, teacher: teacher, num_layers: 2, lora: {}, merge: true, max_steps: 5}"
    plan = plan_of(tmp_path, sst2_folder, pretrained, step)
    run_plan(plan)
    folder = tmp_path / "run" / "merged"
    assert (folder / "model.safetensors").is_file()
    assert not (folder / "adapter_model.safetensors").exists()
    model = load_classifier(str(folder), plan.data.task)
    assert not any("lora" in name for name, _ in model.named_parameters())
    teacher = load_classifier(str(tmp_path / "run" / "teacher"), plan.data.task)
    cut = build_student(teacher, num_layers=2).state_dict()
    assert any(not torch.equal(weight, cut[name]) for name, weight in model.state_dict().items())
    assert torch.equal(
        model.state_dict()["bert.embeddings.word_embeddings.weight"], cut["bert.embeddings.word_embeddings.weight"]
    )


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("x: {run: distill, teacher: teacher, num_layers: 2, lora: {}}", "lora: the adapter alone would not tell"),
        (
            "x: {run: distill, teacher: teacher, model: nf4, lora: {}, merge: true}",
            "merge: adapters merged into quantized",
        ),
        ("x: {run: distill, teacher: teacher, model: nf4}", "nf4 is quantized; .*lora"),
        ("x: {run: distill, teacher: teacher, model: student, merge: true}", "merge: there are no adapters"),
        ("x: {run: distill, teacher: teacher, model: student, lora: {rank: 8}}", r"rank is no such key \(known:.* r, "),
        ("x: {run: distill, teacher: teacher, model: student, lora: {r: no}}", "lora: r should be a valid integer"),
        (
            "a: {run: distill, teacher: teacher, model: student, lora: {}}\n"
            "  x: {run: quantize, model: a, format: int8}",
            "a makes an adapter, .* merge: true makes a whole",
        ),
        ("x: {run: distill, teacher: teacher, from_scratch: true}", "from_scratch: needs a `model`"),
    ],
)
def test_what_could_not_be_read_again_is_refused(tmp_path, sst2_folder, pretrained, step, message):
    with pytest.raises(InputError, match=message):
        plan_of(tmp_path, sst2_folder, pretrained, step)


# --- adapters made by others ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, pretrained, tokenizer):
    """A PEFT folder for three classes, on a base that has no head; and the logits that it should give."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(pretrained, num_labels=3)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    assert not (folder / "config.json").exists()
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    with torch.no_grad():
        return folder, ids, model(input_ids=ids).logits


THREE = own_task("classification", ("text",), "label").with_label_names(("a", "b", "c"))
MAP = {"LABEL_0": "c", "LABEL_1": "a", "LABEL_2": "b"}


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_made_by_others_give_what_they_gave(foreign, merge):
    folder, ids, expected = foreign
    with pytest.raises(InputError, match="its labels have no names"):
        load_classifier(str(folder), THREE)
    model = load_classifier(str(folder), THREE, label_map=MAP, merge=merge)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected[:, [1, 2, 0]], atol=1e-5, rtol=0)
    assert any("lora" in name for name, _ in model.named_parameters()) is not merge


def test_adapters_made_by_others_teach_from_recipe_to_report(foreign, tmp_path, pretrained):
    rows = [{"text": row["sentence"], "label": "abc"[number % 3]} for number, row in enumerate(sentences(48))]
    for split in ("train", "validation"):
        write_rows(tmp_path / "rows" / f"{split}.jsonl", rows)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
output_dir: {tmp_path}/run
data: {{kind: classification, path: {tmp_path}/rows, max_length: 24}}
benchmark: {{sequence_length: 16, rounds: 1}}
steps:
  student: {{run: distill, teacher: {foreign[0]}, num_layers: 2, max_steps: 2, teacher_label_map: {MAP}}}
""")
    plan = make_plan(load_recipe(path))
    print_plan(plan)
    run_plan(plan)
    baseline, student = asdict(write_report(plan))["models"]
    assert baseline["num_parameters"] > student["num_parameters"]
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student").config.num_labels == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "acme/none"}, "its adapters belong to acme/none: no such folder here"),
        ({"base_model_name_or_path": "./none"}, r"its adapters belong to \./none: no such file or folder"),
        ({"target_modules": ["query"]}, r"its adapters are not those of .*value\.lora_A"),
        ({"r": 4}, "its adapters are not those of"),
    ],
)
def test_adapters_of_another_model_are_refused_in_one_message(foreign, tmp_path, change, message):
    folder = tmp_path / "adapter"
    shutil.copytree(foreign[0], folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_classifier(str(folder), THREE, label_map=MAP)


def test_adapters_are_no_model_to_start_from(foreign):
    with pytest.raises(InputError, match="holds adapters, and this starts from a whole model; merge them"):
        find_model(str(foreign[0]))


def test_other_adapters_are_another_model(foreign, tmp_path):
    shutil.copytree(foreign[0], tmp_path / "a")
    before = find_model(str(tmp_path / "a"), adapters=True).fingerprint
    file = tmp_path / "a" / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: weight + 1 for name, weight in weights.items()}, file, metadata={"format": "pt"})
    assert find_model(str(tmp_path / "a"), adapters=True).fingerprint != before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_adapters_train_the_whole_head(architecture):
    adapted = with_adapters(small_model(architecture), lora_config({}, "classification"))
    trained = {name for name, each in adapted.named_parameters() if each.requires_grad and "lora_" not in name}
    heads = {"gpt2": ["score"], "distilbert": ["pre_classifier", "classifier"]}.get(architecture, ["classifier"])
    assert {name.split(".")[2] for name in trained} == set(heads)
