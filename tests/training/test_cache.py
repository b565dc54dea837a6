"""Cached teachers: the same losses as live ones, found again, resumed, refused above a limit."""

import os
import resource

import numpy as np
import pytest
import torch

from distill import DistillationConfig, DistillationTrainer
from distill.errors import DiskFull, InputError
from distill.tasks.classification import CLASSES
from distill.training.cache import (
    TeacherCache,
    top_words,
    with_tail,
)
from distill.training.cache_plan import Layout
from distill.training.features import FeatureSpec
from distill.training.teachers import Teacher
from tests.conftest import make_tokenizer
from tests.training.test_exactness import CASES, make_models, make_rows, relative_difference

CACHED = sorted(
    case
    for case, options in CASES.items()
    if "attention" not in case
    and case not in ("every part", "hard")
    and options.get("kind") not in ("masked", "causal", "masked anew", "images")
)

BATCHES = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4}
SGD = {"optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 1.0}


def make_trainer(folder, case="default", count=40, **options):
    options = {**CASES[case], "epochs": 3, **options}
    kind, narrow = options.pop("kind", "classes"), options.pop("narrow", False)
    teacher, student = make_models(kind, narrow)
    args = DistillationConfig(
        output_dir=str(folder / "run"), save_strategy="no", logging_steps=1,
        disable_tqdm=True, num_train_epochs=options.pop("epochs"),
        **{"cache_dir": str(folder / "cache"), "bf16": False, **BATCHES, **options},
    )  # fmt: skip
    return DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=make_rows(kind, count),
        processing_class=make_tokenizer(),
    )  # fmt: skip


def caches(folder):
    return [path for path in (folder / "cache").iterdir() if len(path.name) == 64]


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def count_forwards(monkeypatch):
    calls = []
    original = Teacher.outputs

    def counted(self, batch, **options):
        if "teacher_outputs" not in batch:
            calls.append(len(batch["input_ids"]))
        return original(self, batch, **options)

    monkeypatch.setattr(Teacher, "outputs", counted)
    return calls


@pytest.mark.parametrize("case", CACHED)
def test_cached_and_live_teachers_give_the_same_training(tmp_path, case):
    live = make_trainer(tmp_path, case, cache_teacher="none", **SGD)  # Adam would take noise around 0 for a gradient
    live.train()
    cached = make_trainer(tmp_path, case, cache_teacher="relations", **SGD)
    cached.train()
    assert (tmp_path / "cache").is_dir()
    assert len(losses(live)) == 15
    np.testing.assert_allclose(losses(cached), losses(live), rtol=2e-3, atol=1e-6)  # states are stored in 16 bits
    assert relative_difference(live.model.state_dict(), cached.model.state_dict()) < 1e-3


def test_the_teacher_runs_once_over_the_rows_and_never_again(tmp_path, monkeypatch, capsys):
    calls = count_forwards(monkeypatch)
    make_trainer(tmp_path, "hidden").train()
    assert sum(calls) == 40
    assert "caching the teacher's logits and hidden states" in capsys.readouterr().err
    calls.clear()
    trainer = make_trainer(tmp_path, "hidden")
    trainer.train()
    assert not calls
    assert "found in the cache" in capsys.readouterr().err
    trainer.evaluate(make_rows(count=7, seed=1))  # other rows: computed
    assert sum(calls) == 7


@pytest.mark.parametrize("changed", ["teacher", "rows", "losses", "precision"])
def test_what_changes_the_outputs_changes_the_cache(tmp_path, changed, monkeypatch):
    make_trainer(tmp_path, "hidden").train()
    calls = count_forwards(monkeypatch)
    trainer = make_trainer(
        tmp_path, "embedding" if changed == "losses" else "hidden", 39 if changed == "rows" else 40,
        **({"bf16": True} if changed == "precision" else {}),
    )  # fmt: skip
    if changed == "teacher":
        with torch.no_grad():
            trainer.teachers[0].model.classifier.bias[0] += 1e-3
    trainer.train()
    assert sum(calls) == (39 if changed == "rows" else 40)


def test_a_killed_build_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.training.cache._CHUNK_BYTES", 4096)
    make_trainer(tmp_path, "hidden").train()
    (folder,) = caches(tmp_path)
    chunks = sorted(folder.glob("chunk-*.arrow"))
    assert len(chunks) > 3
    whole = {path.name: path.read_bytes() for path in chunks}
    for path in chunks[1:]:
        path.unlink()
    (folder / "chunk-00001.arrow.123.partial").write_bytes(b"half")
    calls = count_forwards(monkeypatch)
    make_trainer(tmp_path, "hidden").train()
    assert 0 < sum(calls) < 40
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_two_jobs_that_compute_the_same_cache_leave_each_others_files_alone(tmp_path, monkeypatch):
    """The second one does all of its work while the first one is about to give its first file a name."""
    monkeypatch.setattr("distill.training.cache._CHUNK_ROWS", 7)
    replace = os.replace

    def while_another_works(source, target):
        monkeypatch.setattr("distill.training.cache.os.replace", replace)
        make_trainer(tmp_path, "hidden").train()
        replace(source, target)

    monkeypatch.setattr("distill.training.cache.os.replace", while_another_works)
    calls = count_forwards(monkeypatch)
    make_trainer(tmp_path, "hidden").train()
    assert sum(calls) == 40 + 7  # what the second has computed is found
    (folder,) = caches(tmp_path)
    assert [path.name for path in sorted(folder.iterdir())] == [f"chunk-0000{number}.arrow" for number in range(6)]


