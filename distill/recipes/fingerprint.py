"""Hash the code that makes a model, so that it can be told later whether the code has changed."""

import ast
import hashlib
import sys
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


@cache
def code_fingerprint(module: str) -> str:
    """Hash a module and all that it imports inside this package.

    Comments, docstrings, help texts and what errors say are left out: no number changes with them.

    Args:
        module: its name inside the package, such as "verbs.distill", or the whole name of one outside of it.
    """
    trees = {name: _without_words(_parsed(name)) for name in sorted(modules_behind(module))}
    return hashlib.sha256("\n".join(ast.unparse(tree) for tree in trees.values()).encode()).hexdigest()


def modules_behind(module: str) -> set[str]:
    """List a module and all that it imports inside this package, wherever the import stands."""
    found, queue = set(), [module]
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += _imported(_parsed(name))
    return found


def _parsed(module: str) -> ast.Module:
    file = _file_of(module)
    if file is None:
        raise FileNotFoundError(f"{module}: no such module")
    return ast.parse(file.read_text(encoding="utf-8"))


def _file_of(module: str) -> Path | None:
    """Where a module's code stands; None where there is no such module."""
    file = _PACKAGE.joinpath(*module.split("."))
    if _is_inside(module):
        return file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    imported = sys.modules.get(module)  # of somebody's verb
    return None if imported is None or imported.__file__ is None else Path(imported.__file__)


def _is_inside(name: str) -> bool:
    file = _PACKAGE.joinpath(*name.split("."))
    return file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()


def _imported(tree: ast.Module) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.module is None or node.module.partition(".")[0] != "distill":
            continue
        inside = node.module.removeprefix("distill").removeprefix(".")
        names = [f"{inside}.{alias.name}".removeprefix(".") for alias in node.names]
        modules = [name for name in names if _is_inside(name)]  # the others are names inside of a module
        found += modules if len(modules) == len(names) else [*modules, inside or "__init__"]
    return found


def _without_words(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        elif isinstance(node, ast.Raise):
            node.exc = node.cause = None
        elif isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "metadata"]
    return tree
