"""Print what a recipe will do before it does it: students, labels, layers, memory and expected time."""

import torch
from transformers import PretrainedConfig

from distill.common.console import log, results, styled
from distill.common.distributed import process_state
from distill.data.load import describe_cut
from distill.errors import InputError
from distill.models.labels import label_order
from distill.models.load import from_config
from distill.recipes.finished import is_finished, pending_reruns, remarks_on
from distill.recipes.inputs import needs_head
from distill.recipes.plan import Plan, PlannedStep
from distill.recipes.recipe import located, problem_at
from distill.tasks.base import TaskKind
from distill.training.cache_plan import show_bytes
from distill.verbs.all import VERBS
from distill.verbs.base import Estimate, describe_left_out
from distill.verbs.references import is_teacher


def print_plan(plan: Plan) -> None:
    """Print everything that `distill check` says of a recipe that can run.

    Only the main process prints; all take part in the estimates.
    """
    alike = {  # steps of further seeds take what the first one takes
        copy: (first, seed)
        for first, copies in plan.recipe.copies.items()
        for copy, seed in zip(copies[1:], plan.recipe.seeds[1:], strict=True)
    }
    if not process_state().is_main_process:
        for planned in [each for name, each in plan.steps.items() if name not in alike]:
            estimate_step(plan, planned)
        return
    data, task = plan.data, plan.data.task
    rows = ", ".join(f"{split} {len(rows)}" for split, rows in data.splits.items())
    results.print(styled((str(plan.recipe.path), "bold"), f" → {plan.recipe.output_dir}"))
    results.print(f"task: {plan.recipe.task or task.kind}, scored by {task.primary_metric}; baseline: {plan.baseline}")
    results.print(f"labels: {', '.join(task.label_names or ('a score',))}")
    results.print(f"rows: {rows}; at most {data.max_length} tokens each")
    for note in data.notes:
        results.print(f"note: {note}")
    total, said, reruns = 0.0, list[str](), pending_reruns(plan.recipe.output_dir)
    estimates: dict[str, Estimate] = {}
    for name, planned in plan.steps.items():
        if name in alike:
            first, seed = alike[name]
            seconds = 0.0 if is_finished(planned) and name not in reruns else estimates[first].seconds or 0.0
            total += seconds
            lasts = f", about {_duration(seconds)}" if seconds else ""
            results.print(styled((name, "bold"), f": as {first}, with seed {seed}{lasts}"))
            continue
        with log.status(f"{name}: timing a few batches"):
            estimate = estimates[name] = estimate_step(plan, planned)
        results.print(styled("\n", (name, "bold"), f": {planned.step.run} of {', '.join(planned.parents)}"))
        results.print(f"  {_size(estimate.num_parameters, estimate.weight_bytes)}")
        for line in _inputs(plan, planned):
            results.print(f"  {line}")
        for note in planned.notes:
            results.print(f"  note: {note}")
        cut = describe_cut(estimate.truncated)
        if cut is not None and cut not in said:  # each tokenizer's once
            results.print(f"  {cut}")
            said.append(cut)
        for line in describe_left_out(estimate.other_tokens):
            results.print(f"  {line}")
        for line in VERBS[planned.step.run].lines(planned.step.options, planned.plan):
            results.print(f"  {line}")
        if name in reruns:
            results.print("  will be made anew, as --rerun asked a run that was stopped")
        if is_finished(planned) and name not in reruns:
            for line in ["finished already", *remarks_on(planned)]:
                results.print(f"  {line}")
        elif estimate.seconds is None:
            results.print(f"  about {estimate.memory}")
        else:
            total += estimate.seconds
            results.print(f"  {estimate.optimizer_steps} optimizer steps, about {_duration(estimate.seconds)}")
            results.print(f"  {estimate.batch}")
            results.print(f"  about {estimate.memory}")
            if estimate.cache_bytes:
                results.print(f"  {show_bytes(estimate.cache_bytes)} of teacher outputs cached on disk")
    trainings = sum(VERBS[planned.step.run].trains for planned in plan.steps.values())
    of_seeds = f" ({trainings} trainings, seeds {', '.join(map(str, plan.recipe.seeds))})" if plan.recipe.seeds else ""
    results.print(f"\nabout {_duration(total)} of training on this machine{of_seeds}")
    for name, repo_id in plan.recipe.push.items():
        results.print(f"then {name} is pushed to {repo_id}")


def _inputs(plan: Plan, planned: PlannedStep) -> list[str]:
    """Commits of models on the Hub, the teachers' sizes, and how labels of models from outside stand to the task's."""
    lines, task = [], plan.data.task
    for source in (plan.sources[name] for name in planned.parents if name in plan.sources):
        if source.revision is not None:
            lines.append(f"{source.reference}: commit {source.revision}")
    for option, model in planned.plan.inputs.items():
        if is_teacher(option):
            num_parameters = _num_parameters(model.config, task.kind)
            lines.append(f"teacher {model.reference}: {_size(num_parameters, 4 * num_parameters)}")
    verb = VERBS[planned.step.run]
    label_map = None if verb.label_map is None else planned.step.given.get(verb.label_map)
    for option, model in planned.plan.inputs.items():
        if needs_head(option, verb.name) and not model.is_step and task.label_names:
            name, config = model.reference, model.config
            order = label_order(config, task, label_map, where=name)
            pairs = zip(order or range(config.num_labels), enumerate(task.label_names), strict=True)
            shown = ", ".join(f"{its} {config.id2label[its]} → {ours} {label}" for its, (ours, label) in pairs)
            lines.append(f"labels of {name}: {shown}")
    return lines


def estimate_step(plan: Plan, planned: PlannedStep) -> Estimate:
    """Estimate a step: sizes from the configs alone, time and memory from a few real batches through untrained models.

    Args:
        plan: of the recipe, with its data.
        planned: one of its steps.

    Raises:
        InputError: with the step's name, what its training would stop at.
    """
    try:
        return VERBS[planned.step.run].estimate(planned.step.options, planned.plan, plan.data)
    except InputError as error:
        where, recipe = f"steps.{planned.step.name}", plan.recipe
        problems = [problem_at(where, problem) for problem in error.problems]
        raise InputError(*(located(problem, recipe.path, recipe.flags) for problem in problems)) from None


def _num_parameters(config: PretrainedConfig, kind: TaskKind) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in from_config(config, kind).parameters())


def _size(num_parameters: int, weight_bytes: int) -> str:
    return f"{num_parameters / 1e6:.1f} M parameters, {weight_bytes / 1e6:.1f} MB of weights"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
