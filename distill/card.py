"""The model card (README.md) of a run folder."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from distill.plan import Plan, PlannedStep
from distill.steps import Options, QuantizeOptions
from distill.tasks import Task

_WHAT = {
    "finetune": "fine-tuned from {parents} on labels",
    "distill": "distilled from the teacher {parents}",
    "quantize": "{parents} quantized with bitsandbytes: {formats}",
}

_LOAD = """```python
from transformers import pipeline
{import_distill}
classifier = pipeline("{pipeline}", "{path}")
classifier("…"{truncation})
```"""


def write_model_card(plan: Plan, planned: PlannedStep, results: dict[str, Any] | None = None) -> None:
    """Write a step's model card.

    Args:
        results: the model's entry of report.json, once there is one.
    """
    step, task = planned.step, plan.data.task
    tags, quantized = ["distill", step.run], step.run == "quantize"
    if isinstance(step.options, QuantizeOptions):
        tags.append(step.options.format or "mixed-precision")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_pipeline(task),
        tags=tags,
        base_model=[parent for parent in planned.parents if _is_hub_id(plan, parent)] or None,
        metrics=[task.primary_metric],
    )
    what = _WHAT[step.run].format(parents=" and ".join(planned.parents), formats=_formats(step.options))
    lines = [f"---\n{data.to_yaml()}\n---", f"# {step.name}", f"A model for {_task_sentence(plan)}: {what}."]
    load = _LOAD.format(
        path=step.name,
        pipeline=_pipeline(task),
        truncation=", truncation=True" if _pipeline(task) == "text-classification" else "",
        import_distill="import distill  # registers the quantized format\n" if quantized else "",
    )
    lines += ["## Use", load]
    if results is not None:
        lines += ["## Results", _results_table(results, plan.baseline)]
    given = "\n".join(f"- `{key}`: {value}" for key, value in step.given.items() if not key.endswith("_token"))
    lines += [f"## How it was made\n`run: {step.run}`", given or "All options at their defaults."]
    lines += ["What it was run with stands in `step.json`."]
    (planned.folder / "README.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _formats(options: Options) -> str:
    """What a quantize step's model is made of."""
    if not isinstance(options, QuantizeOptions):
        return ""
    if options.format is None:
        return f"the formats that keep closest to it within {options.bits_budget} (`sensitivity.json`)"
    parts = [f"linear layers in {options.format}", f"embeddings in {options.embeddings or 'int8'}"]
    parts += ["some modules otherwise (`config.json`)"] * bool(options.skip or options.overrides)
    return ", ".join(parts)


def _pipeline(task: Task) -> str:
    return "token-classification" if task.kind == "token-classification" else "text-classification"


def _is_hub_id(plan: Plan, parent: str) -> bool:
    return parent in plan.sources and not Path(plan.sources[parent].location).exists()


def _task_sentence(plan: Plan) -> str:
    task = plan.data.task
    name = f"GLUE {task.name}" if plan.recipe.task else f"{task.kind} of {plan.recipe.data.path}"
    return f"{name} ({', '.join(task.label_names)})" if task.label_names else name


def _results_table(results: dict[str, Any], baseline: str) -> str:
    rows = [(name, f"{value:.4f}") for name, value in results["metrics"].items()]
    if results["retention"] is not None:
        rows.append((f"retention of {baseline}", f"{results['retention']:.4f}"))
    rows.append((f"agreement with {baseline}", f"{results['agreement']:.4f}"))
    rows.append(("parameters", f"{results['num_parameters']:,}"))
    if results["size_on_disk_bytes"]:
        rows.append(("weights on disk", f"{results['size_on_disk_bytes'] / 1e6:.1f} MB"))
    rows.append((f"latency on {results['device']} (median)", f"{results['latency_ms']['p50']:.1f} ms"))
    return "\n".join(["| | validation |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
