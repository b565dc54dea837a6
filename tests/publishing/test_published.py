import io
import json
import zlib

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from distill.common.local_names import LocalNames, base_name
from distill.errors import InputError
from distill.publishing.published import left_out, published, without_text_chunks
from distill.recipes.yaml12 import read_yaml
from tests.records import report_of
from tests.reports.test_presentation import entry

TOKENS = {
    "a token of the Hub": "hf_" + "aB3" * 11 + "x",
    "a token of GitHub": "ghp_" + "a1B2" * 9,
    "a key of AWS": "AKIA" + "Q7" * 8,
    "a key of Google": "AIza" + "a-1_B" * 7,
    "a token of Slack": "xoxb-1234567890-abc",
    "a key of a model's API": "sk-proj-" + "a1B2" * 10,
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "a password in an address": "https://erika:pass@example.org/rows.csv",
}


@pytest.fixture
def of_erika(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "erika")
    monkeypatch.setattr("socket.gethostname", lambda: "quuxbox.example.org")
    monkeypatch.setenv("HOME", "/home/erika")


@pytest.fixture
def run(tmp_path, of_erika):
    """A run folder with a step of a local teacher, as small as the files allow."""
    run = tmp_path / "run"
    step = run / "student"
    step.mkdir(parents=True)
    record = {"sources": {"/srv/a/teacher": None, "org/m@v1": "c" * 40, "models/student": None}}
    record |= {"data": {"path": "clients/acme"}, "data_revision": None}
    (step / "step.json").write_text(json.dumps(record))
    (step / "config.json").write_text(json.dumps({"_name_or_path": "/srv/a/teacher", "id2label": {"0": "/a/b"}}))
    (step / "vocab.txt").write_text("[PAD]\n/home/erika\n")
    save_file({"a": torch.zeros(1)}, step / "model.safetensors", {"format": "pt"})
    recipe = ["task: sst2", f"output_dir: {run}", "data: {path: clients/acme, label: /x/y}", "steps:", "  student:"]
    recipe += ["    run: distill", "    teacher: [/srv/a/teacher, org/m@v1, models/student, 'package:p/m']"]
    recipe += ["    model: ~/m/start", "    deepspeed: /etc/erika/ds.json", "    run_name: erika", "    qat: {a: .}"]
    (run / "recipe.yaml").write_text("\n".join(recipe))
    report = {
        "baseline": "/srv/a/teacher",
        "models": [entry("/srv/a/teacher"), entry("student", parents=["/srv/a/teacher", "models/student"])],
        "variants": [{"name": "/srv/a/teacher in bf16"}],
        "slices": [{"by": "site", "slice": "/a/b", "metrics": {"/srv/a/teacher": 0.5}}],
        "worst_rows": [{"text": "a private text"}],
        "contamination": {"rows": 1, "examples": ["a private text"]},
    }
    (run / "report.json").write_text(json.dumps(report))
    (run / "report.html").write_text("a private text")
    return run


def sent(run):
    report = report_of(json.loads((run / "report.json").read_text()))
    names = LocalNames(run / "student", read_yaml(run / "recipe.yaml"), report)
    content = published(run / "student", names, report)
    return {name: it if isinstance(it, bytes) else it.read_bytes() for name, it in content.items()}


def test_paths_become_names_and_words_stay(run):
    files = sent(run)
    assert json.loads(files["config.json"]) == {"_name_or_path": "teacher", "id2label": {"0": "/a/b"}}
    assert files["vocab.txt"] == (run / "student" / "vocab.txt").read_bytes()
    assert files["recipe.yaml"].decode() == (
        "task: sst2\noutput_dir: runs/run\ndata:\n  path: acme\n  label: /x/y\nsteps:\n  student:\n    run: distill\n"
        "    teacher:\n    - teacher\n    - org/m@v1\n    - student-2\n    - package:p/m\n    model: start\n"
        "    deepspeed: ds.json\n    qat:\n      a: .\n"
    )
    report = json.loads(files["report.json"])
    assert [model["name"] for model in report["models"]] == ["teacher", "student"]
    assert report["models"][1]["parents"] == ["teacher", "student-2"]
    assert report["variants"][0]["name"] == "teacher in bf16"
    assert report["slices"] == [{"by": "site", "slice": "/a/b", "metrics": {"teacher": 0.5}}]


def test_no_rows_text_goes_up(run):
    files = sent(run)
    assert json.loads(files["report.json"])["worst_rows"] is None
    assert json.loads(files["report.json"])["contamination"] == {"rows": 1, "examples": None}
    assert b"private" not in b"".join(files.values())


