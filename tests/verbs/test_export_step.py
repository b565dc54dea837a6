"""The export verb in whole runs: planned sizes, what the step decides, exports as models of a report, wrong options."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from distill import InputError, load_exported, quantize_model
from distill.cli import main
from distill.common.records import read_step
from distill.compression.quantization.grids import simulated_grids
from distill.evaluation.evaluate import evaluate_model
from distill.evaluation.loading import load_scored
from distill.export.graph import float_graph
from distill.export.record import read_export
from distill.models.folders import find_model, size_on_disk
from distill.models.load import load_processor
from distill.recipes.check import estimate_step, print_plan
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.report import write_report
from distill.runs.run import run_plan
from distill.verbs.export import EXPORT, ExportOptions
from tests.conftest import GOOD, sentences, tiny_bert
from tests.verbs.test_trim_step import word_pieces

ROOT = Path(__file__).parents[2]
STEPS = """
  teacher: {run: finetune, model: MODEL, max_steps: 24, learning_rate: 1e-3}
  trimmed: {run: trim_vocabulary, model: teacher, vocab_size: 88}
  pruned: {run: prune, model: trimmed, heads: [2], neurons: [96], calibration_rows: 20}
  student: {run: distill, teacher: teacher, model: pruned, max_steps: 8, learning_rate: 1e-3}
  served: {run: export, model: student, format: int8, agreement: 0.9, divergence: 0.05}
  vino: {run: export, model: student, engine: openvino, format: int8, agreement: 0.9, divergence: 0.05}
  said: {run: export, model: student, format: int8, float_layers: [LAYER]}
  four: {run: export, model: student, format: int4, embeddings: int4, agreement: 0.5, divergence: 1, web: true}
  aware: {run: distill, model: student, teacher: student, qat: onnxruntime, max_steps: 2}
  aware-served: {run: export, model: aware, format: int8}
"""
LAYER = "bert.encoder.layer.0.output.dense"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A classifier whose words take most of its bytes."""
    folder = tmp_path_factory.mktemp("models") / "big"
    torch.manual_seed(0)
    tokenizer = word_pieces()
    model = tiny_bert(num_hidden_layers=1, hidden_size=128, intermediate_size=256, vocab_size=2000)
    model.config.id2label = {0: "negative", 1: "positive"}
    model.config.label2id = {"negative": 0, "positive": 1}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder, model, data, steps=STEPS):
    path = folder / "r.yaml"
    path.write_text(
        f"task: sst2\noutput_dir: {folder / 'run'}\ndata: {{path: {data}, max_length: 24}}\n"
        "benchmark: {sequence_length: 16, throughput_batch_size: 2, rounds: 1}\n"
        f"steps:{steps.replace('MODEL', str(model)).replace('LAYER', LAYER)}"
    )
    return path


_GRAPHS = {}


