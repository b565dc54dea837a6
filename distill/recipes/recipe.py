"""A recipe: YAML and overrides → typed steps, with every problem told at once."""

import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from distill.common.options import checked
from distill.common.sources import repo_id_problem
from distill.data.load import DataOptions
from distill.errors import (
    InputError,
    in_one_line,
    nearest_name,
)
from distill.evaluation.options import BenchmarkOptions, ReportOptions
from distill.recipes.search_options import PRESENCE, SearchOptions
from distill.recipes.seeds import expand_seeds, told_once
from distill.recipes.trainer_options import annotations_of, read_mapping, refusal
from distill.recipes.yaml12 import parse_value, read_yaml
from distill.training.checkpoints import CHECKPOINTS
from distill.verbs.all import VERBS
from distill.verbs.base import Options

_TOP_LEVEL = (
    *("task", "data", "output_dir", "baseline", "benchmark", "report", "seeds", "steps"),
    *("base_model", "license", "language", "push", "search"),
)
_USUAL_NAMES = {
    **{"batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs"},
    **{"lr": "learning_rate", "steps": "max_steps", "bits": "bits_budget"},
}
"""What other tools call options, and their names here."""
_FILES_OF_A_RUN = ("recipe.yaml", "report.json", "report.md", "report.png", "report.html", "best.yaml")
_KEYED = re.compile(r"[a-z][a-z0-9_]*(\.[a-z_]+)*: ")
_STEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")  # ISO 639-1, 639-2 or 639-3, and the Hub's two special words


