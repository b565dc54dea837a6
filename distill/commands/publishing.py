"""What `distill push` does, and a recipe's `push:` after its report."""

import argparse
from pathlib import Path

from distill.common.console import results
from distill.errors import InputError
from distill.publishing.published import left_out
from distill.publishing.push import push_folder, to_push, write_content
from distill.recipes.recipe import Recipe


def push(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Upload a step's folder."""
    if overrides:
        raise InputError(f"--{next(iter(overrides))}: no such option of push")
    if arguments.dry_run is not None:
        content = to_push(arguments.folder, arguments.repo_id)
        write_content(content, arguments.dry_run)
        _print_left_out(arguments.folder)
        results.print(f"{arguments.dry_run}: {len(content)} files, as they would be pushed to {arguments.repo_id}")
        return
    _push_one(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        collection=arguments.collection,
    )


def push_all(recipe: Recipe) -> None:
    """Push what a recipe's `push:` names, in the order of its steps (adapters come after what they adapt)."""
    problems: list[str] = []
    for name in [step for step in recipe.steps if step in recipe.push]:
        try:
            _push_one(recipe.output_dir / name, recipe.push[name])
        except InputError as error:
            problems += [f"push.{name}: {problem}" for problem in error.problems]
    if problems:
        raise InputError(*problems)


def _push_one(
    folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None, collection: str | None = None
) -> None:
    pushed, is_new = push_folder(folder, repo_id, private=private, revision=revision, collection=collection)
    _print_left_out(folder)
    results.print(f"→ {pushed.url}{'' if is_new else ' (nothing had changed)'}")


def _print_left_out(folder: Path) -> None:
    names = left_out(folder)
    if names:
        results.print(f"note: not pushed, as no files of a model that others load: {', '.join(names)}")