def test_what_another_job_uses_is_not_deleted(tmp_path, capsys):
    user = make_trainer(tmp_path, "hidden")
    user.cache_teachers()
    (used,) = caches(tmp_path)
    half = used / "chunk-00001.arrow.5.partial"
    half.write_bytes(b"half")
    size = sum(path.stat().st_size for path in used.iterdir())
    make_trainer(tmp_path, "hidden").train()
    assert half.is_file()
    make_trainer(tmp_path, "hidden", count=39, cache_limit_gb=1.5 * size / 1e9).train()
    assert used in caches(tmp_path)
    assert "other jobs use their caches, so all together are above cache_limit_gb" in capsys.readouterr().err
    user.train()
    make_trainer(tmp_path, "hidden", count=38, cache_limit_gb=1.5 * size / 1e9).train()
    assert used not in caches(tmp_path)


def test_a_full_disk_under_a_cache_is_told(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = make_trainer(tmp_path, "hidden")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(DiskFull, match=rf"{tmp_path / 'cache'}: no room to write there \(File too large\)"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [list(folder.iterdir()) for folder in caches(tmp_path)] == [[]]
    trainer.train()


def test_a_cache_is_found_again_whatever_the_batch_size(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.training.cache._CHUNK_ROWS", 7)
    make_trainer(tmp_path).train()
    (folder,) = caches(tmp_path)
    assert len(list(folder.iterdir())) == 6
    sorted(folder.iterdir())[2].unlink()
    calls = count_forwards(monkeypatch)
    make_trainer(tmp_path, per_device_eval_batch_size=3).train()
    assert sum(calls) == 7
    assert max(calls) == 3


def test_auto_says_what_it_decided(tmp_path, capsys):
    for options, said in [
        ({"epochs": 1}, "runs in every step: 1.0 passes over the rows are too few"),
        ({"cache_limit_gb": 1e-9}, "runs in every step: a cache would take"),
        ({"cache_teacher": "none"}, "runs in every step: cache_teacher is none"),
        ({"cache_dir": f"{__file__}/cache"}, "runs in every step: nothing can be written to"),
        ({"train_sampling_strategy": "sequential"}, "runs in every step: the rows are not drawn by their lengths"),
        ({"train_sampling_strategy": "random"}, "caching the teacher's logits: 1.0 kB in"),
        ({}, "caching the teacher's logits: 1.0 kB in"),
        (
            {"case": "masked"},
            "every step: attention maps, masks that are drawn anew, and a whole vocabulary for every token are not",
        ),
    ]:
        make_trainer(tmp_path, **options).train()
        assert said in capsys.readouterr().err, options


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("hidden", {"cache_teacher": "logits"}, "compare logits and hidden states; say hidden, auto or none"),
        (
            "attention",
            {"cache_teacher": "relations"},
            "masks that are drawn anew, and a whole vocabulary for every token are not cached; say auto",
        ),
        ("hidden", {"cache_teacher": "hidden", "cache_limit_gb": 1e-6}, r"hidden would take .* above cache_limit_gb"),
    ],
)
def test_what_cannot_be_cached_is_refused(tmp_path, case, options, message):
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, case, **options).train()


def test_a_limit_makes_room_by_deleting_the_oldest(tmp_path):
    stranger = tmp_path / "cache" / "notes"
    stranger.mkdir(parents=True)
    make_trainer(tmp_path, "hidden").train()
    (first,) = caches(tmp_path)
    size = sum(path.stat().st_size for path in first.iterdir())
    make_trainer(tmp_path, "hidden", count=39, cache_limit_gb=1.5 * size / 1e9).train()
    assert stranger.is_dir()
    (left,) = caches(tmp_path)
    assert left != first


def test_size_is_predicted(tmp_path):
    trainer = make_trainer(tmp_path, "hidden", 400)
    ((_, plan),) = trainer.planned_caches()
    trainer.train()
    (folder,) = caches(tmp_path)
    assert sum(path.stat().st_size for path in folder.iterdir()) == pytest.approx(plan.size, rel=0.02)


def test_a_cache_that_lacks_rows_is_told(tmp_path):
    make_trainer(tmp_path).train()
    (folder,) = caches(tmp_path)
    with pytest.raises(InputError, match="lacks rows"):
        TeacherCache(folder, Layout(FeatureSpec(), 2, 64, CLASSES), 41)


def test_the_likeliest_words_are_kept_and_the_others_share_what_is_left():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 0.5], [0.0, 0.0, 3.0, 0.0, 1.0]])
    probabilities = logits.softmax(-1)
    found = with_tail(*top_words(logits, 2), 5).exp()
    for row, kept in enumerate(([0, 2], [2, 4])):
        others = [word for word in range(5) if word not in kept]
        torch.testing.assert_close(found[row, kept], probabilities[row, kept])
        torch.testing.assert_close(found[row, others], (probabilities[row, others].sum() / 3).expand(3))
    torch.testing.assert_close(with_tail(*top_words(logits, 5), 5).exp(), probabilities)


@pytest.mark.parametrize(("top_k", "tolerance"), [(50, 1e-3), (40, 0.05)])
def test_a_causal_lm_learns_the_same_from_its_teachers_likeliest_words(tmp_path, top_k, tolerance):
    live = make_trainer(tmp_path, "causal, kl", cache_teacher="none", **SGD)
    live.train()
    cached = make_trainer(tmp_path, "causal, kl", cache_teacher="logits", cache_top_k=top_k, **SGD)
    cached.train()
    assert losses(cached) == pytest.approx(losses(live), rel=tolerance)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.arrow")) > 0


def test_a_cache_of_likeliest_words_is_asked_for_by_name(tmp_path):
    assert make_trainer(tmp_path, "causal, kl").planned_caches()[0][1].layout is None
    with pytest.raises(InputError, match="the likeliest words are kept, which a squared error"):
        make_trainer(tmp_path, "causal", cache_teacher="logits")
