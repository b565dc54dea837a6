"""`seeds:` of a recipe: every training once per seed, and whatever starts from a trained model once per seed of it."""

from collections.abc import Iterable, Mapping
from typing import Any

from distill.verbs.all import VERBS
from distill.verbs.references import referenced_models

Copies = Mapping[str, tuple[str, ...]]
"""For each step that is there once per seed, the names of its steps in the order of the seeds, its own first."""


def expand_seeds(content: dict[str, Any], problems: list[str]) -> tuple[tuple[int, ...], dict[str, tuple[str, ...]]]:
    """Put a step for each seed in the place of each step that depends on one; others stay as they are.

    The first seed's step keeps the name, the others are called `student.seed1` after their seed. A step of one seed
    starts from, and learns from, the steps of the same seed.

    Args:
        content: of a recipe; its `steps` are replaced.
        problems: what is wrong is appended here.

    Returns:
        The seeds, and the steps that are there once for each; both empty for a recipe without `seeds`.
    """
    seeds = content.get("seeds")
    if seeds is None:
        return (), {}
    if not _are_seeds(seeds):
        problems.append(
            f"seeds: should be two or more different whole numbers from 0 on, like [0, 1, 2]; got {seeds!r}"
        )
        return (), {}
    steps: dict[str, Any] = {}
    copies: dict[str, tuple[str, ...]] = {}
    for name, options in content["steps"].items():
        trains = isinstance(options, dict) and options.get("run") in _TRAINING
        starts_from_one = isinstance(options, dict) and any(each in copies for each in _references(options))
        if not trains and not starts_from_one:
            steps[name] = options
            continue
        if trains and "seed" in options:
            problems.append(f"steps.{name}.seed: seeds gives every training its own; leave one of them out")
        copies[name] = (name, *(f"{name}.seed{seed}" for seed in seeds[1:]))
        taken = [each for each in copies[name][1:] if each in content["steps"]]
        if taken:
            problems.append(f"steps.{taken[0]}: is what seeds calls a step of its own; rename it")
        for number, (seed, copy) in enumerate(zip(seeds, copies[name], strict=True)):
            same_seed = {first: of_seeds[number] for first, of_seeds in copies.items() if first != name}
            steps[copy] = _with_models(options, same_seed) | ({"seed": seed} if trains else {})
    content["steps"] = steps
    if not copies:
        problems.append("seeds: no step trains, so nothing depends on a seed; leave it out")
    return tuple(seeds), copies


def unexpanded(steps: Mapping[str, dict[str, Any]], copies: Copies) -> dict[str, dict[str, Any]]:
    """The steps as their recipe names them, for one that is written with its `seeds`.

    Args:
        steps: `run` and options of each.
        copies: those of them that are there once per seed.
    """
    others = {copy for of_seeds in copies.values() for copy in of_seeds[1:]}
    return {
        name: {key: value for key, value in options.items() if key != "seed" or name not in copies}
        for name, options in steps.items()
        if name not in others
    }


def told_once(problems: Iterable[str], copies: Copies) -> list[str]:
    """Leave out the problems of a further seed's step that its first seed's step has as well.

    Args:
        problems: each beginning with its key (`steps.student.num_layers: …`).
        copies: the steps that are there once per seed.
    """
    found = list(problems)
    kept = []
    for problem in found:
        repeats = any(
            problem.startswith((f"steps.{copy}.", f"steps.{copy}:"))
            and f"steps.{first}{problem[len(f'steps.{copy}') :]}" in found
            for first, of_seeds in copies.items()
            for copy in of_seeds[1:]
        )
        if not repeats:
            kept.append(problem)
    return kept


_TRAINING = {name for name, verb in VERBS.items() if verb.trains}


def _are_seeds(seeds: Any) -> bool:
    if not isinstance(seeds, list) or len(seeds) < 2 or any(type(seed) is not int for seed in seeds):
        return False
    return len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)


def _references(options: Mapping[str, Any]) -> list[str]:
    """What the options name, as far as they are names."""
    teacher = options.get("teacher")
    given = {
        **options,
        "teacher": [teacher] if isinstance(teacher, str) else teacher if isinstance(teacher, list) else [],
    }
    return [each for each in referenced_models(given).values() if isinstance(each, str)]


def _with_models(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Options that name other models."""

    def renamed(value: Any) -> Any:
        return [renamed(each) for each in value] if isinstance(value, list) else _renamed(value, names)

    return {key: renamed(value) if key in ("teacher", "model") else value for key, value in options.items()}


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    return names.get(value, value) if isinstance(value, str) else value
