"""`distill search`: Optuna over a recipe's values, by as many processes as share the folder."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from distill.common.console import log, styled
from distill.common.distributed import process_state
from distill.common.folders import write_atomically
from distill.common.serialized import as_json
from distill.errors import InputError
from distill.experiments.found import Found, Tried, as_markdown
from distill.experiments.trials import Outcome, held, is_held, linked, overrides_of, run_trial
from distill.recipes.dry_run import runnable_plan
from distill.recipes.recipe import Recipe, load_recipe, located
from distill.recipes.search_options import Choice, SearchOptions
from distill.runs.run import recipe_text
from distill.tasks.base import is_better_lower
from distill.verbs.all import VERBS

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial, TrialState

FOLDER = "search"
"""In the output folder: the study, the trials, and the steps that they share."""
BEST = "best"
"""In the output folder: where `best.yaml` runs into."""
_NAME = "search"
_WAIT = 2.0
"""Seconds between looks at trials of other processes."""


def search(path: Path, overrides: Mapping[str, str] | None = None) -> Found:
    """Try values of a recipe's paths until all trials of its `search:` block are done, then write `best.yaml`.

    A search that was cut off goes on where it was; several processes that share the folder take trials of one study.

    Args:
        path: of the recipe.
        overrides: values (as YAML) by path, of every trial.

    Raises:
        InputError: no `search:` block, a value in its space that a step can't have, a study of another space in the
            folder, Optuna is not installed, or any problem of the recipe.
    """
    try:
        import optuna  # of an extra
    except ImportError:
        raise InputError("search: needs Optuna; pip install 'distill-transformers[search]'") from None

    if process_state().num_processes > 1:
        raise InputError("search: each process of a search is started by itself; start `distill search` several times")
    given = dict(overrides or {})
    recipe, options = _checked(path, given)
    plan = runnable_plan(recipe, only=[])
    name, metric = options.step or _last_trained(recipe), plan.data.task.primary_metric
    folder = recipe.output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _study(folder, options, direction="minimize" if is_better_lower(metric) else "maximize")
    _same_space(study, options, name)
    until = None if options.timeout is None else time.monotonic() + options.timeout
    while until is None or time.monotonic() < until:
        with ExitStack() as stack:
            trial = _next(study, options, folder, stack)
            if trial is None and not _running(study):
                break
            if trial is None:
                time.sleep(_WAIT)  # the last ones are others'
                continue
            _run(trial, path, given, recipe, name, folder)
            _say(study, trial.number, options, metric)
    found = _found(study, name, metric)
    if found.best is not None:
        _write_best(found.best, path, given, recipe, folder)
    write_atomically(folder / "search.json", as_json(found))
    write_atomically(folder / "search.md", as_markdown(found))
    return found


def space_problems(path: Path, overrides: Mapping[str, str], recipe: Recipe) -> list[str]:
    """List what steps say to the values that a search would try, each beginning with its place.

    Args:
        path: of the recipe.
        overrides: of every trial.
        recipe: read with these.
    """
    problems = []
    for key, tried in [] if recipe.search is None else recipe.search.parsed().items():
        for value in tried.ends:
            changed, without = overrides_of({key: value}, recipe.steps)
            again = load_recipe(path, {**overrides, **changed}, draft=True, without=without)
            new = [problem for problem in again.problems if problem not in recipe.problems]
            where = located(f"search.space.{key}", path, set())
            problems += [f"{where}: {json.dumps(value)}: {each.partition(': ')[2] or each}" for each in new]
    return list(dict.fromkeys(problems))


def _checked(path: Path, overrides: Mapping[str, str]) -> tuple[Recipe, SearchOptions]:
    recipe = load_recipe(path, overrides, draft=True)
    problems = [*recipe.problems, *space_problems(path, overrides, recipe)]
    if recipe.search is None and not problems:
        problems = [f"{path}: search: missing; say what to try, like search: {{space: {{student.num_layers: [2, 3]}}}}"]
    if problems or recipe.search is None:
        raise InputError(*problems)
    return recipe, recipe.search


def _last_trained(recipe: Recipe) -> str:
    trained = [name for name, step in recipe.steps.items() if VERBS[step.run].trains]
    return (trained or list(recipe.steps))[-1]


# --- the study ------------------------------------------------------------------------------------------------------


def _study(folder: Path, options: SearchOptions, direction: Literal["minimize", "maximize"]) -> "optuna.Study":
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    file = str(folder / "study.log")
    pruners: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=1, max_resource=4),
        "none": optuna.pruners.NopPruner,
    }
    return optuna.create_study(
        study_name=_NAME,
        storage=JournalStorage(JournalFileBackend(file, lock_obj=JournalFileOpenLock(file))),
        direction=direction,
        pruner=pruners[options.pruner](),
        load_if_exists=True,
    )


def _sampler(options: SearchOptions, number: int) -> "optuna.samplers.BaseSampler":
    """Of one trial: a new one with a seed of its own, so that a search that was cut off goes on as it would have."""
    import optuna

    seed = options.seed * 1_000_003 + number
    if options.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if options.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if options.sampler == "qmc":
        return optuna.samplers.QMCSampler(seed=options.seed, warn_independent_sampling=False)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=5)


def _same_space(study: "optuna.Study", options: SearchOptions, name: str) -> None:
    """Take a new study for this space; raise an `InputError` where it is another one's."""
    now = {"space": json.loads(json.dumps(options.space)), "step": name, "limits": dict(options.limits)}
    before = study.user_attrs.get("searched")
    if before is None:
        study.set_user_attr("searched", now)
        return
    changed = [key for key in now if before[key] != now[key]]
    if changed:
        raise InputError(
            f"search.{changed[0]}: the trials in the folder are of {before[changed[0]]}; say another output_dir, or "
            "remove its folder search"
        )