def traced(model, inputs):
    """`float_graph`, which translates the same weights once."""
    key = tuple(float(each.double().sum()) for each in model.parameters())
    if key not in _GRAPHS:
        _GRAPHS[key] = float_graph(model, inputs)
    return _GRAPHS[key]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, sst2_folder):
    plan = make_plan(load_recipe(write_recipe(tmp_path_factory.mktemp("runs"), model, sst2_folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.export.export.float_graph", traced)
        run_plan(plan)
    return plan


@pytest.fixture(scope="module")
def report(finished):
    return write_report(finished)


EXPORTS = ("served", "vino", "said", "four", "aware-served")


def test_each_step_stays_below_the_size_that_check_told(finished):
    for name in EXPORTS:
        planned = finished.steps[name]
        estimate, size = estimate_step(finished, planned), size_on_disk(planned.folder)
        graph = 40_000 if name != "vino" else 0  # names and operators; OpenVINO's lie in another file
        assert estimate.weight_bytes == planned.plan.weight_bytes
        assert planned.plan.least_bytes <= size <= planned.plan.weight_bytes + graph
        assert read_step(planned.folder).decided["weight_bytes"] == size
    said, served = finished.steps["said"].plan, finished.steps["served"].plan
    assert said.least_bytes == said.weight_bytes > served.least_bytes
    assert served.weight_bytes > said.weight_bytes


def test_check_says_what_an_export_will_be(finished, monkeypatch):
    said = []
    monkeypatch.setattr("distill.recipes.check.results.print", lambda text="": said.append(str(text).strip()))
    print_plan(finished)
    assert "served: export of student" in said
    (line,) = (line for line in said if line.startswith("int8 for openvino"))
    assert re.fullmatch(r"int8 for openvino, as many of 6 layers as keep its predictions: 0\.\d MB with all", line)
    assert "int8 for onnxruntime, 5 of 6 layers in int8" in said


def test_an_engine_aware_model_is_exported_on_the_scales_that_it_was_trained_with(finished, capsys):
    kept, grids = (read_export(finished.steps["aware-served"].folder), simulated_grids(finished.steps["aware"].folder))
    assert kept.trained_for == "onnxruntime"
    assert set(kept.quantized_layers) == set(grids.of_layers())
    assert read_export(finished.steps["served"].folder).trained_for is None
    chosen = {**vars(finished.steps["aware-served"].step.options), "float_layers": [LAYER]}
    planned = replace(finished.steps["aware-served"], folder=finished.steps["aware"].folder)
    folder = finished.recipe.output_dir / "chosen"
    EXPORT.run(ExportOptions(**chosen), planned.plan, finished.data, folder, profile=False)
    assert "float_layers: given, so the scales that the model was trained with are left" in capsys.readouterr().err
    assert (read_export(folder).trained_for, read_export(folder).float_layers) == (None, [LAYER])


def test_predict_takes_an_export_as_any_model(finished, tmp_path):
    rows = [{"sentence": row["sentence"]} for row in sentences(6, seed=2)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predicted = {}
    for name in ("student", "served", "vino", "four"):
        output = tmp_path / f"{name}.jsonl"
        given = ["--data.path", str(tmp_path / "new.jsonl"), "--output", str(output)]
        assert main(["predict", str(finished.steps[name].folder), *given]) == 0
        predicted[name] = [json.loads(line)["probabilities"]["positive"] for line in output.read_text().splitlines()]
    assert len(predicted["student"]) == 6
    for name in ("served", "vino", "four"):
        assert predicted[name] == pytest.approx(predicted["student"], abs=0.1)
        assert predicted[name] != predicted["student"]


def test_what_is_decided_is_recorded_and_said_again_gives_the_same_model(finished, tmp_path, sst2_folder, monkeypatch):
    record = read_step(finished.steps["served"].folder)
    assert (record.parents, record.ancestors["student"], record.status) == (["student"], "distill", "finished")
    assert record.wall_seconds > 0
    kept = read_export(finished.steps["served"].folder)
    assert record.decided["float_layers"] == kept.float_layers
    assert (record.decided["calibration_rows"], kept.calibration_rows) == (96, 96)
    assert record.decided["agreement"] >= 0.9
    assert record.decided["divergence"] <= 0.05
    assert read_export(finished.steps["said"].folder).float_layers == [LAYER]
    monkeypatch.setattr("distill.export.export.float_graph", traced)
    student = finished.steps["student"].folder
    steps = (
        f"\n  again: {{run: export, model: {student}, format: int8, float_layers: {json.dumps(kept.float_layers)}}}\n"
    )
    run_plan(make_plan(load_recipe(write_recipe(tmp_path, student, sst2_folder, steps))))
    first, second = (folder / kept.file for folder in (finished.steps["served"].folder, tmp_path / "run" / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_an_export_that_was_cut_off_leaves_no_folder_and_is_made_by_the_next_run(
    finished, tmp_path, sst2_folder, monkeypatch
):
    monkeypatch.setattr("distill.export.export.float_graph", traced)
    student = finished.steps["student"].folder
    path = write_recipe(tmp_path, student, sst2_folder, "\n  it: {run: export, model: MODEL}\n")
    with monkeypatch.context() as patch:
        patch.setattr("distill.export.export._move", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            run_plan(make_plan(load_recipe(path)))
    assert not [each.name for each in (tmp_path / "run").iterdir() if each.is_dir()]
    assert run_plan(make_plan(load_recipe(path))) == ["it"]
    assert run_plan(make_plan(load_recipe(path))) == []
    (tmp_path / "run" / "it" / "onnx" / "model.onnx").unlink()
    assert run_plan(make_plan(load_recipe(path))) == ["it"]


def test_other_processes_leave_the_export_to_the_main_one(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.verbs.export.on_main_process", lambda work: None)
    planned = finished.steps["served"]
    made = EXPORT.run(planned.step.options, planned.plan, finished.data, tmp_path / "it", profile=False)
    assert made.decided is None
    assert not (tmp_path / "it").exists()


def test_exports_are_entries_of_the_report_like_any_model(finished, report):
    entries = {model.name: model for model in report.models}
    student = entries["student"]
    assert (student.engine, student.threads) == ("torch", torch.get_num_threads())
    for name, engine in (("served", "onnxruntime"), ("vino", "openvino"), ("said", "onnxruntime")):
        entry = entries[name]
        assert (entry.run, entry.engine, entry.threads) == ("export", engine, torch.get_num_threads())
        assert (entry.num_parameters, entry.flops_per_sample) == (student.num_parameters, student.flops_per_sample)
        assert entry.size_on_disk_bytes == size_on_disk(finished.steps[name].folder) < student.size_on_disk_bytes
        assert entry.memory_bytes is None
        assert min(entry.latency_ms.p50, entry.throughput_samples_per_second) > 0
        assert entry.divergence["mean"] > 0
        assert 0.5 < entry.agreement <= 1
        assert entry.calibration is not None
        assert entry.flips is not None
    assert student.flops_per_sample < entries["trimmed"].flops_per_sample
    assert "student in bf16" in [variant.name for variant in report.variants]
    assert report.environment["onnxruntime"]
    assert report.environment["openvino"]
    text = (finished.recipe.output_dir / "report.md").read_text()
    threads = torch.get_num_threads()
    given = f"{threads} thread{'s' * (threads != 1)}"
    assert f"computed: teacher, trimmed, pruned, student, aware by torch with {given}; " in text
    assert f"served, said, four, aware-served by onnxruntime with {given}; vino by openvino with {given}." in text


def test_a_second_run_measures_and_makes_nothing(finished, report, capsys, monkeypatch):
    monkeypatch.setattr("distill.reports.report.load_scored", None)
    monkeypatch.setattr("distill.reports.report.benchmark_models", None)
    assert write_report(finished) == report
    assert run_plan(finished) == []
    assert capsys.readouterr().err.count("finished already") == 10


def test_eval_and_bench_take_the_folder(finished, report, tmp_path, capsys):
    folder = tmp_path / "elsewhere"
    shutil.copytree(finished.steps["served"].folder, folder)
    assert main(["eval", str(folder)]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["metrics"] == report.entry("served").metrics
    assert (scored["engine"], scored["threads"]) == ("onnxruntime", torch.get_num_threads())
    student = finished.steps["student"].folder
    options = ["--sequence_length", "16", "--rounds", "1", "--throughput_batch_size", "2"]
    assert main(["bench", str(student), str(folder), *options]) == 0
    timed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [model["engine"] for model in timed["models"]] == ["torch", "onnxruntime"]
    assert timed["variants"][0]["name"] == f"{student} in bf16"
    assert timed["environment"]["onnxruntime"]
    assert "openvino" not in timed["environment"]
    (folder / "onnx" / "model_quantized.onnx").unlink()
    for command in ("eval", "bench"):
        assert main([command, str(folder)]) == 2
        assert "the model that its export.json names is missing" in " ".join(capsys.readouterr().err.split())


def test_labels_in_another_order_are_reordered_and_other_kinds_refused(finished, tmp_path):
    folder, data = tmp_path / "swapped", finished.data
    shutil.copytree(finished.steps["served"].folder, folder)
    before = load_scored(str(folder), data.task)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "positive", "1": "negative"}, "label2id": {"positive": 0, "negative": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    after = load_scored(str(folder), data.task)
    ids = torch.randint(5, 80, (3, 9))
    torch.testing.assert_close(after(input_ids=ids).logits, before(input_ids=ids).logits.flip(1))
    assert after.config.id2label == {0: "negative", 1: "positive"}
    record = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(record | {"architecture": "BertForTokenClassification"}))
    with pytest.raises(InputError, match="is an export of BertForTokenClassification; classification is scored with"):
        load_scored(str(folder), data.task)


@pytest.mark.parametrize("name", ["served", "vino"])
def test_a_rows_result_does_not_depend_on_the_other_rows_of_its_batch(finished, name):
    computed = load_exported(finished.steps[name].folder, threads=1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 80, (1, 9), generator=generator)
    alone = computed(input_ids=ids).logits
    for batch in range(32):
        length = 9 + batch % 16  # the row is padded to the longest
        others = torch.randint(5, 80, (7, length), generator=generator)
        row = torch.nn.functional.pad(ids, (0, length - 9))
        mask = torch.ones(8, length, dtype=torch.long)
        mask[0, 9:] = 0
        together = computed(input_ids=torch.cat([row, others]), attention_mask=mask).logits[:1]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_pipeline_and_the_metrics_are_those_of_the_parent(finished, report):
    texts = [row["sentence"] for row in sentences(20, seed=7)]
    student = finished.steps["student"].folder
    tokenizer = AutoTokenizer.from_pretrained(student)
    expected = pipeline("text-classification", str(student), tokenizer=tokenizer, device="cpu")(texts, truncation=True)
    exported = load_exported(finished.steps["served"].folder)
    found = pipeline("text-classification", model=exported, tokenizer=tokenizer)(texts, truncation=True)
    same = sum(a["label"] == b["label"] for a, b in zip(found, expected, strict=True))
    assert same >= 18
    folder = str(finished.steps["served"].folder)
    processor = load_processor(folder, "classification")
    evaluation = evaluate_model(load_scored(folder, finished.data.task), processor, finished.data, batch_size=3)
    assert evaluation.metrics == report.entry("served").metrics


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "distill"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Blocked())
exec(sys.stdin.read(), {"__name__": "__main__"})
"""


@pytest.mark.parametrize("name", ["served", "vino"])
def test_the_cards_snippet_needs_neither_torch_nor_transformers(finished, report, name):
    folder = finished.steps[name].folder
    card = ModelCard.load(folder / "README.md")
    (code,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    text = "The plot is thin, but the cast was great."
    texts = [text, f"the {GOOD[0]} film", "a dull end", " ".join(["great"] * 60)]
    code = code.replace(f'["{text}"]', json.dumps(texts))
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], input=code, cwd=folder.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exported = load_exported(folder)
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 24
    scores = exported(**inputs).logits.softmax(-1)
    assert [label for label, _ in found] == [exported.config.id2label[int(row.argmax())] for row in scores]
    assert [float(score) for _, score in found] == pytest.approx(scores.max(-1).values.tolist(), abs=1e-3)


def test_the_card_says_what_was_exported_and_how(finished, report):
    card = ModelCard.load(finished.steps["vino"].folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("openvino", "text-classification")
    assert {"export", "openvino", "int8", "distillation", "pruning"} <= set(card.data.tags)
    assert "`student` exported for openvino in int8" in card.text
    assert "Static scales of activations from 96 training rows" in card.text
    card = ModelCard.load(finished.steps["said"].folder / "README.md")
    assert (card.data.library_name, {"onnx"} <= set(card.data.tags)) == ("onnx", True)
    assert f"Layers of its blocks that stay in float: {LAYER}" in card.text
    assert "import distill" not in card.text


def test_the_calibration_rows_belong_to_an_int8_export_alone(finished, tmp_path, model, sst2_folder):
    path = write_recipe(tmp_path, model, sst2_folder, "\n  int8: {run: export, model: MODEL, format: int8}\n"
                        "  plain: {run: export, model: MODEL}\n")  # fmt: skip
    plans = [make_plan(load_recipe(path, {"data.max_train_rows": rows})) for rows in ("96", "50")]
    prints = [{name: planned.fingerprint for name, planned in plan.steps.items()} for plan in plans]
    assert prints[0]["plain"] == prints[1]["plain"]
    assert prints[0]["int8"] != prints[1]["int8"]


def test_wrong_options_are_told(tmp_path, model, sst2_folder, capsys):
    path = write_recipe(tmp_path, model, sst2_folder, "\n  it: {run: export, model: MODEL}\n")
    for flags, problem in [
        (["--it.engine", "onnx"], "--it.engine: should be 'onnxruntime' or 'openvino'"),
        (["--it.format", "int2"], "--it.format: should be 'fp32', 'fp16', 'int8' or 'int4'"),
        (["--it.calibrate", "true", "--it.format", "fp16"], "calibrate: a head rounded to 16 bit can't be scaled"),
        (["--it.calibrate", "true"], "calibrate: half of the validation rows (20) are too few to fit a temperature on"),
        (["--it.web", "true", "--it.engine", "openvino"], "web: browsers run exports for onnxruntime"),
        (["--it.embeddings", "same"], "embeddings: has no effect without format: int8 or int4; leave it out"),
        (["--it.calibration_rows", "8"], "calibration_rows: has no effect without format: int8"),
        (["--it.float_layers", "[]"], "float_layers: has no effect without format: int8"),
        (["--it.agreement", "0.9"], "agreement: has no effect without format: int8"),
        (["--it.format", "int8", "--it.agreement", "1.1"], "--it.agreement: should be less than or equal to 1"),
        (["--it.format", "int8", "--it.float_layers", "[]", "--it.divergence", "1"],
         "divergence: has no effect beside float_layers"),
        (["--it.format", "int8", "--it.float_layers", "[bert.encoder.layer.0.output]"],
         "--it.float_layers: 'bert.encoder.layer.0.output' is none; did you mean"),
    ]:  # fmt: skip
        assert main(["check", str(path), *flags]) == 2, flags
        assert problem in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_an_engine_that_is_not_installed_is_told_before_anything_runs(tmp_path, model, sst2_folder, monkeypatch):
    path = write_recipe(tmp_path, model, sst2_folder, "\n  it: {run: export, model: MODEL, engine: openvino}\n")
    monkeypatch.setattr("distill.export.problems.find_spec", lambda name: None if name == "openvino" else name)
    said = []
    monkeypatch.setattr("distill.common.console.log_errors", said.extend)
    assert main(["run", str(path)]) == 2
    (problem,) = said
    assert problem.endswith(
        "it.engine: openvino needs openvino, not installed here; pip install 'distill-transformers[openvino]'"
    )
    assert not (tmp_path / "run").exists()


def test_nothing_starts_from_an_export(finished, tmp_path, model, sst2_folder):
    steps = """
  served: {run: export, model: MODEL}
  next: {run: prune, model: served, neurons: 0.5}
  taught: {run: distill, teacher: served, model: MODEL, max_steps: 1}
  outside: {run: finetune, model: EXPORT, max_steps: 1}
  again: {run: export, model: EXPORT}
"""
    export = finished.steps["served"].folder
    path = write_recipe(tmp_path, model, sst2_folder, steps.replace("EXPORT", str(export)))
    with pytest.raises(InputError) as told:
        make_plan(load_recipe(path))
    of_steps = f"served is an export, the end of a chain, from which nothing is made; name {model}, which it was made"
    outside = f"{export}: is an export, the end of a chain, from which nothing is made; name student, which it was made"
    for step, option, reason in [
        ("next", "model", of_steps), ("taught", "teacher", of_steps), ("outside", "model", outside),
        ("again", "model", outside),
    ]:  # fmt: skip
        assert any(f"steps.{step}.{option}: {reason}" in problem for problem in told.value.problems), step
    with pytest.raises(InputError, match="holds no export"):
        load_exported(model)


def test_quantized_weights_name_the_float_model(tmp_path, model, sst2_folder):
    quantized = tmp_path / "nf4"
    quantize_model(AutoModelForSequenceClassification.from_pretrained(model), format="nf4").save_pretrained(quantized)
    AutoTokenizer.from_pretrained(model).save_pretrained(quantized)
    steps = f"""
  small: {{run: quantize, model: MODEL, format: int8}}
  served: {{run: export, model: small}}
  outside: {{run: export, model: {quantized}}}
"""
    with pytest.raises(InputError) as told:
        make_plan(load_recipe(write_recipe(tmp_path, model, sst2_folder, steps)))
    first, second = told.value.problems
    assert first.endswith(f"steps.served.model: small is quantized; start from the model it was made from ({model})")
    assert second.endswith(f"{quantized} is quantized; start from the model it was made from")


def test_an_export_may_be_the_baseline_and_its_record_names_files_of_its_folder(finished, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(finished.steps["served"].folder, folder)
    before = find_model(str(folder), exports=True)
    record = json.loads((folder / "export.json").read_text())
    (folder / "onnx" / "model_quantized.onnx").write_bytes(b"other")
    assert find_model(str(folder), exports=True).fingerprint != before.fingerprint
    for name in ("/etc/passwd", "../served/onnx/model.onnx", None):
        (folder / "export.json").write_text(json.dumps(record | {"file": name}))
        with pytest.raises(InputError, match=r"export\.json: names no file of the folder"):
            find_model(str(folder), exports=True)
