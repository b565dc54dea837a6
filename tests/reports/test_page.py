import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from distill.reports.page import as_html
from tests.reports.made import ODD, a_report


class Elements(HTMLParser):
    """What a page consists of: its elements, and the text in each kind of them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        self._inside = tag

    def handle_data(self, data):
        self.texts.setdefault(self._inside, []).append(data)

    @property
    def text(self):
        return " ".join(" ".join(part for parts in self.texts.values() for part in parts).split())

    @property
    def data(self):
        return json.loads(next(text for text in self.texts["script"] if text.startswith("{")))


def page_of(report, **changes):
    return as_html(report, **{"title": "run", "rows": 100, "recipe": "steps: {}\n", **changes})


def test_the_page_says_all_of_it():
    found = Elements(page_of(a_report(), notes=["cut from train"]))
    for said in (
        "5 models on 100 validation rows of classification.",
        "The baseline, teacher, has accuracy 0.9500 (95 % interval 0.940–0.960).",
        "energy not measured",
        "No limit of size or latency would ever choose twin: student is as good, small and quick, or better.",
        "Flips against teacher",
        "ECE 0.120 → 0.020 T 0.50",
        "student: lost more where label short (40 rows)",
        "2 of 100 validation rows are among the rows trained on (1 the same, 1 nearly the same)",
        "validation row 1",
        "steps: {}",
        "torch 2.13",
        "cut from train",
    ):
        assert said in found.text
    assert [model["name"] for model in found.data["models"] if model["pale"]] == ["twin"]
    assert [row["row"] for row in found.data["worst"]["nf4"]] == [0, 1, 2]
    assert found.data["models"][0] == {
        "number": 0, "name": "teacher", "score": 0.95, "low": pytest.approx(0.94), "high": pytest.approx(0.96),
        "mb": 90.0, "ms": 24.0, "pale": False, "baseline": True,
    }  # fmt: skip


def test_nothing_is_loaded_from_elsewhere():
    found = Elements(page_of(a_report()))
    assert "link" in found.names
    loads = [value for name, value in found.attributes if name in ("src", "href", "action", "data", "srcset")]
    assert all(value == "data:," or value.startswith("#") for value in loads)
    assert any(name == "content" and "default-src 'none'" in value for name, value in found.attributes)


@pytest.mark.parametrize("odd", [ODD, "<!--<script>", "{{ 7 * 7 }}{% raw %}", "\ud83d\x00\x1b[1m\u2028", "'\"`${x}"])
def test_texts_labels_and_names_are_shown_and_do_nothing(odd):
    plain = Elements(page_of(a_report()))
    report = a_report(odd=odd, text=odd)
    page = page_of(report, title=odd, recipe=odd, notes=[odd])
    page.encode()  # half surrogates are written out
    found = Elements(page)
    assert found.names.count("script") == plain.names.count("script") == 2
    assert "img" not in found.names
    assert not any(name.startswith("on") for name, _ in found.attributes)
    if odd.isprintable():
        assert f"text 0 of nf4{odd} {odd}" == found.data["worst"][f"nf4{odd}"][0]["text"][0]
        assert f"nf4{odd}" in "".join(found.texts["th"])


@pytest.mark.parametrize("filler", ["<" * 1000, "語" * 1000, "\x00" * 1000, "a" * 100_000])
def test_the_page_is_at_most_a_megabyte(filler):
    names = {f"model-{number}": (0.9 + number / 1000, 10.0 + number, 5.0) for number in range(14)}
    page = page_of(a_report({"teacher": (0.9, 90.0, 9.0), **names}, text=filler, rows=10), recipe=filler[:1000] * 1000)
    assert len(page.encode()) <= 1_000_000
    rows = Elements(page).data["worst"]
    assert len(rows) == 14
    assert all(rows.values())  # every model has some


def test_what_nobody_reads_all_of_is_capped():
    odd = "&" * 100
    names = {f"{number}": (0.5 + number / 1e4, 10.0 + number, 5.0) for number in range(1000)}
    report = a_report({"teacher": (0.9, 90.0, 9.0), **names}, odd=odd, text=odd, rows=10)
    report = replace(report, slices=[replace(report.slices[0], slice=f"{n}{odd}") for n in range(100)])
    page = page_of(report, recipe=odd * 10_000, notes=[odd] * 1000)
    assert len(page.encode()) <= 1_000_000
    said = Elements(page).text
    assert "941 more models are in report.json." in said
    assert "more slices are in report.json." in said


def test_an_older_report_without_numbers_makes_a_page():
    names = {"teacher": (0.9, 90.0, 9.0), "flat": (None, 1.0, 1.0)}
    report = a_report(names)
    bare = replace(report, slices=None, worst_rows=None, contamination=None)
    bare = replace(
        bare, models=[replace(model, calibration=None, flips=None, size_on_disk_bytes=None) for model in bare.models]
    )
    found = Elements(page_of(bare, recipe=""))
    assert "No limit of size or latency would ever choose flat: the metric is no number." in found.text
    for gone in ("Flips against", "Worst rows", "Contamination"):
        assert gone not in found.text