def _next(study: "optuna.Study", options: SearchOptions, folder: Path, stack: ExitStack) -> "Trial | None":
    """The next trial, held for this process as long as the stack is open; None where all are taken."""
    from optuna.trial import TrialState

    with FileLock(str(folder / "study.lock")):  # one process at a time counts and takes
        _give_back(study, folder)
        trials = study.get_trials(deepcopy=False)
        taken = [each for each in trials if each.state in (*_ended(), TrialState.RUNNING)]
        if len(taken) >= options.trials:
            return None
        study.sampler = _sampler(options, len(taken))
        trial = study.ask()
        if "folder" not in trial.user_attrs:
            trial.set_user_attr("folder", f"{len(taken):04d}")
        stack.enter_context(held(folder / "trials" / trial.user_attrs["folder"]))
        _suggested(trial, options)
        return trial


def _give_back(study: "optuna.Study", folder: Path) -> None:
    """Put the trials of processes that have died back to be taken."""
    from optuna.trial import TrialState

    for dead in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        name = dead.user_attrs.get("folder")
        if name is not None and is_held(folder / "trials" / name):
            continue
        if name is not None:
            study.enqueue_trial(dead.params, user_attrs={"folder": name})
        study.tell(dead.number, state=TrialState.FAIL)


def _ended() -> "tuple[TrialState, ...]":
    from optuna.trial import TrialState

    return TrialState.COMPLETE, TrialState.PRUNED


def _running(study: "optuna.Study") -> bool:
    from optuna.trial import TrialState

    return bool(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))


def _suggested(trial: "Trial", options: SearchOptions) -> None:
    for path, tried in options.parsed().items():
        if isinstance(tried, Choice):
            trial.suggest_categorical(path, tried.texts)
        elif tried.is_whole:
            trial.suggest_int(path, int(tried.low), int(tried.high), log=tried.log, step=int(tried.step or 1))
        else:
            trial.suggest_float(path, tried.low, tried.high, log=tried.log, step=tried.step)


def _values(params: Mapping[str, Any]) -> dict[str, Any]:
    """Values by path as YAML has them: choices are stored as JSON."""
    return {path: json.loads(value) if isinstance(value, str) else value for path, value in params.items()}


# --- one trial ------------------------------------------------------------------------------------------------------


def _run(trial: "Trial", path: Path, overrides: Mapping[str, str], recipe: Recipe, name: str, folder: Path) -> None:
    """Run a trial, and tell the study."""
    from optuna.trial import TrialState

    place = folder / "trials" / trial.user_attrs["folder"]
    try:
        outcome = _outcome(trial, path, overrides, recipe, name, folder, place)
    except InputError as error:  # values that are right alone and not together
        outcome = Outcome("refused", reason="; ".join(error.problems))
    trial.set_user_attr("outcome", asdict(outcome))
    if outcome.state == "finished":
        trial.study.tell(trial.number, outcome.value)
    else:
        shutil.rmtree(place, ignore_errors=True)
        trial.study.tell(trial.number, state=TrialState.PRUNED)