@dataclass(frozen=True)
class Step:
    """One verb with its options; its name is the name of the model it makes."""

    name: str
    run: str
    options: Options
    given: dict[str, Any]
    """The options that the user gave, as their fields' types."""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; one read as a draft may have problems, and then holds what is right of it."""

    path: Path
    task: str | None
    data: DataOptions
    output_dir: Path
    baseline: str | None
    benchmark: BenchmarkOptions
    steps: dict[str, Step]
    given: dict[str, dict[str, Any]]
    """For every step, also a wrong one that `steps` lacks: `run`, and the given options that are right."""
    data_is_readable: bool = True
    problems: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()
    """Paths of the values that were typed on the command line."""
    base_model: str | None = None
    """What model cards name as the root of the lineage, a Hub id; for a root that is no model on the Hub."""
    license: str | None = None
    """Of model cards; by default the root's."""
    language: tuple[str, ...] = ()
    """Of model cards; by default GLUE's or the root's."""
    report: ReportOptions = field(default_factory=ReportOptions)
    seeds: tuple[int, ...] = ()
    copies: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For each step that is there once per seed, the names of its steps in their order, its own first."""
    push: dict[str, str] = field(default_factory=dict)
    """For steps, the repositories that their models are pushed to after the report."""
    search: SearchOptions | None = None
    """What `distill search` tries; `run` makes the recipe as it stands."""


def load_recipe(
    path: Path, overrides: Mapping[str, str] | None = None, *, draft: bool = False, without: Collection[str] = ()
) -> Recipe:
    """Read a recipe, and check every key and value of it.

    Args:
        path: the YAML file.
        overrides: values (as YAML) by path: `student.temperature`, `data.max_length`, `output_dir`.
        without: steps that are left out; those that start from one start from what it starts from.
        draft: leave the problems in the recipe, for `make_plan` to tell them with those of data and models.

    Raises:
        InputError: with every problem of the file and of the overrides.
    """
    content = read_yaml(path)
    problems: list[str] = []
    steps = content.get("steps")
    if not isinstance(steps, dict) or not steps:
        problems.append("steps: missing; a recipe names at least one step with a `run:`")
        steps = content["steps"] = {}
    overrides = overrides or {}
    _apply_overrides(content, overrides, problems)
    every_step = dict(steps)
    for name in without:
        _leave_out(name, content)
    seeds, copies = expand_seeds(content, problems)
    steps = content["steps"]

    unknown = [key for key in content if key not in _TOP_LEVEL]
    for key in unknown:
        problems.append(f"{key}: unknown key; {nearest_name(key, _TOP_LEVEL)}")
    output_dir = content.get("output_dir")
    if output_dir and isinstance(output_dir, str) and _can_be_looked_for(Path(output_dir)):
        folder = Path(output_dir).expanduser()
    else:
        folder = Path("runs") / path.stem  # of a draft, which nothing is written for
        found = f"{output_dir!r} is no path" if output_dir else "missing"
        problems.append(f"output_dir: {found}; say where the run folders go, like {folder}")
    names = {}
    for key in ("task", "baseline"):
        names[key] = content.get(key)
        if names[key] is not None and not isinstance(names[key], str):
            problems.append(f"{key}: should be a name, got {names.pop(key)!r}")
    data = parse_options(DataOptions, content.get("data") or {}, "data", problems)
    benchmark = parse_options(BenchmarkOptions, content.get("benchmark") or {}, "benchmark", problems)
    report = parse_options(ReportOptions, content.get("report") or {}, "report", problems)
    given: dict[str, dict[str, Any]] = {}
    parsed = {}
    for name, options in steps.items():
        given[name] = {}
        step = _parse_step(name, options, folder, given[name], problems)
        if step is not None:
            parsed[name] = step
    push = _checked_push(content.get("push"), steps, problems)
    base_model, license, language = _checked_card(content, problems)
    search = _checked_search(content.get("search"), every_step, problems)
    problems = [located(problem, path, overrides) for problem in told_once(problems, copies)]
    if problems and not draft:
        raise InputError(*problems)
    misnamed = bool(unknown) and not {"task", "data"} & content.keys()
    return Recipe(
        path=path,
        task=names.get("task"),
        data=data or DataOptions(),
        output_dir=folder,
        baseline=names.get("baseline"),
        benchmark=benchmark or BenchmarkOptions(),
        steps=parsed,
        given=given,
        data_is_readable=data is not None and "task" in names and not misnamed,
        problems=tuple(problems),
        flags=frozenset(overrides),
        base_model=base_model,
        license=license,
        language=language,
        report=report or ReportOptions(),
        seeds=seeds,
        copies=copies,
        push=push,
        search=search,
    )


def _can_be_looked_for(path: Path) -> bool:
    """Whether the system takes the name, which may be too long."""
    try:
        path.exists()
    except OSError:
        return False
    return True


def located(problem: str, path: Path, flags: Collection[str]) -> str:
    """Put the place before a problem `key: …`: the recipe's path, or the flag by which the user gave the value.

    Args:
        problem: begins with its key; one that begins with a flag has its place already.
        path: of the recipe.
        flags: the paths (`student.temperature`) that were given on the command line.
    """
    key = problem.partition(": ")[0].removeprefix("steps.")
    if key in flags:
        return f"--{problem.removeprefix('steps.')}"
    return problem if problem.startswith("--") else f"{path}: {problem}"


def problem_at(where: str, problem: str) -> str:
    """Put the step before a problem; one that begins with an option's name (`lora.r: …`) makes one path with it.

    Args:
        where: the step, as `steps.student`.
        problem: of one of its options, or of the whole step.
    """
    return f"{where}.{problem}" if _KEYED.match(problem) else f"{where}: {problem}"


def parse_options(options_class: type, given: Any, where: str, problems: list[str]) -> Any:
    """Make an instance of a dataclass of a mapping, each value checked against its field's annotation.

    Args:
        options_class: the dataclass.
        given: the mapping, as YAML gave it.
        where: stands before each problem.
        problems: what is wrong is appended here, and None returned.
    """
    found = len(problems)
    values = _right_values(options_class, given, where, problems)
    return options_class(**values) if len(problems) == found else None


# --- what is published ---------------------------------------------------------------------------------------------


def _checked_push(given: Any, steps: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    """The `push:` block; what is wrong with it goes into `problems`."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        problems.append(f"push: should be a mapping like {{{next(iter(steps), 'student')}: ORG/NAME}}, got {given!r}")
        return {}
    right: dict[str, str] = {}
    for name, repo_id in given.items():
        problem = repo_id_problem(repo_id) if isinstance(repo_id, str) else f"should be ORG/NAME, got {repo_id!r}"
        if name not in steps:
            problems.append(f"push.{name}: no step {name!r}; {nearest_name(name, steps)}")
        elif problem:
            problems.append(f"push.{name}: {problem}")
        elif repo_id in right.values():
            problems.append(f"push.{name}: {repo_id} is another step's already; each has its own repository")
        else:
            right[name] = repo_id
    return right


