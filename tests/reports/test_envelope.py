import math

import pytest

from distill.common.serialized import finite
from distill.errors import InputError
from distill.recipes.recipe import load_recipe
from distill.reports.envelope import envelope_lines, never_picked, on_front
from distill.reports.sections import cost_rows, cost_sections
from tests.records import report_of


def model(name, score, size, latency, **changes):
    return {
        "name": name, "metrics": {"accuracy": score}, "interval": [0.0, 1.0], "size_on_disk_bytes": size,
        "latency_ms": {"p50": latency, "p95": latency}, **changes,
    }  # fmt: skip


MODELS = [
    model("teacher", 0.95, 400, 20.0),
    model("student", 0.93, 200, 10.0),
    model("nf4", 0.93, 50, 12.0),
    model("large", 0.93, 300, 12.0),
    model("equal", 0.93, 50, 12.0),
    model("hub", 0.96, None, 30.0),
    model("flat", math.nan, 1, 1.0),
]


def report(metric="accuracy", models=MODELS, **changes):
    return report_of(finite({"metric": metric, "models": models, **changes}))


def test_models_that_no_limit_would_choose_are_named_with_what_it_would_choose():
    assert never_picked(report()) == {"large": "student", "flat": None}
    assert envelope_lines(report()) == [
        "No limit of size or latency would ever choose large: student is as good, small and quick, or better.",
        "No limit of size or latency would ever choose flat: the metric is no number.",
    ]
    assert envelope_lines(report(models=MODELS[:3])) == [
        "Every model is the best one under some limits of size and latency."
    ]
    lower = [{**each, "metrics": {"perplexity": each["metrics"]["accuracy"]}} for each in MODELS]
    assert never_picked(report("perplexity", lower)) == {
        **dict.fromkeys(("teacher", "hub"), "student"), "large": "student", "flat": None
    }  # fmt: skip
    assert envelope_lines(report("perplexity", lower))[0] == (
        "No limit of size or latency would ever choose teacher, large or hub: student is as good, small and quick, or "
        "better."
    )


def test_the_front_of_one_panel():
    models = report().models
    sizes = [each.size_on_disk_bytes or math.nan for each in models]
    assert [models[index].name for index in on_front(sizes, models, "accuracy")] == ["nf4", "equal", "teacher"]


def test_cost_is_told_where_it_is_known():
    said = "energy not measured, as no counter of it can be read here"
    assert cost_sections(report()) == [f"Cost: {said}."]
    costs = {"cost_per_million": {"1": 1.234, "32": 0.5}, "fleet_bytes": 2_500_000_000}
    one = report(models=[model("a", 0.9, 1, 1.0, **costs)], price_per_hour=0.9, fleet=1000)
    assert cost_rows(one) == [
        ["model", "per million by 1", "per million by 32", "fleet GB"],
        ["a", "1.23", "0.50", "2.50"],
    ]
    assert "0.9 an hour" in cost_sections(one)[0]
    assert "1,000 devices" in cost_sections(one)[0]
    assert said in cost_sections(one)[0]
    measured = report(models=[model("a", 0.9, 1, 1.0, joules_per_sample=0.25)])
    assert cost_rows(measured) == [["model", "joules"], ["a", "0.2500"]]
    assert "not measured" not in cost_sections(measured)[0]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "much"])
def test_a_price_is_a_number_above_0(tmp_path, value):

    path = tmp_path / "r.yaml"
    path.write_text("output_dir: x\nsteps: {a: {run: finetune, model: b}}\n")
    with pytest.raises(InputError, match=r"report\.price_per_hour: should be"):
        load_recipe(path, {"report.price_per_hour": value})
