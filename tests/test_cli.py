import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from distill.cli import main
from distill.compression.quantization.formats import QuantizationSettings
from distill.compression.quantization.quantize import quantize_model
from distill.compression.student import build_student
from distill.data.load import DataOptions, load_data
from distill.errors import InputError
from distill.evaluation.benchmark import (
    BenchmarkOptions,
    benchmark_models,
    remarks_on,
    slower_or_not_smaller,
)
from tests.conftest import sentences, tiny_bert, write_rows
from tests.records import entry_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """A classifier, a student of it, and both quantized."""
    folder = tmp_path_factory.mktemp("cli")
    teacher = tiny_bert(id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    for name, model in {
        "teacher": teacher,
        "student": build_student(teacher, num_layers=2),
        "nf4": quantize_model(build_student(teacher, num_layers=2), format="nf4"),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def last_line(text):
    return json.loads(text.strip().splitlines()[-1])


def test_bench_ends_with_one_json_object(models, capsys):
    names = [str(models / name) for name in ("teacher", "student", "nf4")]
    options = ["--sequence_length", "16", "--rounds", "2", "--throughput_batch_size", "2"]
    assert main(["bench", *names, *options, "--price_per_hour", "0.36"]) == 0
    found = last_line(capsys.readouterr().out)
    assert [row["name"] for row in found["models"]] == names
    assert found["options"]["sequence_length"] == 16
    assert found["environment"]["threads"] == torch.get_num_threads()
    for row, name in zip(found["models"], names, strict=True):
        assert row["size_on_disk_bytes"] == (Path(name) / "model.safetensors").stat().st_size
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p95"]
        spread = row["throughput_spread"]
        assert 0 < spread["min"] <= row["throughput_samples_per_second"] <= spread["max"]
        cost = {"1": row["latency_ms"]["p50"] / 10, "2": 100 / row["throughput_samples_per_second"]}
        assert row["cost_per_million"] == pytest.approx(cost, abs=1e-6)
        assert row["joules_per_sample"] is None or row["joules_per_sample"] > 0
    assert found["price_per_hour"] == 0.36
    teacher, student, nf4 = found["models"]
    assert teacher["num_parameters"] == sum(p.numel() for p in tiny_bert().parameters())
    assert teacher["memory_bytes"] == 4 * teacher["num_parameters"] + 2 * 8 * 64  # and two buffers of position ids
    assert student["flops_per_sample"] == nf4["flops_per_sample"] < teacher["flops_per_sample"]


def test_bench_refuses_rows_longer_than_the_model(models):
    with pytest.raises(InputError, match="takes at most 64 tokens"):
        benchmark_models({"teacher": str(models / "teacher")}, BenchmarkOptions(sequence_length=65, rounds=1))


def row(name, size, latency, throughput):
    content = {
        "name": name, "size_on_disk_bytes": size, "latency_ms": {"p50": latency, "p95": latency},
        "throughput_samples_per_second": throughput, "device": "cpu", "memory_bytes": size or 2e6,
    }  # fmt: skip
    return entry_of(content)


def test_no_gain_is_said_in_words():
    parent = row("student", 4e6, 10.0, 100.0)
    assert slower_or_not_smaller(row("q", 1e6, 10.4, 96.0), parent) == []  # within noise
    said = slower_or_not_smaller(row("q", 4e6, 12.0, 80.0), parent)
    assert said == [
        "q is not smaller than student: 4.0 MB against 4.0 MB.",
        "q is slower than student on cpu: 12.0 ms against 10.0 ms (1.20×).",
        "q has less throughput than student on cpu: 80.0 against 100.0 rows/s (0.80×).",
    ]


def test_what_is_faster_than_a_quantized_model_on_a_cpu_is_named():
    parent, variants = row("student", 4e6, 10.0, 100.0), [row("student in bf16", None, 5.0, 200.0)]
    variants += [row("q with threshold 0", None, 7.0, 150.0), row("other in bf16", None, 1.0, 900.0)]
    assert remarks_on(row("q", 1e6, 8.0, 180.0), parent, variants) == [
        "q is slower than student in bf16 on cpu: 8.0 ms against 5.0 ms (1.60×).",
        "q has less throughput than student in bf16 on cpu: 180.0 against 200.0 rows/s (0.90×).",
        "q is slower than q with threshold 0 on cpu: 8.0 ms against 7.0 ms (1.14×).",
    ]
    assert remarks_on(row("q", 2e6, 5.5, 190.0), parent, variants[:1]) == []  # in bf16 itself


@pytest.mark.skipif(torch.cuda.is_available(), reason="measured on CPUs alone")
def test_variants_are_measured_beside_quantized_models(models, tmp_path):
    settings = QuantizationSettings(format="int8", threshold=6.0)
    quantize_model(tiny_bert(), settings).save_pretrained(tmp_path / "int8")
    locations = {"teacher": str(models / "teacher"), "nf4": str(models / "nf4"), "int8": str(tmp_path / "int8")}
    options = BenchmarkOptions(sequence_length=16, rounds=1, throughput_batch_size=2)
    found = benchmark_models(locations, options, made_from={"nf4": "teacher", "int8": "teacher"})
    assert list(found) == [*locations, "teacher in bf16", "int8 with threshold 0"]
    # half the bytes, but for the position ids
    assert found["teacher in bf16"].memory_bytes == pytest.approx(found["teacher"].memory_bytes / 2, rel=0.01)
    assert found["teacher in bf16"].size_on_disk_bytes is None
    assert list(benchmark_models({"nf4": locations["nf4"]}, options)) == ["nf4"]


def test_eval_ends_with_the_metrics(models, sst2_folder, capsys):
    assert main(["eval", str(models / "nf4"), "--task", "sst2", "--data.path", str(sst2_folder)]) == 0
    out = capsys.readouterr().out
    found = last_line(out)
    accuracy, (low, high) = found["metrics"]["accuracy"], found["interval"]
    assert 0 <= low <= accuracy <= high <= 1
    assert found["rows"] == {"validation": 40}
    assert re.search(rf"accuracy +│ {accuracy:.4f} +│ {low:.3f}–{high:.3f}", out)
    assert "validation: 40 rows" in out


def test_evals_help_tells_how_to_score_own_rows(models, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "recipe" not in shown
    (example,) = (line for line in shown.splitlines() if "--data.kind" in line)
    rows = [{"review": row["sentence"], "verdict": ["negative", "positive"][row["label"]]} for row in sentences(7)]
    path = write_rows(tmp_path / "reviews.jsonl", rows)
    command = example.strip().replace("MODEL", str(models / "teacher")).replace("reviews.csv", str(path))
    assert main(command.removeprefix("distill ").split()) == 0
    assert last_line(capsys.readouterr().out)["rows"] == {"validation": 7}


def test_eval_scores_every_row_of_one_file(models, tmp_path, capsys):
    from distill.evaluation.evaluate import evaluate_model
    from distill.models.load import load_classifier, load_tokenizer

    rows = [
        {"text": row["sentence"], "label": "positive"} for row in sentences(7) if row["label"] == 1
    ]  # one class only
    path = write_rows(tmp_path / "some.jsonl", rows)
    arguments = ["eval", str(models / "teacher"), "--data.kind", "classification", "--data.path", str(path)]
    assert main(arguments) == 0
    accuracy = last_line(capsys.readouterr().out)["metrics"]["accuracy"]
    options = DataOptions(kind="classification", path=str(path), label_names=["negative", "positive"])
    data = load_data(None, options, to_score=True)
    assert len(data.splits["validation"]) == len(rows)
    model = load_classifier(str(models / "teacher"), data.task)
    tokenizer = load_tokenizer(str(models / "teacher"))
    assert accuracy == evaluate_model(model, tokenizer, data).metrics["accuracy"]
    assert (accuracy * len(rows)) % 1 == pytest.approx(0, abs=1e-9)


def test_eval_says_how_it_reads_labels_that_are_numbers(models, tmp_path, capsys):
    path = write_rows(
        tmp_path / "some.jsonl", [{"text": row["sentence"], "label": row["label"]} for row in sentences(9)]
    )
    arguments = ["eval", str(models / "teacher"), "--data.kind", "classification", "--data.path", str(path)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "column 'label' holds numbers, read as ids: 0 is negative, 1 is positive" in " ".join(first.split())
    assert main([*arguments, "--label_map", "{negative: 0, positive: 1}"]) == 0
    second = capsys.readouterr().out
    assert "holds numbers" not in second
    assert last_line(first)["metrics"]["accuracy"] == last_line(second)["metrics"]["accuracy"]


def test_check_says_which_classes_are_hardly_two(models, tmp_path, capsys):
    names = ("Positive", "positive ", "negative")
    rows = [{"text": row["sentence"], "label": names[number % 3]} for number, row in enumerate(sentences(60))]
    path = write_rows(tmp_path / "train.jsonl", rows)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path / 'out'}\ndata: {{kind: classification, path: {path}, max_length: 24}}\n"
        "benchmark: {sequence_length: 16}\n"
        f"steps: {{a: {{run: finetune, model: {models / 'teacher'}, max_steps: 1}}}}\n"
    )
    assert main(["check", str(recipe)]) == 0
    assert "differ by case or spaces alone: 'Positive', 'positive '" in " ".join(capsys.readouterr().out.split())


def test_eval_with_a_label_map(models, sst2_folder, tmp_path, capsys):
    for file in (models / "teacher").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = AutoConfig.from_pretrained(tmp_path)
    config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    config.save_pretrained(tmp_path)
    arguments = ["eval", str(tmp_path), "--task", "sst2", "--data.path", str(sst2_folder)]
    assert main(arguments) == 2
    assert "label_map" in capsys.readouterr().err
    accuracies = []
    for names in ("negative, positive", "positive, negative"):
        first, second = names.split(", ")
        assert main([*arguments, "--label_map", f"{{LABEL_0: {first}, LABEL_1: {second}}}"]) == 0
        accuracies.append(last_line(capsys.readouterr().out)["metrics"]["accuracy"])
    assert sum(accuracies) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["run", "nowhere.yaml", "--a.b"], "--a.b: needs a value"),
        (["run", "--a.b", "4", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["eval", "/no/model", "--task", "sst2"], "/no/model: no such file or folder"),
        (["eval", "m", "--student.temperature", "2"], "--student.temperature: no such option; eval takes"),
        (["bench", "m", "--data.path", "x"], "--data.path: no such option of bench"),
        (["bench", "/no/model"], "/no/model: no such file or folder"),
        (["bench", "/no/model", "--rounds", "none"], "bench.rounds: should be a valid integer"),
        (["bench", "/no/model", "--price_per_hour", "0"], "bench.price_per_hour: should be greater than 0"),
        (["report", "/no/run"], "/no/run: no run lies there"),
        (["check"], "name a recipe"),
        (["run", "recipes/quickstart.yaml", "--accelerate_config", "multi_gpux"], "did you mean 'multi_gpu'"),
    ],
)
def test_wrong_input_is_one_message_and_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_unknown_options_end_with_status_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["run", "recipe.yaml", "--forse"])
    assert exit_.value.code == 2
    assert "unrecognized arguments: --forse" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", "r.yaml", "--bogus", "3"], "a step's option is --STEP.bogus, the data's --data.bogus"),
        (["check", "r.yaml", "--only", "a"], "--only belongs to distill run; check goes over every step"),
        (["check", "r.yaml", "--max_length=3"], "a step's option is --STEP.max_length, the data's --data.max_length"),
        (["eval", "m", "--path", "x"], "eval takes --task, --label_map and --data.<option>"),
        (["bench", "m", "--round", "3"], "distill bench --help"),
    ],
)
def test_an_unknown_flag_is_told_with_the_form_it_should_have(arguments, hint, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "unrecognized arguments: --" in error
    assert hint in error


def test_a_wrong_recipe_leaves_nothing_behind(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"task: sst3\noutput_dir: {tmp_path / 'out'}\nsteps: {{a: {{run: finetune, model: /none}}}}")
    assert main(["run", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'sst2'" in error
    assert "steps.a.model: /none: no such file or folder" in error
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("command", [["check"], ["run"], ["run", "--accelerate_config", "cpu"]])
def test_values_data_and_models_are_told_at_once(tmp_path, pretrained, monkeypatch, capsys, command):
    monkeypatch.chdir(ROOT)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"taks: sst2\noutput_dir: {tmp_path / 'out'}\ndata: {{kind: classification, path: /no/rows, max_length: 24}}\n"
        "benchmark: {rounds: 0}\nbaseline: /no/baseline\nsteps:\n"
        f"  teacher: {{run: finetune, model: {pretrained}, learning_rate: -1, fp16: true, bf16: true}}\n"
        "  student: {run: distill, teacher: teacher, temprature: 3, model: /no/student}\n"
        "  small: {run: distill, teacher: later, num_layers: 2}\n"
        "  later: {run: finetun, model: /no/matter}\n"
        "  q: {run: quantize, model: student, format: int4}\n"
        f"  deep: {{run: finetune, model: {pretrained}, num_layers: 9}}\n"
    )
    assert main([*command, str(recipe)]) == 2
    captured = capsys.readouterr()
    expected = [
        "taks: unknown key; did you mean 'task'?",
        "benchmark.rounds: should be greater than or equal to 1",
        "steps.teacher.learning_rate: should be greater than 0",
        "steps.teacher: At most one of fp16 and bf16",
        "steps.student.temprature: unknown option; did you mean 'temperature'?",
        "steps.later.run: no verb 'finetun'; did you mean 'finetune'?",
        "steps.q.format: should be 'int8', 'nf4', 'fp4' or 'bf16'; got 'int4'",
        "data.path: /no/rows: no such file or folder",
        "steps.student.model: /no/student: no such file or folder",
        "steps.small.teacher: 'later' is not an earlier step",
        "steps.deep.num_layers: 9 is out of range; the model has 4 layers",
        "baseline: /no/baseline: no such file or folder",
    ]
    for part in expected:
        assert part in captured.err, f"{part!r} is not in\n{captured.err}"
    assert captured.err.count("error:") == len(expected)
    assert "Traceback" not in captured.err + captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_a_mistyped_steps_name_is_no_hub_id(tmp_path, pretrained, sst2_folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("distill.common.sources._go_offline_if_unreachable", lambda: asked.append(True))
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'out'}\ndata: {{path: {sst2_folder}, max_length: 24}}\n"
        f"baseline: teachr\nsteps:\n  teacher: {{run: finetune, model: {pretrained}}}\n"
        "  student: {run: distill, teacher: taecher}\n  q: {run: quantize, model: studnt, format: int8}\n"
    )
    assert main(["check", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "steps.student.teacher: no step 'taecher'; did you mean 'teacher'?" in error
    assert "steps.q.model: no step 'studnt'; did you mean 'student'?" in error
    assert "baseline: no step 'teachr'; did you mean 'teacher'?" in error
    assert error.count("error:") == 3
    assert not asked
    assert "Hub" not in error
    (tmp_path / "studnt").mkdir()  # a folder of that name is meant
    assert main(["check", str(recipe)]) == 2
    assert "steps.q.model: studnt: holds no config.json" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace("studnt", "org/student").replace("baseline: teachr", ""))
    assert main(["check", str(recipe)]) == 2
    assert "org/student: no such folder here, and not to be had from the Hub" in capsys.readouterr().err


def test_what_was_typed_on_the_command_line_is_named_as_it_was_typed(tmp_path, pretrained, sst2_folder, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'out'}\ndata: {{path: {sst2_folder}, max_length: 1}}\nsteps:\n"
        f"  teacher: {{run: finetune, model: {pretrained}, learning_rate: -1}}\n"
        "  student.v1: {run: distill, teacher: teacher}\n"
        f"  deep: {{run: finetune, model: {pretrained}}}\n"
    )
    typed = {
        "student.v1.temperature": "0",
        "student.v1.temprature": "3",
        "deep.num_layers": "9",
        "benchmark.rounds": "0",
    }
    flags = [part for key, value in typed.items() for part in (f"--{key}", value)]
    assert main(["check", str(recipe), *flags, "--output_dir=7"]) == 2
    error = capsys.readouterr().err
    for line in (
        "error: --student.v1.temperature: should be greater than 0",
        "error: --student.v1.temprature: unknown option; did you mean 'temperature'?",
        "error: --deep.num_layers: 9 is out of range",
        "error: --benchmark.rounds: should be greater than or equal to 1",
        "error: --output_dir: ",
        f"error: {recipe}: steps.teacher.learning_rate: should be greater than 0",
        f"error: {recipe}: data.max_length: should be greater than or equal to 2",
    ):
        assert line in error, f"{line!r} is not in\n{error}"
    assert error.count("error:") == 7
    data = ["--data.max_length", "24", "--data.path", "/no/rows", "--task", "sst3"]
    assert main(["check", str(recipe), *data]) == 2
    assert "error: --task: 'sst3' is not a GLUE task" in capsys.readouterr().err
    assert main(["check", str(recipe), *data[:4]]) == 2
    assert "error: --data.path: /no/rows: no such file" in capsys.readouterr().err
    assert main(["eval", str(pretrained), "--data.max_length", "1"]) == 2
    assert "error: --data.max_length: should be" in capsys.readouterr().err


def test_wrong_data_options_do_not_hide_the_models_problems(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'out'}\ndata: {{max_length: 1}}\n"
        "steps: {a: {run: finetune, model: /no/model}}"
    )
    assert main(["check", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "data.max_length: should be greater than or equal to 2" in error
    assert "steps.a.model: /no/model: no such file or folder" in error
    assert error.count("error:") == 2


def test_missing_steps_do_not_hide_other_problems(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("task: sst3\noutput_dir: x\nstep: {a: {run: finetune, model: /no/model}}")
    assert main(["check", str(recipe), "--a.seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "steps: missing; a recipe names at least one step" in error
    assert "step: unknown key; did you mean 'steps'?" in error
    assert "task: 'sst3' is not a GLUE task; did you mean 'sst2'?" in error
    assert error.count("error:") == 3


def test_a_training_that_diverges_ends_with_its_part_and_step(tmp_path, pretrained, sst2_folder, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'out'}\ndata: {{path: {sst2_folder}, max_length: 24}}\n"
        "benchmark: {sequence_length: 24}\nsteps:\n"
        f"  a: {{run: finetune, model: {pretrained}, max_steps: 30, learning_rate: 1e30, max_grad_norm: 0}}\n"
    )
    assert main(["run", str(recipe)]) == 1
    err = capsys.readouterr().err
    assert "NaN or infinite at step" in err
    assert "Lower learning_rate" in err
    assert "Traceback" not in err


def test_check_tells_what_a_recipe_will_do_and_writes_nothing(tmp_path, pretrained, sst2_folder, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'out'}\ndata: {{path: {sst2_folder}, max_length: 24}}\n"
        "benchmark: {sequence_length: 24}\nsteps:\n"
        f"  teacher: {{run: finetune, model: {pretrained}, num_train_epochs: 2}}\n"
        "  student: {run: distill, teacher: teacher, student_arch: distilbert, hidden_weight: 1}\n"
        "  aware: {run: distill, model: student, teacher: student, qat: nf4, qat_activations: true, qat_delay: 0.25}\n"
        "  q: {run: quantize, model: student, format: int8}\n"
    )
    assert main(["check", str(recipe)]) == 0
    out = capsys.readouterr().out
    for part in (
        "quantization-aware: nf4 weights, int8 embeddings, 8-bit inputs, after 25% of its steps",
        "labels: negative, positive", "rows: train 96, validation 40", "6 optimizer steps",
        "source layers 0, 3 (from 0)", "hidden loss: 1→2, 2→4 (student→teacher", "of training on this machine",
        "teacher teacher: 0.1 M parameters, 0.6 MB of weights", "of teacher outputs cached on disk",
    ):  # fmt: skip
        assert part in out, f"{part!r} is not in\n{out}"
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("name", ["finetune", "distill", "quantize", "trim_vocabulary", "data", "benchmark"])
def test_options_are_listed_with_defaults_and_help(name, capsys):
    assert main(["check", "--help-options", name]) == 0
    out = capsys.readouterr().out
    expected = {"finetune": "num_layers", "distill": "temperature", "quantize": "double_quant", "data": "max_length"}
    expected["trim_vocabulary"] = "coverage"
    assert expected.get(name, "rounds") in out
    assert "MISSING" not in out
    if name == "finetune":
        assert re.search(r"include_for_metrics +\[\] +Include", out)


def test_ctrl_c_ends_with_status_1(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.commands.on_recipes.load_recipe", interrupted)
    assert main(["run", str(ROOT / "recipes" / "quickstart.yaml")]) == 1
    assert "goes on from the last checkpoint" in capsys.readouterr().err


def test_the_installed_command_exits_with_the_status():
    command = Path(sys.executable).parent / "distill"
    done = subprocess.run([str(command), "run", "nowhere.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere.yaml: no such recipe")


def test_without_a_network_one_message_and_no_minute_of_retries(tmp_path):
    recipe = ROOT / "recipes" / "glue" / "sst2.yaml"
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "distill.cli", "check", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2
    assert "http://127.0.0.1:9 cannot be reached" in done.stderr
    assert "data.path: nyu-mll/glue (sst2)" in done.stderr
    assert "steps.teacher.model: google-bert/bert-base-uncased" in done.stderr
    assert "Retrying" not in done.stderr
    assert "Traceback" not in done.stderr
