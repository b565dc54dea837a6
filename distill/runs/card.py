"""The model card (README.md) of a run folder, made of what the run wrote there: step.json, recipe.yaml, report.*."""

import json
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from distill.common.folders import write_atomically
from distill.common.local_names import base_name
from distill.common.markdown import code, escaped
from distill.common.records import ModelEntry, Report, Root, StepRecord, read_step
from distill.common.sources import reason_of, split_revision
from distill.data.files.readers import GLUE_ON_THE_HUB
from distill.data.load import Truncated, describe_cut
from distill.errors import InputError
from distill.export.record import LIBRARIES, read_export
from distill.models.adapters import base_of
from distill.models.description import entries_in
from distill.models.folders import is_export
from distill.models.replacements import STRUCTURAL
from distill.recipes.yaml12 import dump_yaml, read_yaml
from distill.runs.usage import export_usage
from distill.tasks.kinds import KINDS, usage_code
from distill.verbs.all import VERBS

TAG = "distill"
"""In the front matter of every card that is written here."""

_UNMEASURED = "Not measured yet: `distill report` does it."

# Ours → the Hub's names of metrics (https://hf.co/metrics), where they differ. GLUE's mean of two metrics has none.
_HUB_METRICS = {
    **{"pearson": "pearsonr", "average": "glue", "f1_macro": "f1", "f1_micro": "f1"},
    **{"entity_f1": "seqeval", "entity_precision": "seqeval", "entity_recall": "seqeval"},
}


def write_model_card(folder: Path, record: StepRecord, report: Report | None = None) -> None:
    """Write a run folder's README.md.

    Args:
        folder: the run folder; the recipe and the report lie beside it.
        record: what step.json holds, or will.
        report: what report.json holds, once the model was measured.
    """
    card = model_card(folder, record, report, name=record.name, plots="../")
    write_atomically(folder / "README.md", card)


def model_card(
    folder: Path,
    record: StepRecord,
    report: Report | None,
    *,
    name: str,
    plots: str = "",
    adapted: str | None = None,
) -> str:
    """Write the text of a model card.

    Args:
        folder: the run folder; the recipe and the report lie beside it.
        record: of step.json.
        report: of report.json; None before the model was measured.
        name: what `from_pretrained` is given, a repository or the folder's name.
        plots: stands before the plots' names.
        adapted: for a folder of adapters, the repository of the model that they adapt.
    """
    recipe = read_yaml(folder.parent / "recipe.yaml")
    entry = None if report is None else report.entry(record.name)
    replaced, pairs, library = _replaced(folder), len(record.text) == 2, _library(folder)
    data = _metadata(record, recipe, entry, name=name, library=library, adapted=adapted)
    if library in LIBRARIES.values():
        usage = export_usage(folder, record.kind, name, max_length=record.data["max_length"], pairs=pairs)
    else:
        usage = usage_code(record.kind, name, pairs=pairs, needs_import=bool(replaced))
    template = Template((Path(__file__).parent / "card_template.md").read_text(encoding="utf-8"))
    return template.substitute(
        front_matter=dump_yaml(data.to_dict()).strip(),
        title=escaped(name.rpartition("/")[2]),
        summary=f"A model for {escaped(_task_sentence(record, recipe))}, {_what(record)}.",
        usage=usage,
        making=_making(record, folder.parent),
        results=_results(record, report, folder.parent, plots) if report and entry else _UNMEASURED,
        limits=_limits(record, (entry or record).truncated, replaced=replaced),
    )


def inherited(folder: Path) -> dict[str, Any]:
    """Read the license and the language that the card of a model folder names."""
    file = folder / "README.md"
    if not file.is_file():
        return {}
    try:
        data = ModelCard.load(file, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):  # a card of someone else's, without readable metadata
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link", "language") if data.get(key)}


# --- front matter ---------------------------------------------------------------------------------------------------


