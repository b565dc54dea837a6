"""Pushing to, and pulling from, a Hub on loopback; one worker process with its settings serves every test."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from distill.errors import InputError
from distill.publishing.push import push_folder, to_push
from tests.conftest import make_tokenizer, sentences, tiny_bert, write_rows
from tests.hub_server import running_hub

ROOT = Path(__file__).parents[2]
TOKEN = "hf_FAKEtokenThatNobodyMayEverSee"
RECIPE = """
task: sst2
output_dir: {folder}/run
data: {{path: acme/reviews, max_length: 24}}
benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 1}}
license: mit
steps:
  teacher: {{run: finetune, model: acme/tiny-bert@v1, max_steps: 48, learning_rate: 2e-3}}
  student: {{run: distill, teacher: teacher, num_layers: 2, num_train_epochs: 2, learning_rate: 1e-3, hidden_weight: 1}}
  int8: {{run: quantize, model: student, format: int8}}
  nf4: {{run: quantize, model: student, format: nf4}}
  adapted: {{run: distill, teacher: teacher, model: nf4, lora: {{r: 2}}, max_steps: 4, learning_rate: 1e-2}}
  served: {{run: export, model: student}}
push: {{student: me/student, nf4: me/student-nf4}}
"""


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        hub.owners = {TOKEN: {"me"}, "hf_reader": set()}
        yield hub


@pytest.fixture(scope="module")
def worker(hub, tmp_path_factory):
    """`ask(arguments)` runs a command, `ask(code=…)` Python; both tell status, output and `answer`."""
    home = tmp_path_factory.mktemp("home")
    around = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    around |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.hub_worker"]
    with subprocess.Popen(
        command, cwd=ROOT, env=around, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as it:
        said = []

        def ask(*arguments, code=None, token=TOKEN):
            request = {"environment": {"HF_TOKEN": token} if token else {}}
            request |= {"code": code} if code else {"arguments": [str(each) for each in arguments]}
            it.stdin.write(json.dumps(request) + "\n")
            it.stdin.flush()
            reply = SimpleNamespace(**json.loads(it.stdout.readline()))
            said.append(reply.out + reply.err + json.dumps(reply.answer))
            assert code is None or reply.status == 0, reply.err
            return reply

        ask.said, ask.home = said, home
        yield ask
        it.kill()  # leaving in good order takes seconds


@pytest.fixture(scope="module")
def run(hub, worker, tmp_path_factory):
    """A recipe's run, its model and data from the Hub, two of its models pushed."""
    folder = tmp_path_factory.mktemp("hub")
    tiny_bert(seed=1, initializer_range=0.05).bert.save_pretrained(folder / "tiny-bert")
    make_tokenizer().save_pretrained(folder / "tiny-bert")
    files = {path.name: path.read_bytes() for path in (folder / "tiny-bert").iterdir()}
    pretrained = hub.add("acme/tiny-bert", {**files, "README.md": b"---\nlanguage: de\nlicense: gpl-3.0\n---\nTiny.\n"})
    pretrained.branches["v1"] = pretrained.branches["main"]
    pretrained.commit({"config.json": b"a later commit, which v1 is not"})
    rows = {"train": write_rows(folder / "train.jsonl", sentences(96))}
    rows["validation"] = write_rows(folder / "validation.jsonl", sentences(40, seed=1))
    data = {f"{split}.jsonl": path.read_bytes() for split, path in rows.items()}
    hub.add("acme/reviews", {**data, "README.md": b"# Reviews\n"}, kind="datasets")
    (folder / "r.yaml").write_text(RECIPE.format(folder=folder))
    reply = worker("run", folder / "r.yaml")
    assert reply.status == 0, reply.err
    return folder / "run"


def card_of(hub, repo_id):
    text = hub.model(repo_id).files()["README.md"].decode()
    return ModelCard(text)


