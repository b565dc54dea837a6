"""The page as a person has it: it opens without an error, and what is there to be moved moves."""

import pytest

from distill.reports.page import as_html
from tests.browser import opened
from tests.reports.made import MODELS, ODD, a_report

pytestmark = pytest.mark.web


def page(folder, report):
    file = folder / "report.html"
    file.write_text(as_html(report, title="run", rows=100, recipe="steps: {a: 1}\n"), encoding="utf-8")
    return file


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_opens_without_an_error_or_a_request(tmp_path, width, scheme):
    file = page(tmp_path, a_report(odd=ODD, text=ODD))
    with opened(file, width=width, color_scheme=scheme) as found:
        assert found.errors == []
        assert [url for url in found.requests if url != "data:,"] == [file.as_uri()]
        assert found.page.evaluate("window.hacked") is None
        assert found.page.locator("img").count() == 0
        assert found.page.locator("#by-mb .point").count() == len(MODELS)
        assert ODD in found.page.locator("#picked").inner_text()
        assert ODD in found.page.locator("#worst-text").inner_text()
        assert found.page.evaluate("document.documentElement.scrollWidth") <= width  # only tables scroll sideways
        red, green, blue = found.page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        assert (min(red, green, blue) > 200) is (scheme == "light")


def test_tables_are_sorted_by_a_column(tmp_path):
    with opened(page(tmp_path, a_report())) as found:
        table = found.page.locator("#models table")

        def names():
            return [text.split("\n")[0] for text in table.locator("tbody th").all_inner_texts()]

        assert names() == list(MODELS)
        ms = table.get_by_role("button", name="ms", exact=True)
        ms.click()
        assert names() == sorted(MODELS, key=lambda name: -MODELS[name][2])
        assert table.locator("th[aria-sort=descending]").inner_text().startswith("ms")
        ms.click()
        assert names() == sorted(MODELS, key=lambda name: MODELS[name][2])
        table.get_by_role("button", name="model", exact=True).click()
        assert names() == sorted(MODELS)
        assert table.locator("[aria-sort]").count() == 1
        assert found.errors == []


def test_sliders_show_what_limits_would_choose(tmp_path):
    with opened(page(tmp_path, a_report())) as found:
        picked = found.page.locator("#picked")

        def limited(**limits):
            for key, value in limits.items():
                found.page.locator(f"#{key}").fill(str(value))
            return picked.inner_text()

        assert limited().startswith("Picked: teacher with accuracy 0.9500, 90.0 MB, 24.0 ms")
        most = {"mb": 90.0, "ms": 24.0}
        for mb in range(0, 200, 50):
            for ms in range(0, 200, 50):
                allowed = {"mb": most["mb"] * mb / 200, "ms": most["ms"] * ms / 200}
                within = [
                    (-score, size, latency, name)
                    for name, (score, size, latency) in MODELS.items()
                    if size <= allowed["mb"] and latency <= allowed["ms"]
                ]
                said = limited(mb=mb, ms=ms)
                assert said.startswith(
                    f"Picked: {min(within)[3]} with" if within else "No model is within these limits."
                )
        assert limited(mb=200, ms=120).startswith("Picked: student")
        assert found.page.locator("#ms-value").inner_text() == "14.4 ms"
        assert found.page.locator("#mb-value").inner_text() == "any MB"
        assert found.page.locator("#models tr.chosen th").inner_text().startswith("student")
        assert found.page.locator("#by-ms .limit").count() == 1
        assert found.page.locator("#by-ms .point.out title").all_inner_texts() != []
        assert found.errors == []


def test_worst_rows_are_leafed_through_and_the_recipe_is_copied(tmp_path):
    with opened(page(tmp_path, a_report())) as found:
        text = found.page.locator("#worst-text")
        assert "text 0 of student" in text.inner_text()
        assert found.page.locator("#worst-previous").is_disabled()
        found.page.locator("#worst-next").click()
        assert "text 1 of student" in text.inner_text()
        assert found.page.locator("#worst-place").inner_text() == "2 of 3"
        found.page.locator("#worst-model").select_option("nf4")
        assert "text 0 of nf4" in text.inner_text()
        assert "b ✗" in found.page.locator("#worst-facts").inner_text()
        found.page.get_by_role("button", name="Copy recipe").click()
        assert found.page.evaluate("getSelection().toString()").strip() == "steps: {a: 1}"
        assert found.page.get_by_role("button", name="Copied").count() == 1
        assert found.errors == []