def _library(folder: Path) -> str:
    """What loads a folder, as the Hub calls it."""
    if is_export(folder):
        return LIBRARIES[read_export(folder).engine]
    return "transformers" if base_of(folder) is None else "peft"


def _metadata(
    record: StepRecord,
    recipe: dict[str, Any],
    entry: ModelEntry | None,
    *,
    name: str,
    library: str,
    adapted: str | None,
) -> ModelCardData:
    """Make the front matter, by the Hub's specification (hub-docs, modelcard.md and model-cards.md)."""
    root, is_glue = record.root or Root(""), "task" in recipe
    base_model = adapted or recipe.get("base_model") or root.hub_id
    verb = VERBS[record.run]
    is_adapter = library == "peft"
    relation = "adapter" if is_adapter else verb.relation
    license = {key: getattr(root, key) for key in ("license", "license_name", "license_link")}
    if "license" in recipe:
        license = {"license": recipe["license"]}
    tags = [tag for each in (verb.name, *record.ancestors.values()) for tag in VERBS[each].lineage_tags]
    tags = [*dict.fromkeys(tags), TAG, verb.name, *["lora"] * is_adapter, *verb.tags(record.options)]
    datasets = [GLUE_ON_THE_HUB] if is_glue else [split_revision(record.data["path"])[0]]
    results = [] if entry is None else _eval_results(record, recipe, entry)
    known = {
        "base_model": base_model,
        "base_model_relation": relation if base_model else None,
        "datasets": datasets if is_glue or record.data_revision else None,
        "language": recipe.get("language") or (["en"] if is_glue else root.language),
        **license,
        "library_name": library,
        "pipeline_tag": KINDS[record.kind].pipeline_tag,
        "tags": tags,
        "metrics": list(dict.fromkeys(each.metric_type for each in results)) or None,
        "model_name": name.rpartition("/")[2],
        "eval_results": results or None,
    }
    return ModelCardData(**known)


def _eval_results(record: StepRecord, recipe: dict[str, Any], entry: ModelEntry) -> list[EvalResult]:
    """List every measured metric, under the split that it was measured on."""
    task, path = recipe.get("task"), record.data["path"]
    if task:
        of_a_copy = "" if path is None else " (rows of a copy)"
        data = {"dataset_type": GLUE_ON_THE_HUB, "dataset_name": f"GLUE {task}{of_a_copy}", "dataset_config": task}
    elif record.data_revision:
        name = split_revision(path)[0]
        data = {"dataset_type": name, "dataset_name": name, "dataset_config": record.data["name"]}
    else:
        data = {"dataset_type": "local", "dataset_name": _base_name(path)}
    found = []
    for key, value in entry.metrics.items():
        if value is None:  # no number
            continue
        # A key belongs to the split whose prefix and suffix are the longest that fit.
        split, prefix, suffix = max(
            (each for each in record.scored if key.startswith(each[1]) and key.endswith(each[2])),
            key=lambda each: len(each[1]) + len(each[2]),
        )
        metric = key[len(prefix) : len(key) - len(suffix)]
        found.append(
            EvalResult(
                **data,
                task_type=KINDS[record.kind].pipeline_tag,
                dataset_split=split,
                dataset_revision=record.data_revision,
                metric_type=_HUB_METRICS.get(metric, metric),
                metric_name=metric.replace("_", " "),
                metric_value=round(value, 6),
            )
        )
    return found


# --- text -----------------------------------------------------------------------------------------------------------


def _task_sentence(record: StepRecord, recipe: dict[str, Any]) -> str:
    path = record.data["path"]
    if "task" in recipe:
        name = f"GLUE {recipe['task']}"
    else:
        name = f"{record.kind} of {path if record.data_revision else _base_name(path)}"
    return f"{name} ({', '.join(record.labels)})" if record.labels else name