@pytest.mark.parametrize("kind", TOKENS)
def test_what_looks_like_a_token_is_refused_with_its_place_and_not_shown(run, kind):
    secret = TOKENS[kind]
    for file, content, place in [
        ("student/config.json", json.dumps({"a": {"b": [f"x {secret}"]}}), "config.json: a.b"),
        ("student/config.json", json.dumps({"a": {secret: 1}}), "config.json: a"),
        ("student/vocab.txt", f"a\nb\n{secret}\n", "vocab.txt: line 3"),
        ("recipe.yaml", (run / "recipe.yaml").read_text() + f"\n    note: '{secret}'\n", "steps.student.note"),
        ("report.json", json.dumps({"baseline": "a", "models": [], "notes": [secret]}), "report.json: notes"),
    ]:
        before = (run / file).read_bytes()
        (run / file).write_text(content)
        with pytest.raises(InputError) as error:
            sent(run)
        assert f"{place} holds what looks like {kind}" in str(error.value)
        assert secret not in str(error.value)
        (run / file).write_bytes(before)
    assert sent(run)


def test_keys_that_name_a_secret_are_refused_but_not_labels(run):
    file = run / "student" / "config.json"
    file.write_text(json.dumps({"label2id": {"password": "x"}, "id2label": {"0": "secret"}, "cls_token": "[CLS]"}))
    assert sent(run)
    file.write_text(json.dumps({"tracker": {"wandb_api_key": "0123456789abcdef"}}))
    with pytest.raises(InputError, match=r"tracker.wandb_api_key holds what looks like a secret"):
        sent(run)


def test_the_token_of_this_machine_is_refused_whatever_it_looks_like(run, monkeypatch):
    monkeypatch.setattr("distill.common.credentials.get_token", lambda: "odd-token")
    (run / "student" / "merges.txt").write_text("an odd-token\n")
    with pytest.raises(InputError, match=r"merges.txt: line 1 holds .* this machine's token"):
        sent(run)


def test_files_that_are_none_of_a_model_stay_and_are_told(run):
    step = run / "student"
    for name in (
        "rows.csv",
        "training_args.bin",
        "pytorch_model.bin",
        "notes.json",
        "modeling.py",
        ".env",
        "x.safetensors",
    ):
        (step / name).write_text("{}")
    (step / "checkpoints").mkdir()
    assert set(sent(run)) == {"config.json", "vocab.txt", "model.safetensors", "recipe.yaml", "report.json"}
    assert left_out(step) == [
        *(".env", "checkpoints/", "modeling.py", "notes.json", "pytorch_model.bin", "rows.csv", "training_args.bin"),
        "x.safetensors",
    ]


def test_weights_whose_header_names_a_path_are_refused(run):
    save_file({"a": torch.zeros(1)}, run / "student" / "model.safetensors", {"made": "in /home/erika/x"})
    with pytest.raises(InputError, match="its metadata names a path here under 'made'"):
        sent(run)
    (run / "student" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"model.safetensors: cannot be read"):
        sent(run)


def test_images_go_up_without_their_texts():
    told = PngImagePlugin.PngInfo()
    told.add_text("Author", "erika")
    told.add_itxt("Comment", "erika", zip=True)
    image, file = Image.new("RGB", (3, 2), (1, 2, 3)), io.BytesIO()
    image.save(file, "png", pnginfo=told)
    cleaned = without_text_chunks(file.getvalue())
    read = Image.open(io.BytesIO(cleaned))
    assert read.tobytes() == image.tobytes()
    assert not read.info
    assert b"Author" not in cleaned
    assert zlib.crc32(b"IEND").to_bytes(4, "big") == cleaned[-4:]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/reviews.csv", "reviews.csv"),
        ("~/models/big/", "big"),
        ("~", "local"),
        ("/home/erika", "user"),
        ("../..", "local"),
        ("C:\\Users\\erika\\big", "big"),
        ("/x/rows-of-Erika_2.csv", "rows-of-user_2.csv"),
        ("/x/quuxbox.example.org", "host"),
        ("/x/quuxbox-2024", "host-2024"),
        ("/x/erikas", "erikas"),
        ("/home/erika/.cache/huggingface/hub/models--org--big/snapshots/abc", "org/big"),
    ],
)
def test_a_path_is_called_by_its_last_part_without_names_of_people_and_machines(of_erika, path, name):
    assert base_name(path) == name


def test_usual_users_tell_of_nobody(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    monkeypatch.setattr("socket.gethostname", lambda: "quuxbox")
    assert base_name("/x/root-words.csv") == "root-words.csv"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("read from clients/acme/train.csv, 3 rows.", "read from acme/train.csv, 3 rows."),
        ("see /home/erika/x/y.json (old)", "see y.json (old)"),
        ("`/tmp/x/y`", "`y`"),
        ("12 rows/s, and/or https://example.org/home/a/b", "12 rows/s, and/or https://example.org/home/a/b"),
        ("/srv/a/teacher, /srv/a/teachers/b", "teacher, b"),
        ("a\\_b \\[v2\\]", "a\\_b \\[v2\\]"),
    ],
)
def test_paths_in_sentences_become_names_too(run, text, shown):
    report = report_of(json.loads((run / "report.json").read_text()))
    assert LocalNames(run / "student", read_yaml(run / "recipe.yaml"), report).in_markdown(text) == shown