def _checked_card(content: Mapping[str, Any], problems: list[str]) -> tuple[str | None, str | None, tuple[str, ...]]:
    """base_model, license and language, by the rules that the Hub has for them."""
    base_model, license, language = (content.get(key) for key in ("base_model", "license", "language"))
    if base_model is not None and (
        not isinstance(base_model, str) or Path(base_model).exists() or repo_id_problem(base_model)
    ):
        problems.append(f"base_model: should name a model on the Hub, like org/name; got {base_model!r}")
    if license is not None and not (isinstance(license, str) and _LICENSE.fullmatch(license)):
        problems.append(f"license: should be one of the Hub's identifiers, like apache-2.0; got {license!r}")
    languages = language if isinstance(language, list) else [] if language is None else [language]
    if not all(isinstance(each, str) and _LANGUAGE.fullmatch(each) for each in languages):
        problems.append(f"language: should be codes of two or three letters, like en; got {language!r}")
    return base_model, license, tuple(languages)


def _checked_search(given: Any, steps: Mapping[str, Any], problems: list[str]) -> SearchOptions | None:
    """The `search:` block; what is wrong with it goes into `problems`. What is tried is checked by trying it."""
    if given is None:
        return None
    found = len(problems)
    values = _right_values(SearchOptions, given, "search", problems)
    if len(problems) > found:
        return None
    try:
        search = SearchOptions(**values)
    except InputError as error:
        problems += [f"search.{problem}" for problem in error.problems]
        return None
    if search.step is not None and search.step not in steps:
        problems.append(f"search.step: no step {search.step!r}; {nearest_name(search.step, steps)}")
    for path, tried in search.space.items():
        if path in steps and tried != list(PRESENCE):
            problems.append(f"search.space.{path}: is a step, so what can be tried is [{', '.join(PRESENCE)}]")
        elif path == search.step:
            problems.append(f"search.space.{path}: its metric is optimised, so it can't be left out")
        elif not _longest_step(path, steps) and path not in steps and path.partition(".")[0] != "data":
            known = [*steps, "data"]
            problems.append(f"search.space.{path}: no such step; {nearest_name(path.partition('.')[0], known)}")
    return search


# --- steps ----------------------------------------------------------------------------------------------------------


def _parse_step(name: str, given: Any, output_dir: Path, right: dict[str, Any], problems: list[str]) -> Step | None:
    """The step, or None where it is wrong; `run` and the options that are right go into `right`."""
    where, found = f"steps.{name}", len(problems)
    if not _STEP_NAME.fullmatch(name) or name in _TOP_LEVEL + _FILES_OF_A_RUN:
        problems.append(
            f"{where}: a step's name is at most 100 letters, digits, '.', '_', '-', no top-level key and no file that "
            "a run writes"
        )
    if not isinstance(given, dict) or "run" not in given:
        problems.append(f"{where}.run: missing; one of {', '.join(VERBS)}")
        return None
    given = dict(given)
    verb = given.pop("run")
    if not isinstance(verb, str) or verb not in VERBS:
        problems.append(f"{where}.run: no verb {verb!r}; {nearest_name(str(verb), VERBS)}")
        return None
    options_class = VERBS[verb].options
    values = _right_values(options_class, given, where, problems)
    right |= {"run": verb, **values}
    fixed = {"output_dir": str(output_dir / name / CHECKPOINTS)} if VERBS[verb].trains else {}
    missing = dict.fromkeys(_required(options_class) - values.keys())  # so that the others are checked together
    try:
        options = options_class(**missing, **values, **fixed)
    except InputError as error:
        problems += [problem_at(where, problem) for problem in error.problems]
    except Exception as error:  # of whatever kind TrainingArguments and the packages it asks raise, it is about values
        problems.append(f"{where}: {in_one_line(error)}")
    return Step(name, verb, options, values) if len(problems) == found else None