def _outcome(
    trial: "Trial",
    path: Path,
    overrides: Mapping[str, str],
    recipe: Recipe,
    name: str,
    folder: Path,
    place: Path,
) -> Outcome:
    values = _values(trial.params)
    shown = ", ".join(f"{key} {value}" for key, value in values.items())
    log.print(styled(("\n", ""), (f"trial {int(place.name)}", "bold"), f": {shown}"))
    plan = runnable_plan(_recipe_of(values, path, overrides, recipe, place / "run"), only=[])
    limits = {str(key): most for key, most in (recipe.search.limits if recipe.search else {}).items()}

    def report(rung: int, value: float) -> bool:
        trial.report(value, rung)
        return trial.should_prune()

    return run_trial(plan, name, folder / "steps", limits, report)


def _recipe_of(
    values: Mapping[str, Any], path: Path, overrides: Mapping[str, str], recipe: Recipe, output_dir: Path
) -> Recipe:
    """The recipe with a trial's values, without a `search:` block."""
    changed, without = overrides_of(values, recipe.steps)
    overrides = {**overrides, **changed, "output_dir": json.dumps(str(output_dir))}
    found = load_recipe(path, overrides, without=without)
    return replace(found, search=None, push={}, baseline=found.baseline if found.baseline not in without else None)


def _write_best(best: Tried, path: Path, overrides: Mapping[str, str], recipe: Recipe, folder: Path) -> None:
    """The best trial as a recipe, and its finished steps where that runs into."""
    output_dir = recipe.output_dir / BEST
    made = _recipe_of(best.params, path, overrides, recipe, output_dir)
    trained = folder / "trials" / f"{best.number:04d}" / "run"
    for name in made.steps:
        if (trained / name / "step.json").is_file():
            linked(trained / name, output_dir / name)
    write_atomically(recipe.output_dir / "best.yaml", recipe_text(made))


# --- what was found -------------------------------------------------------------------------------------------------


def _found(study: "optuna.Study", name: str, metric: str) -> Found:
    tried = [_tried(each) for each in study.get_trials(deepcopy=False) if each.state in _ended()]
    finished = [each for each in tried if each.outcome.value is not None and each.outcome.state == "finished"]
    sign = -1 if is_better_lower(metric) else 1
    best = max(finished, key=lambda each: sign * (each.outcome.value or 0), default=None)
    return Found(metric, name, tried, best, _importance(study, finished))


def _tried(trial: "FrozenTrial") -> Tried:
    """One ended trial; of one that was given back, the number of the folder that it ran in."""
    return Tried(int(trial.user_attrs["folder"]), _values(trial.params), Outcome(**trial.user_attrs["outcome"]))


def _importance(study: "optuna.Study", finished: Sequence[Tried]) -> dict[str, float]:
    """How much of the metric's spread each path explains (fANOVA, Hutter et al. 2014)."""
    import optuna

    if len(finished) < 4 or len({each.outcome.value for each in finished}) < 2:
        return {}
    return {path: round(share, 4) for path, share in optuna.importance.get_param_importances(study).items()}


def _say(study: "optuna.Study", number: int, options: SearchOptions, metric: str) -> None:
    """How a trial ended, and the best so far."""
    trials = study.get_trials(deepcopy=False)
    ended = [each for each in trials if each.state in _ended()]
    outcome = Outcome(**trials[number].user_attrs["outcome"])
    sizes = [f"{taken:.1f} {unit}" for taken, unit in ((outcome.mb, "MB"), (outcome.ms, "ms")) if taken is not None]
    said = [outcome.state if outcome.value is None else f"{metric} {outcome.value:.4f}", *sizes, outcome.reason or ""]
    values = [each.value for each in ended if each.state.name == "COMPLETE" and each.value is not None]
    best = (min if study.direction.name == "MINIMIZE" else max)(values, default=None)
    so_far = "" if best is None else f"; best so far {best:.4f}"
    name, ended_as = int(trials[number].user_attrs["folder"]), ", ".join(filter(None, said))
    log.print(f"      trial {name}: {ended_as}; {len(ended)} of {options.trials} done{so_far}")
