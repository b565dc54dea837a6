"""The Hub token reaches no file, wherever Trainer pickles its arguments."""

import copy
import pickle

import pytest
import torch
import transformers
from transformers import TrainingArguments

from distill import DistillationConfig, DistillationTrainer
from distill.common.credentials import UnsavedToken
from distill.training.config import TrainingConfig
from tests.conftest import make_tokenizer, tiny_bert
from tests.training.test_exactness import make_models, make_rows

TOKEN = "hf_" + "Secret" * 5


def test_a_token_is_what_it_is_until_it_is_pickled():
    token = UnsavedToken(TOKEN)
    assert f"Bearer {token}" == f"Bearer {TOKEN}"
    assert (copy.copy(token), copy.deepcopy({"token": token})["token"]) == (TOKEN, TOKEN)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        written = pickle.dumps({"token": token}, protocol)
        assert TOKEN.encode() not in written
        assert pickle.loads(written) == {"token": ""}


@pytest.mark.parametrize("teacher", [True, False])
def test_trainers_arguments_hold_no_token_in_any_file(tmp_path, monkeypatch, teacher):
    uploads = []

    class Hub:
        def create_repo(self, name, **options):
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, **options):
            uploads.append(options)
            return type("Job", (), {"done": lambda self: True, "result": lambda self: None})()

    for name in ("create_repo", "upload_folder"):  # transformers 5.17
        monkeypatch.setattr(transformers.trainer, name, getattr(Hub(), name), raising=False)
    monkeypatch.setattr(transformers.trainer, "hf_api", Hub, raising=False)
    options = {"output_dir": str(tmp_path / "out"), "push_to_hub": True, "hub_token": TOKEN, "hub_model_id": "it",
               "max_steps": 2, "save_steps": 1, "hub_strategy": "all_checkpoints"}  # fmt: skip
    models = make_models() if teacher else (None, tiny_bert())
    trainer = DistillationTrainer(
        model=models[1], teacher=models[0], train_dataset=make_rows(), processing_class=make_tokenizer(),
        args=DistillationConfig(**options) if teacher else TrainingConfig(**options),
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    assert uploads
    assert {upload["token"] for upload in uploads} == {TOKEN}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in written)
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert not list((tmp_path / "out").glob("checkpoint-*/training_args.bin"))
    transformers.Trainer(model=tiny_bert(), args=trainer.args).save_model(str(tmp_path / "other"))  # as wandb does
    assert TOKEN.encode() not in (tmp_path / "other" / "training_args.bin").read_bytes()


def test_the_file_would_hold_it_otherwise(tmp_path):
    torch.save(TrainingArguments(output_dir=str(tmp_path), hub_token=TOKEN), tmp_path / "training_args.bin")
    assert TOKEN.encode() in (tmp_path / "training_args.bin").read_bytes()
