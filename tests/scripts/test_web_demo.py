"""The page shows in Chromium what Python computes, without a network; what is missing is told."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
from transformers import BertForTokenClassification

from distill import InputError, export_model, load_exported
from distill.export.record import read_export, write_export
from scripts import web_demo
from tests.conftest import tiny_config
from tests.web import CHROMIUM, LABELS, PAIRS, TEXTS, calibration, need, web_model, web_settings, wordpiece_tokenizer

pytestmark = pytest.mark.web


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export in int8, whose name HTML would read as a tag."""
    need()
    folder = tmp_path_factory.mktemp("demo") / "<b>films & plots"
    export_model(
        web_model(), wordpiece_tokenizer(), folder, format="int8", batches=calibration(), agreement=0.8,
        divergence=0.1, web=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def page_folder(exported):
    need("npm")
    web_demo.write_demo(exported, exported.parent / "page")
    return exported.parent / "page"


@contextmanager
def opened(folder, **options):
    """A page in Chromium, loaded, and the addresses that it asked for."""
    need("npm", CHROMIUM)
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = re.search(r"http://[\d.:]+/", server.stdout.readline()).group()
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(**options)
            asked, errors = [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.goto(address)
            page.wait_for_selector("#run:enabled", timeout=60_000)
            yield page
            assert errors == []
            assert asked
            assert all(url.startswith((address, "data:")) for url in asked), asked
            browser.close()
    finally:
        server.terminate()
        server.wait()


def shown(page):
    """The table's rows, once it is computed."""
    page.wait_for_selector("#run:enabled")
    assert re.match(r"\d+\.\d ms on one thread for \d+ tokens", page.text_content("#status"))
    return [[cell.inner_text() for cell in row.query_selector_all("td")] for row in page.query_selector_all("#rows tr")]


def test_labels_and_scores_are_those_of_python(exported, page_folder):
    tokenizer, model = wordpiece_tokenizer(), load_exported(exported, threads=1)
    with opened(page_folder) as page:
        assert page.title() == page.text_content("h1") == "<b>films & plots"
        for text, pair in [*((text, "") for text in TEXTS), *PAIRS]:
            page.fill("#text", text)
            page.fill("#pair", pair)
            page.click("#run")
            scores = {label: float(score) for label, _, score in shown(page)}
            inputs = tokenizer(text, pair or None, truncation=True, return_tensors="pt")
            expected = model(**inputs).logits.softmax(-1)[0].tolist()
            assert next(iter(scores)) == LABELS[expected.index(max(expected))]
            assert [scores[label] for label in LABELS] == pytest.approx(expected, abs=1e-2)
            was_cut = len(tokenizer(text, pair or None)["input_ids"]) > tokenizer.model_max_length
            assert ("did not fit" in page.text_content("#status")) == was_cut


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_used_by_keyboard_on_a_phone(page_folder, scheme):
    with opened(page_folder, viewport={"width": 320, "height": 640}, color_scheme=scheme) as page:
        page.keyboard.press("Tab")
        page.keyboard.type("the film was great")
        page.keyboard.press("Control+Enter")
        assert len(shown(page)) == len(LABELS)
        for _ in range(2):
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert len(shown(page)) == len(LABELS)
        fits, background = page.evaluate(
            "[document.documentElement.scrollWidth <= innerWidth, getComputedStyle(document.body).backgroundColor]"
        )
        assert fits
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 24, 26)"}[scheme]


def test_tokens_have_labels_too(tmp_path):
    need("npm")
    tokenizer = wordpiece_tokenizer()
    model = BertForTokenClassification(tiny_config(initializer_range=0.2, **web_settings())).eval()
    export_model(model, tokenizer, tmp_path / "tags", web=True)
    web_demo.write_demo(tmp_path / "tags", tmp_path / "page")
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    probabilities = load_exported(tmp_path / "tags")(**inputs).logits.softmax(-1)[0][1:-1]
    with opened(tmp_path / "page") as page:
        assert not page.is_visible("#pair")
        page.fill("#text", TEXTS[0])
        page.click("#run")
        rows = shown(page)
    assert [token for token, _, _ in rows] == TEXTS[0].split()
    assert [label for _, label, _ in rows] == [LABELS[index] for index in probabilities.argmax(-1)]
    scores = [float(score) for _, _, score in rows]
    assert scores == pytest.approx(probabilities.max(-1).values.tolist(), abs=1e-2)


def test_what_is_missing_is_told(exported, tmp_path, monkeypatch, capsys):
    record = json.loads((exported / "export.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    write_export(other, type(read_export(other))(**record | {"web": False, "architecture": "BertForMaskedLM"}))
    (tmp_path / "kept").mkdir()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError) as error:
        web_demo.write_demo(other, tmp_path / "kept")
    told = [problem.replace(str(tmp_path), "") for problem in error.value.problems]
    assert [problem.split(":")[0] for problem in told] == ["/other", "/other", "npm", "/kept"]
    for part, problem in zip(
        ("with web=True", "a BertForMaskedLM", "apt-get install npm", "--output"), told, strict=True
    ):
        assert part in problem
    monkeypatch.setattr(sys, "argv", ["web_demo.py", str(tmp_path)])
    assert web_demo.main() == 2
    assert "holds no export.json" in capsys.readouterr().err
    assert not list((tmp_path / "kept").iterdir())


def test_a_package_that_npm_does_not_get_is_told(exported, tmp_path, monkeypatch):
    need("npm")
    for name, value in {"offline": "true", "cache": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(f"npm_config_{name}", value)
    with pytest.raises(InputError, match=r"npm: can't get @huggingface/transformers@[\d.]+ \("):
        web_demo.write_demo(exported, tmp_path / "page")
    assert not list(tmp_path.glob("page*"))
    assert not list(tmp_path.glob(".page*"))