def _apply_overrides(content: dict[str, Any], overrides: Mapping[str, str], problems: list[str]) -> None:
    for path, text in overrides.items():
        first, _, rest = path.partition(".")
        try:
            value = parse_value(text, f"--{path}")
        except InputError as error:
            problems += error.problems
            continue
        if first in ("data", "benchmark", "report", "push", "search") and rest:
            block = content.get(first)
            content[first] = {**(block if isinstance(block, dict) else {}), rest: value}
        elif path in _TOP_LEVEL and path != "steps":
            content[path] = value
        elif _longest_step(path, content["steps"]):
            step = _longest_step(path, content["steps"])
            block = content["steps"][step]
            content["steps"][step] = {**(block if isinstance(block, dict) else {}), path[len(step) + 1 :]: value}
        elif content["steps"]:
            known = [*content["steps"], *(key for key in _TOP_LEVEL if key != "steps")]
            problems.append(f"--{path}: no such step or key; {nearest_name(first, known)}")


def _leave_out(name: str, content: dict[str, Any]) -> None:
    """Take a step out of a recipe's content; what named it names what it starts from."""
    steps = content["steps"]
    left = steps.pop(name, None)
    parent = left.get("model", left.get("teacher")) if isinstance(left, dict) else None
    for options in [each for each in steps.values() if isinstance(each, dict)]:
        for key in ("model", "teacher"):
            if options.get(key) == name:
                options[key] = parent
            elif isinstance(options.get(key), list):
                options[key] = [parent if each == name else each for each in options[key]]


def _longest_step(path: str, steps: Mapping[str, Any]) -> str:
    """The step that an override's path starts with (step names may hold dots); '' if none."""
    return max((name for name in steps if path.startswith(f"{name}.")), key=len, default="")


# --- values ---------------------------------------------------------------------------------------------------------


def _right_values(options_class: type, given: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """The given options that are right, their values as the fields' types; what is wrong goes into `problems`."""
    if not isinstance(given, dict):
        problems.append(f"{where}: should be a mapping of options, got {given!r}")
        return {}
    annotations = annotations_of(options_class)
    known = {
        field.name: field for field in fields(options_class) if field.init and not refusal(options_class, field.name)
    }
    values = {}
    for key, value in given.items():
        if refused := refusal(options_class, key):
            problems.append(f"{where}.{key}: {refused}")
        elif key not in known:
            problems.append(f"{where}.{key}: unknown option; {_instead(key, known)}")
        else:
            try:
                values[key] = read_mapping(key, checked(value, annotations[key]), annotations[key])
            except InputError as error:
                problems.append(f"{where}.{key}: {error}")
    for name in known:
        if name in _required(options_class) and name not in given:
            problems.append(f"{where}.{name}: missing. {known[name].metadata['help']}")
    return values


def _instead(key: str, known: Collection[str]) -> str:
    """What an unknown option was meant to be."""
    if key == "teacher":
        takes_one = [name for name, verb in VERBS.items() if any(field.name == key for field in fields(verb.options))]
        return f"a teacher belongs to run: {' or '.join(takes_one)}"
    usual = _USUAL_NAMES.get(key)
    return f"did you mean {usual!r}?" if usual in known else nearest_name(key, known)


def _required(options_class: type) -> set[str]:
    without = [field for field in fields(options_class) if field.default is field.default_factory is MISSING]
    return {field.name for field in without if not refusal(options_class, field.name)}
