"""`report_to`: each step is a run of its own in trackers, called like the step."""

import os
import sys
from types import SimpleNamespace

import pytest

from distill.verbs.finetune import FinetuneOptions
from distill.verbs.training.trackers import tracked


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def options(folder, step, **more):
    made = FinetuneOptions(model="m", output_dir=str(folder / step / "checkpoints"), report_to=[])
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_the_run_is_called_like_the_step_unless_the_user_named_it(tmp_path):
    made = options(tmp_path, "student")
    with tracked(made):
        assert made.run_name == "student"
    named = options(tmp_path, "student", run_name="mine")
    with tracked(named):
        assert named.run_name == "mine"


@pytest.mark.parametrize("chosen", [None, "logs"])
def test_tensorboards_files_outlast_the_checkpoints(tmp_path, monkeypatch, chosen):
    if chosen is not None:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", chosen)
    with tracked(options(tmp_path, "student", report_to=["tensorboard"])):
        expected = f"{chosen}/student" if chosen else str(tmp_path / ".tensorboard" / "student")
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == expected
    assert os.environ.get("TENSORBOARD_LOGGING_DIR") == chosen
    with tracked(options(tmp_path, "student")):
        assert os.environ.get("TENSORBOARD_LOGGING_DIR") == chosen


@pytest.mark.parametrize(("of_user", "finished"), [(True, 0), (False, 1)])
def test_wandbs_run_ends_with_the_step_that_began_it(tmp_path, monkeypatch, of_user, finished):
    calls = []
    wandb = SimpleNamespace(run="a run" if of_user else None, finish=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with tracked(options(tmp_path, "student", report_to=["wandb"])):
        wandb.run = "a run"
    assert len(calls) == finished


def test_a_run_of_a_recipe_hands_its_steps_names_on(tmp_path, pretrained, sst2_folder, monkeypatch):
    from distill.cli import main
    from distill.training.trainer import DistillationTrainer

    names = []

    class Recorded(DistillationTrainer):
        def __init__(self, **given):
            super().__init__(**given)
            names.append(self.args.run_name)

    monkeypatch.setattr("distill.verbs.training.train.DistillationTrainer", Recorded)
    step = f"{{run: finetune, model: {pretrained}, max_steps: 1, num_layers: 1}}"
    (tmp_path / "r.yaml").write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'run'}\ndata: {{path: {sst2_folder}, max_length: 24}}\n"
        f"steps: {{first: {step}, second: {step}}}\n"
    )
    assert main(["run", str(tmp_path / "r.yaml"), "--only", "first", "second"]) == 0
    assert names == ["first", "second"]
