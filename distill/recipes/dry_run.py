"""Find what keeps a recipe's steps from running before the first of them runs."""

from collections.abc import Collection, Sequence

from huggingface_hub import constants

from distill.common.credentials import require_token
from distill.data.load import Data
from distill.errors import InputError
from distill.evaluation.benchmark import refuse_too_short
from distill.recipes.finished import is_finished, pending_reruns
from distill.recipes.plan import Plan, PlannedStep, make_plan
from distill.recipes.recipe import Recipe, located, problem_at
from distill.verbs.all import VERBS

_SHARDING = ("fsdp", "deepspeed")
"""Options of steps that only the processes of their launch can look at."""


def runnable_plan(
    recipe: Recipe,
    *,
    only: Collection[str] | None = None,
    rerun: Collection[str] | None = None,
    force: bool = False,
    pushes: bool = False,
    launches: bool = False,
) -> Plan:
    """Plan a recipe whose steps, as far as can be told beforehand, will all run.

    Args:
        recipe: may be a draft.
        only: the steps that will run; with all of them the report is written too.
        rerun: these run though they are finished, and what depends on them.
        force: all finished steps run, too.
        pushes: the models that `push:` names will be pushed.
        launches: the steps will run in other processes, which look at what FSDP and DeepSpeed need themselves.

    Raises:
        InputError: with every problem of the recipe, its data, models and trainings.
    """
    problems = [located(problem, recipe.path, recipe.flags) for problem in push_problems(recipe)] if pushes else []
    again = {*(rerun or ()), *pending_reruns(recipe.output_dir)}

    def check_step(planned: PlannedStep, data: Data | None) -> list[str]:
        if again & set(planned.parents):
            again.add(planned.step.name)
        todo = force or planned.step.name in again or not is_finished(planned)
        runs = todo and (only is None or planned.step.name in only)
        shards = launches and any(getattr(planned.step.options, name, None) for name in _SHARDING)
        if not runs or shards:
            return []
        found = VERBS[planned.step.run].problems(planned.step.options, planned.plan, data)
        return [problem_at(f"steps.{planned.step.name}", problem) for problem in found]

    try:
        plan = make_plan(recipe, check_step=check_step)
        if only is None:
            problems += [located(problem, recipe.path, recipe.flags) for problem in _benchmark_problems(plan)]
    except InputError as error:
        problems = [*error.problems, *problems]
    if problems:
        raise InputError(*problems)
    return plan


def push_problems(recipe: Recipe) -> list[str]:
    """List what keeps the models that `push:` names from being pushed today."""
    if not recipe.push:
        return []
    try:
        require_token()
    except InputError as error:
        return [f"push: {problem}" for problem in error.problems]
    if constants.HF_HUB_OFFLINE:
        return ["push: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or leave push out"]
    return []


def _benchmark_problems(plan: Plan) -> Sequence[str]:
    """List the models that can't be measured at the run's end."""
    configs = {name: planned.plan.config for name, planned in plan.steps.items()}
    if plan.baseline in plan.sources:
        configs[plan.baseline] = plan.sources[plan.baseline].config
    try:
        refuse_too_short(configs, plan.recipe.benchmark)
    except InputError as error:
        return error.problems
    return []