def snippet(card):
    (code,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    return code


def test_a_recipe_pushes_what_it_names_after_its_report(hub, run):
    files = hub.model("me/student").files()
    expected = {
        *("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("recipe.yaml", "report.json", "report.png", ".gitattributes"),
    }
    assert set(files) == expected
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert files[name] == (run / "student" / name).read_bytes()
    report = json.loads((run / "report.json").read_text())
    assert report["worst_rows"]
    report["worst_rows"] = report["contamination"]["examples"] = None  # no row's text is pushed
    assert json.loads(files["report.json"]) == report
    assert ("models", "me/int8") not in hub.repositories
    pushed = json.loads((run / "student" / "pushed.json").read_text())
    assert (pushed["repo_id"], pushed["commit"]) == ("me/student", hub.model("me/student").branches["main"])


def test_models_and_data_are_pinned_to_the_commits_that_were_used(hub, run):
    record = json.loads((run / "teacher" / "step.json").read_text())
    assert record["sources"] == {"acme/tiny-bert@v1": hub.model("acme/tiny-bert").branches["v1"]}
    assert record["data_revision"] == hub.repositories["datasets", "acme/reviews"].branches["main"]
    assert json.loads((run / "nf4" / "step.json").read_text())["sources"] == record["sources"]


def test_the_cards_metadata_follows_the_hubs_specification(hub, run):
    data = card_of(hub, "me/student-nf4").data
    assert data.base_model == "acme/tiny-bert"
    assert data.base_model_relation == "quantized"
    assert data.datasets == ["nyu-mll/glue"]
    assert (data.language, data.license, data.library_name) == (["en"], "mit", "transformers")
    assert data.pipeline_tag == "text-classification"
    assert data.tags == ["distillation", "distill", "quantize", "nf4"]
    assert data.model_name == "student-nf4"
    (result,) = data.eval_results
    report = {model["name"]: model for model in json.loads((run / "report.json").read_text())["models"]}
    assert result.metric_value == round(report["nf4"]["metrics"]["accuracy"], 6)
    assert (result.metric_type, result.task_type) == ("accuracy", "text-classification")
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("nyu-mll/glue", "sst2", "validation")
    assert card_of(hub, "me/student").data.base_model_relation == "finetune"
    assert ModelCard(str(card_of(hub, "me/student"))).data.to_dict() == card_of(hub, "me/student").data.to_dict()


def test_the_card_tells_what_it_was_made_from_and_how(hub, run):
    text = card_of(hub, "me/student-nf4").text
    commit = hub.model("acme/tiny-bert").branches["v1"][:12]
    lineage = f"`nf4` (quantize) ← `student` (distill) ← `teacher` (finetune) ← `acme/tiny-bert@v1` at {commit}"
    for part in (
        lineage,
        "Losses: 1.0 × soft (mse), 1.0 × hidden (mse)",
        "Layers matched by the hidden loss (student→`teacher`, 0: embeddings): 1→2, 2→4",
        "Training: 96 rows, 2.0 epochs",
        "| nf4 |",
        "](report.png)",
        "## Limits",
    ):
        assert part in text, f"{part!r} is not in\n{text}"
    assert str(run.parent) not in str(card_of(hub, "me/student-nf4"))


LOGITS = """
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
def logits(where):
    tokenizer = AutoTokenizer.from_pretrained(where)
    inputs = tokenizer(["the film was great", "a dull plot"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(where).eval()(**inputs).logits
"""


@pytest.fixture
def adapters(run):
    """The run folder of LoRA adapters of the nf4 model."""
    return run / "adapted"


@pytest.mark.parametrize(
    ("name", "repo_id"), [("student", "me/student"), ("int8", "me/int8"), ("nf4", "me/student-nf4")]
)
def test_a_pulled_model_gives_exactly_the_same_logits(run, worker, name, repo_id):
    assert worker("push", run / name, "--repo-id", repo_id).status == 0
    code = f"{LOGITS}answer = (logits({str(run / name)!r}) - logits({repo_id!r})).abs().max().item()"
    assert worker(code=code).answer == 0.0


def test_adapters_name_their_pushed_base_and_give_the_same_logits(hub, run, adapters, worker):
    assert worker("push", adapters, "--repo-id", "me/adapted").status == 0
    files = hub.model("me/adapted").files()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/student-nf4"
    assert "model.safetensors" not in files
    data = card_of(hub, "me/adapted").data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("me/student-nf4", "adapter", "peft")
    code = f"{LOGITS}answer = [(logits({str(adapters)!r}) - logits('me/adapted')).abs().max().item(), "
    code += f"(logits({str(run / 'nf4')!r}) - logits('me/adapted')).abs().max().item()]"
    same, other = worker(code=code).answer
    assert same == 0.0
    assert other > 0


@pytest.mark.parametrize("repo_id", ["me/student", "me/student-nf4", "me/adapted"])
def test_the_cards_snippet_runs(hub, adapters, worker, repo_id):
    code = snippet(card_of(hub, repo_id))
    assert ("import distill" in code) is (repo_id != "me/student")
    reply = worker(code=code)
    assert re.search(r"\[\{'label': '(negative|positive)', 'score': 0\.\d+\}\]", reply.out)


EXPORTED = """
import re
from distill import load_exported
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("me/served")
texts = ["the film was great", "a dull plot"]
inputs = tokenizer(texts, padding=True, return_tensors="pt")
logits = [load_exported(where)(**inputs).logits for where in ({folder!r}, "me/served", "me/served@main")]
answer = [(each - logits[0]).abs().max().item() for each in logits]
"""


def test_an_export_is_pushed_and_loaded_back_from_the_hub(hub, run, worker, tmp_path):
    assert worker("push", run / "served", "--repo-id", "me/served").status == 0
    files = hub.model("me/served").files()
    expected = {
        *("README.md", "config.json", "export.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json"),
        *("recipe.yaml", "report.json", "report.png", ".gitattributes"),
    }
    assert set(files) == expected
    assert files["onnx/model.onnx"] == (run / "served" / "onnx" / "model.onnx").read_bytes()
    data = card_of(hub, "me/served").data
    assert (data.library_name, data.base_model_relation) == ("onnx", "quantized")
    assert worker(code=EXPORTED.format(folder=str(run / "served"))).answer == [0.0, 0.0, 0.0]
    code = snippet(card_of(hub, "me/served"))
    assert 'snapshot_download("me/served")' in code
    assert re.search(r"(negative|positive) 0\.\d+\n", worker(code=code).out)
    scored = worker("eval", "me/served", "--task", "sst2", "--data.path", "acme/reviews", "--data.max_length", "24")
    assert scored.status == 0, scored.err
    report = json.loads((run / "report.json").read_text())
    (entry,) = (model for model in report["models"] if model["name"] == "served")
    assert json.loads(scored.out.splitlines()[-1])["metrics"] == entry["metrics"]
    assert worker("push", run / "served", "--repo-id", "me/served", "--dry-run", tmp_path / "dry").status == 0
    assert (tmp_path / "dry" / "onnx" / "model.onnx").is_file()


def test_an_export_takes_the_place_of_another_model(hub, run, worker):
    old = {
        "README.md": b"---\ntags:\n- distill\n---\n",
        "model.safetensors": b"old",
        "openvino/openvino_model.bin": b"1",
    }
    hub.add("me/replaced", old)
    assert worker("push", run / "served", "--repo-id", "me/replaced").status == 0
    files = hub.model("me/replaced").files()
    assert not {"model.safetensors", "openvino/openvino_model.bin"} & set(files)
    assert "onnx/model.onnx" in files
    assert worker("push", run / "student", "--repo-id", "me/replaced").status == 0
    assert not {"onnx/model.onnx", "export.json"} & set(hub.model("me/replaced").files())
    missing = worker(code="from distill import load_exported\ntry:\n    load_exported('me/replaced')\n"
                     "except ValueError as error:\n    answer = str(error)")  # fmt: skip
    assert "holds no export.json, so it is no exported model" in missing.answer


def test_pushing_again_commits_nothing(hub, run, worker):
    before, uploads = len(hub.model("me/student").commits), hub.seen["lfs_upload"]
    reply = worker("push", run / "student", "--repo-id", "me/student")
    assert reply.status == 0
    assert "nothing had changed" in reply.out
    assert len(hub.model("me/student").commits) == before
    assert hub.seen["lfs_upload"] == uploads


@pytest.mark.parametrize("broken", ["lfs_upload", "commit"])
def test_a_push_that_broke_off_sends_only_what_is_missing(hub, run, worker, broken):
    repo_id, weights = f"me/broken-{broken}", (run / "teacher" / "model.safetensors").read_bytes()
    hub.lfs.clear()
    hub.fail_next[broken] = 400
    reply = worker("push", run / "teacher", "--repo-id", repo_id)
    assert reply.status == 2
    assert "the Hub answered 400 (told to fail); the run folder is whole, and the same command goes on" in reply.err
    assert reply.err.count("error:") == 1
    assert set(hub.model(repo_id).files()) == {".gitattributes"}
    left = 2 - len(hub.lfs)  # the weights and the plot
    assert left == {"lfs_upload": 1, "commit": 0}[broken]
    uploads = hub.seen["lfs_upload"]
    assert worker("push", run / "teacher", "--repo-id", repo_id).status == 0
    assert hub.seen["lfs_upload"] == uploads + left
    assert hub.model(repo_id).files()["model.safetensors"] == weights


def test_branches_collections_and_privacy(hub, run, worker):
    hub.collections["me/small-1"] = []
    arguments = ["push", run / "int8", "--repo-id", "me/private", "--private", "--revision", "trial"]
    assert worker(*arguments, "--collection", "me/small-1").status == 0
    repository = hub.model("me/private")
    assert repository.private
    assert "model.safetensors" in repository.files("trial")
    assert "model.safetensors" not in repository.files("main")
    assert hub.collections["me/small-1"] == ["me/private"]


def test_files_of_another_kind_of_model_do_not_stay(hub, run, adapters, worker):
    hub.add(
        "me/changed", {"README.md": b"---\ntags:\n- distill\n---\n", "model.safetensors": b"old", "notes.md": b"mine"}
    )
    assert worker("push", adapters, "--repo-id", "me/changed").status == 0
    files = hub.model("me/changed").files()
    assert "model.safetensors" not in files
    assert files["notes.md"] == b"mine"


def test_a_dry_run_writes_what_is_pushed_and_asks_nobody(hub, run, worker, tmp_path):
    before = hub.seen.total()
    arguments = ["push", run / "student", "--repo-id", "me/student", "--dry-run", tmp_path / "dry"]
    assert worker(*arguments, token=None).status == 0
    assert hub.seen.total() == before
    pushed = {name: content for name, content in hub.model("me/student").files().items() if name != ".gitattributes"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "dry").iterdir()} == pushed
    again = worker(*arguments)
    assert again.status == 2
    assert "dry is not empty; name a new folder" in again.err


def test_what_the_hub_refuses_is_one_message(hub, run, worker):
    hub.add("you/theirs", {"config.json": b"{}", "pytorch_model.bin": b"0"})
    hub.add("you/secret", {}, private=True)
    hub.add("you/empty", {})
    hub.add("me/handmade", {"model.onnx": b"0", "README.md": b"---\ntags: [onnx]\n---\n"})
    hub.add("me/public", {})
    hub.add("me/moving", {})
    cases = [
        (["me/student"], None, "no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"),
        (["me/new"], "hf_unknown", "me/new: the Hub does not know this token"),
        (["me/new"], "hf_bro ken", "HF_TOKEN: holds a character that no token has"),
        (["you/new"], TOKEN, "you/new: the token has no right to write there; use one with write access to you"),
        (["you/empty"], "hf_reader", "you/empty: the token has no right to write there"),
        (["you/theirs"], TOKEN, "you/theirs: exists and holds files that distill did not push (config.json, "),
        (["me/handmade"], TOKEN, "me/handmade: exists and holds files that distill did not push (model.onnx)"),
        (["you/secret"], TOKEN, "you/secret: the token has no right to write there"),
        (["me/public", "--private"], TOKEN, "me/public: exists and is public, and --private makes new"),
        (["me/new", "--collection", "me/none"], TOKEN, "--collection: no collection 'me/none'"),
        (["student"], TOKEN, "--repo-id: 'student' names no owner; write ORG/NAME"),
        (["me/stu--dent"], TOKEN, "--repo-id: 'me/stu--dent' is no repository name"),
    ]
    before = json.dumps({str(key): list(value.commits) for key, value in hub.repositories.items()})
    for arguments, token, message in cases:
        reply = worker("push", run / "teacher", "--repo-id", *arguments, token=token)
        assert reply.status == 2, arguments
        assert f"error: {message}" in reply.err
        assert reply.err.count("error:") == 1
        assert "Traceback" not in reply.err
    assert json.dumps({str(key): list(value.commits) for key, value in hub.repositories.items()}) == before


def test_someone_elses_commit_during_a_push_is_kept(hub, run, worker):
    repository = hub.add("me/moving", {})

    def another() -> None:
        hub.before_commit = lambda: None
        repository.commit({"theirs.md": b"new"})

    hub.before_commit = another
    reply = worker("push", run / "teacher", "--repo-id", "me/moving")
    assert reply.status == 2
    assert "me/moving: someone else changed it during the push; nothing was changed" in reply.err
    assert repository.files() == {"theirs.md": b"new"}


def test_without_a_network_nothing_is_lost(run, worker):
    away = "from huggingface_hub import constants\nconstants.{name} = {value!r}\n"
    for name, value, back, message in (
        ("ENDPOINT", "http://127.0.0.1:9", None, "me/far: http://127.0.0.1:9 cannot be reached, or broke off ("),
        ("HF_HUB_OFFLINE", True, False, "me/far: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"),
    ):
        before = worker(code=f"from huggingface_hub import constants\nanswer = constants.{name}").answer
        worker(code=away.format(name=name, value=value))
        reply = worker("push", run / "student", "--repo-id", "me/far")
        worker(code=away.format(name=name, value=before if back is None else back))
        assert reply.status == 2
        assert f"error: {message}" in reply.err
        assert reply.err.count("error:") == 1
    assert (run / "student" / "model.safetensors").is_file()


def test_a_warm_cache_is_enough_without_a_network(hub, run, worker):
    offline = "import datasets, huggingface_hub\n"
    offline += "huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = {}"
    before = hub.seen.total()
    worker(code=offline.format(True))
    reply = worker("check", run.parent / "r.yaml")
    other = worker("check", run.parent / "r.yaml", "--data.path", "acme/reviews@" + 40 * "0")
    worker(code=offline.format(False))
    assert reply.status == 0, reply.err
    assert reply.out.count("finished already") == 6
    assert hub.seen.total() == before
    assert other.status == 2
    assert "its cache holds another revision" in other.err


def test_gated_and_missing_models_and_data_are_explained(hub, run, worker):
    hub.add("acme/gated", {"config.json": b"{}"}, gated=True)
    hub.add("acme/gated-rows", {"train.jsonl": b"{}"}, kind="datasets", gated=True)
    hub.add("acme/pickled", {name: content for name, content in hub.model("acme/tiny-bert").files("v1").items()
                             if not name.endswith(".safetensors")})  # fmt: skip
    cases = [
        ("--teacher.model", "acme/gated", "acme/gated: is gated; ask for access"),
        ("--teacher.model", "acme/none", "acme/none: no such folder here, and none of that name on the Hub"),
        ("--teacher.model", "acme/tiny-bert@v9", "acme/tiny-bert is on the Hub, but has no revision 'v9'"),
        ("--data.path", "acme/gated-rows", "data.path: acme/gated-rows: is gated; ask for access"),
        ("--data.path", "acme/none", "data.path: acme/none: no such file or folder here, and none of that name on"),
        ("--data.path", "acme/reviews@v9", "acme/reviews is on the Hub, but has no revision 'v9'"),
    ]
    for flag, value, message in cases:
        reply = worker("check", run.parent / "r.yaml", flag, value)
        assert reply.status == 2
        assert message in reply.err
        assert reply.err.count("error:") == 1, reply.err
        assert "Traceback" not in reply.err
    pickled = worker("run", run.parent / "r.yaml", "--teacher.model", "acme/pickled", "--output_dir", run.parent / "p")
    assert pickled.status == 2
    assert "acme/pickled: has no safetensors weights on the Hub" in pickled.err
    assert not (run.parent / "p").exists()


def test_a_folder_that_is_not_ready_is_not_pushed(run, adapters, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    copy = tmp_path / "run"
    for change, message in [
        (lambda: None, None),
        (lambda: os.utime(copy / "report.json", (0, 0)), "report.json is older than the model"),
        (lambda: (copy / "report.json").unlink(), "its run has no report.json"),
    ]:
        change()
        if message is None:
            assert "README.md" in to_push(copy / "student", "me/student")
        else:
            with pytest.raises(InputError, match=message):
                to_push(copy / "student", "me/student")
    (copy / "student" / "step.json").write_text('{"status": "running"}')
    with pytest.raises(InputError, match="the step is not finished"):
        push_folder(copy / "student", "me/student")
    with pytest.raises(InputError, match=r"no run folder .*; name a step of it: .*adapted, .*int8"):
        push_folder(copy, "me/student")
    with pytest.raises(InputError, match="no such run folder"):
        push_folder(copy / "none", "me/student")


def test_adapters_of_a_model_that_was_not_pushed_are_refused(run, adapters, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    folder, file = tmp_path / "run" / "adapted", tmp_path / "run" / "adapted" / "adapter_config.json"
    config = json.loads(file.read_text())
    (tmp_path / "run" / "nf4" / "pushed.json").unlink()
    for base, message in [
        (str(tmp_path / "run" / "nf4"), "a folder here, which nobody else has; push that one first"),
        ("run/nf4", "run/nf4, a folder here, which nobody else has"),  # from where the run was started
        ("/no/such/base", "no model on the Hub and no folder here"),
    ]:
        file.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(InputError, match=message):
            to_push(folder, "me/adapted")
    for base in ("acme/base", f"/home/someone/.cache/huggingface/hub/models--acme--base/snapshots/{'a' * 40}"):
        file.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        written = json.loads(to_push(folder, "me/adapted")["adapter_config.json"])
        assert written["base_model_name_or_path"] == "acme/base"
    assert written["revision"] == "a" * 40


LOCAL_RECIPE = """
output_dir: {place}/runs/quiet
data: {{kind: classification, path: {place}/rows-of-erika.quux, max_length: 24}}
benchmark: {{sequence_length: 16, throughput_batch_size: 2, rounds: 1}}
steps:
  student: {{run: distill, teacher: {place}/teachers/big, num_layers: 1, max_steps: 2, run_name: erika.quux-on-quuxbox}}
  mixed: {{run: quantize, model: student, bits_budget: 6}}
  adapted: {{run: finetune, model: mixed, lora: {{r: 2}}, max_steps: 2}}
"""


AS_ERIKA = """
import os, socket
before, hostname = {{key: os.environ.get(key) for key in ("HOME", "LOGNAME")}}, socket.gethostname
os.environ.update(HOME={home!r}, LOGNAME="erika.quux")
socket.gethostname = lambda: "quuxbox"
"""
AS_BEFORE = """
socket.gethostname = hostname
for key, value in before.items():
    os.environ.pop(key) if value is None else os.environ.update({key: value})
"""


def test_a_push_tells_no_path_user_or_host(hub, worker, tmp_path):
    """A run whose model, rows and folders lie where nobody else should look."""
    place = tmp_path / "zanzibar" / "erika.quux" / "secret-clients"
    names = {"id2label": {0: "ham", 1: "spam"}, "label2id": {"ham": 0, "spam": 1}}
    tiny_bert(**names).save_pretrained(place / "teachers" / "big")
    make_tokenizer().save_pretrained(place / "teachers" / "big")
    rows = [{"text": row["sentence"], "label": ["ham", "spam"][row["label"]]} for row in sentences(60)]
    write_rows(place / "rows-of-erika.quux" / "train.jsonl", rows)
    (place / "r.yaml").write_text(LOCAL_RECIPE.format(place=place))
    worker(code=AS_ERIKA.format(home=str(place.parent)))
    try:
        reply = worker("run", place / "r.yaml")
        assert reply.status == 0, reply.err
        run = place / "runs" / "quiet"
        (run / "mixed" / "notes-of-erika.md").write_text("a secret")
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for name in ("student", "mixed", "adapted"):
            reply = worker("push", run / name, "--repo-id", f"me/quiet-{name}")
            assert reply.status == 0, reply.err
            assert ("not pushed, as no files of a model that others load: notes-of-erika.md" in reply.out) is (
                name == "mixed"
            )
            assert worker("push", run / name, "--repo-id", f"me/quiet-{name}", "--dry-run", tmp_path / name).status == 0
    finally:
        worker(code=AS_BEFORE)
    assert {path: path.read_bytes() for path in before} == before
    assert before[run / "recipe.yaml"].count(b"secret-clients") > 2  # there was something to hide
    assert before[run / "report.json"].count(b"secret-clients") > 2
    for name in ("student", "mixed", "adapted"):
        repository = hub.model(f"me/quiet-{name}")
        for content in (content for files in repository.commits.values() for content in files.values()):
            for word in ("zanzibar", "erika", "secret-clients", "quuxbox", str(tmp_path), str(worker.home)):
                assert word.encode() not in content.lower()
        files = {file: content for file, content in repository.files().items() if file != ".gitattributes"}
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == files
        recipe = yaml.safe_load(files["recipe.yaml"])
        assert (recipe["output_dir"], recipe["data"]["path"]) == ("runs/quiet", "rows-of-user")
        assert recipe["steps"]["student"] == {"run": "distill", "teacher": "big", "num_layers": 1, "max_steps": 2}
        report = json.loads(files["report.json"])
        assert report["baseline"] == report["models"][0]["name"] == report["models"][1]["parents"][0] == "big"
        assert files["report.png"] != before[run / "report.png"]  # there the path was drawn
    assert files["adapter_config.json"].count(b'"me/quiet-mixed"') == 1
    assert "notes-of-erika.md" not in hub.model("me/quiet-mixed").files()
    assert "sensitivity.json" in hub.model("me/quiet-mixed").files()


METRIC = """
{first}
import json, os, sys
from transformers import pipeline
rows = [json.loads(line) for line in open({rows!r})]
predict = pipeline("text-classification", {repo_id!r})
answers = predict([row["sentence"] for row in rows], truncation=True)
right = sum((answer["label"] == "positive") == row["label"] for answer, row in zip(answers, rows))
assert ("distill" in sys.modules) is bool({first!r})
print(json.dumps(right / len(rows)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "repo_id", "first"), [("student", "me/student", ""), ("nf4", "me/student-nf4", "import distill")]
)
def test_a_fresh_process_pulls_the_model_and_finds_the_same_metric(hub, run, tmp_path, name, repo_id, first):
    """With transformers alone in full precision, with `import distill` before it for a quantized model."""
    around = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    around |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    code = METRIC.format(first=first, repo_id=repo_id, rows=str(run.parent / "validation.jsonl"))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=around, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    models = {model["name"]: model for model in json.loads((run / "report.json").read_text())["models"]}
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(models[name]["metrics"]["accuracy"], abs=1e-9)


FAILING = """
import os, traceback
from distill.common.sources import hub_problem, snapshot
from huggingface_hub import HfApi

def unsendable():
    raise ValueError(f"Illegal header value b'Bearer {os.environ['HF_TOKEN']}'")  # as h11 says it

answer = []
for failing in (
    lambda: HfApi().model_info("me/none"),
    lambda: snapshot("me/none", ["*"]),
    lambda: HfApi(endpoint="http://127.0.0.1:9").model_info("me/none"),
    unsendable,
):
    try:
        failing()
    except Exception as error:
        if failing is not unsendable:
            answer.append(traceback.format_exc())
        answer.append(hub_problem(error, "me/none"))
"""


def test_no_token_is_ever_shown_or_written(hub, run, worker):
    """After everything above: what was printed, written and pushed; and failing requests, tracebacks too."""
    reply = worker(code=FAILING)
    assert len(reply.answer) == 7
    assert "Illegal header value b'Bearer …'" in reply.answer[-1]
    everything = "\n".join(worker.said)
    assert "me/none" in everything
    assert TOKEN not in everything
    for folder in (run, worker.home):
        for path in folder.rglob("*"):
            if path.is_file():
                assert TOKEN.encode() not in path.read_bytes(), path
    for repository in hub.repositories.values():
        for files in repository.commits.values():
            for name, content in files.items():
                assert TOKEN.encode() not in content, name