def _what(record: StepRecord) -> str:
    parents = [_shown(record, each) for each in record.parents]
    return VERBS[record.run].summary(record.options, parents)


def _shown(record: StepRecord, reference: str) -> str:
    """Name a model as a card does: one from a local folder by the folder's name alone."""
    is_local = record.sources.get(reference, reference) is None
    return code(_base_name(reference) if is_local else reference)


def _base_name(path: str) -> str:
    return path if path.startswith("package:") else base_name(path.partition("#sha256=")[0])


def _replaced(folder: Path) -> set[str]:
    """List the kinds of modules, in a folder or in its adapters' base, that plain transformers doesn't know."""
    base = base_of(folder)
    file = (folder if base is None else Path(base)) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {entry.kind for entry in entries_in(config.get("quantization_config"))}


def _making(record: StepRecord, output_dir: Path) -> str:
    """What it was distilled from and how: the lineage, then each step of it."""
    chain = [f"`{record.name}` ({record.run})"]
    chain += [f"`{name}` ({verb})" for name, verb in record.ancestors.items()]
    chain += [f"{_shown(record, name)}{_at(revision)}" for name, revision in record.sources.items()]
    versions = ", ".join(f"{key} {record.environment[key]}" for key in ("torch", "transformers", "bitsandbytes"))
    parts = [f"Lineage: {' ← '.join(chain)}. Made with {versions}; `recipe.yaml` has every option."]
    for each in [record, *(read_step(output_dir / name) for name in record.ancestors)]:
        if each is None:  # an ancestor's folder may be gone
            continue
        lines = VERBS[each.run].details(each, partial(_shown, each))
        if lines:
            parts.append("\n".join([f"### {each.name}", "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(parts)


def _at(revision: str | None) -> str:
    return f" at {revision[:12]}" if revision else ""


def _results(record: StepRecord, report: Report, output_dir: Path, plots: str) -> str:
    """report.md without its title and what it says of other models below the table.

    Models from local folders appear by their folders' names alone.
    """
    text = _read_markdown(output_dir / "report.md").partition("\n\n")[2].strip()
    others = {escaped(model.name) for model in report.models if model.name != record.name}
    text = "\n".join(line for line in text.splitlines() if not _is_of_others(line, others))
    for reference, revision in record.sources.items():
        if revision is None:
            text = text.replace(escaped(reference), escaped(_base_name(reference)))
    return text.replace("](report.png)", f"]({plots}report.png)")


def _read_markdown(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({reason_of(error)}); `distill report` writes it") from None


def _is_of_others(line: str, others: set[str]) -> bool:
    """Tell whether a line of the report's lists is about other models: `a: …`, `a − b: …` or `a is slower than …`."""
    words = line.split()
    if words[:1] != ["-"] or len(words) < 4 or words[1].rstrip(":") not in others:
        return False
    return words[2] != "−" or words[3].rstrip(":") in others


def _limits(record: StepRecord, truncated: Truncated | None, *, replaced: set[str]) -> str:
    scored = ", ".join(f"{record.rows[split]} {split} rows" for split, _, _ in record.scored)
    root = _shown(record, record.root.reference if record.root else "")
    lines = [f"Scored on {scored}; how it does on other input was not measured."]
    if KINDS[record.kind].reads != "images":
        lines.append(f"Input beyond {record.data['max_length']} tokens is cut (`truncation=True` cuts there).")
        if cut := describe_cut(truncated):
            lines.append(f"Of the rows that it was trained and scored on, these were {cut}.")
    lines.append(f"What {root} learned, biases too, is passed on; nothing here measured them.")
    if replaced:
        loads = "Loads with `import distill` (the package distill-transformers); plain transformers refuses it."
        bitsandbytes = " bitsandbytes saves memory first of all: the table says how fast it is, and where."
        lines.append(loads + bitsandbytes * bool(replaced - STRUCTURAL.keys()))
    return "\n".join(f"- {line}" for line in lines)
