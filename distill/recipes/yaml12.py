"""YAML by version 1.2's core schema, as recipes are read and written: `no` is a word, `2e-5` a number."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from distill.errors import InputError, near_name, nearest_name

_MOST_NODES = 100_000
"""A recipe has hundreds; more come of aliases of aliases, each of which stands for all that it repeats."""

_LONGEST_NUMBER = 1000
"""Python reads whole numbers of a few thousand digits, and no longer ones."""

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TYPES = {
    "null": re.compile(r"(~|null|Null|NULL|)"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": _INT,
    "float": _FLOAT,
}
_TAG = "tag:yaml.org,2002:"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping (see `parse_yaml`).

    Raises:
        InputError: no such file, one that can't be read, no mapping, a key twice, or not YAML at all.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a recipe, a YAML file{_recipe_inside(path)}")
    if not path.is_file():
        raise InputError(f"{path}: no such recipe{_near_recipe(path)}")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not readable as YAML: no text in UTF-8 from byte {error.start} on") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not readable as YAML: {yaml_problem(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: a recipe is a mapping with task (or data), output_dir and steps")
    return content


def parse_value(text: str, flag: str) -> Any:
    """Read one YAML value, as a flag of the command line gives it.

    Args:
        text: the value.
        flag: its name with the dashes, for the message.

    Raises:
        InputError: it is no YAML.
    """
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise InputError(f"{flag}: {text!r} is no YAML value; quote it") from None


def parse_yaml(text: str) -> Any:
    """Read what a YAML document holds: mappings with strings as keys, lists, strings, numbers, booleans, None.

    Raises:
        yaml.YAMLError: no YAML, a key twice in a mapping, a key that is no scalar, a tag beyond the core schema's or
            with a value that is none of its type, characters that no path and no file can hold, or aliases that stand
            for too much.
    """
    loader = _CoreSchemaLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


def dump_yaml(content: Any) -> str:
    """Write a document that YAML 1.1 and 1.2 read alike, in the order of the content's keys."""
    return yaml.dump(content, Dumper=_CoreSchemaDumper, sort_keys=False, allow_unicode=True, width=120)


def yaml_problem(error: yaml.YAMLError) -> str:
    """Say in one line what is wrong with a document, and where."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
    message = ", ".join(part for part in (error.context, error.problem) if part)  # type: ignore[attr-defined]
    return f"line {mark.line + 1}, column {mark.column + 1}: {message}"


# --- another recipe that may be meant --------------------------------------------------------------------------------


def _recipe_inside(folder: Path) -> str:
    """The recipe that a run has left in its folder."""
    return f"; did you mean {str(folder / 'recipe.yaml')!r}?" if (folder / "recipe.yaml").is_file() else ""


def _near_recipe(path: Path) -> str:
    """The recipes in the same folder or under ./recipes that are named most like `path`, or all of them."""
    found = dict.fromkeys([*path.parent.glob("*.yaml"), *Path("recipes").rglob("*.yaml")])
    recipes = [other for other in found if not other.name.startswith(".")]
    name = near_name(path.name, [other.name for other in recipes])
    if name:
        return f"; did you mean {' or '.join(repr(str(other)) for other in recipes if other.name == name)}?"
    return f"; {nearest_name(str(path), map(str, recipes))}" if recipes else ""


# --- what a document may hold ---------------------------------------------------------------------------------------


def _check(root: yaml.Node) -> None:
    """Raise where a document holds what the core schema has not, or more than a file of its length should."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        """Of the tree that aliases stand for."""
        if id(node) in sizes:
            found = sizes[id(node)]
            if found is None:
                raise _problem(node, "an alias stands inside of what it repeats")
            return found
        sizes[id(node)] = None
        _check_node(node)
        found = sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
        if found > _MOST_NODES:
            raise _problem(node, f"aliases stand for more than {_MOST_NODES:,} values")
        return found

    size(root)


def _check_node(node: yaml.Node) -> None:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode):
        if kind not in ("str", "merge", *_TYPES):
            raise _problem(node, f"the tag {node.tag!r} has no meaning here")
        if kind in _TYPES and not (_TYPES[kind].fullmatch(node.value) and len(node.value) < _LONGEST_NUMBER):
            raise _problem(node, f"{node.value!r} is no {kind}")
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
            raise _problem(node, f"{node.value!r} holds a NUL or half a surrogate pair, which no file can")
        return
    if kind != ("map" if isinstance(node, yaml.MappingNode) else "seq"):
        raise _problem(node, f"the tag {node.tag!r} has no meaning here")
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:  # as written: what `<<` brings in may be overridden
            if not isinstance(key, yaml.ScalarNode):
                raise _problem(key, "a key should be one word, not a list or a mapping")
            if key.value in seen:
                raise _problem(key, f"key {key.value!r} stands there twice")
            seen.add(key.value)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _problem(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


# --- PyYAML, which follows YAML 1.1, where `no` is false, `2e-5` a string and `1:30` ninety --------------------------


class _CoreSchemaLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (as PyYAML declares it)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        self.flatten_mapping(node)
        return {str(key.value): self.construct_object(value, deep=deep) for key, value in node.value}


for _kind, _pattern in _TYPES.items():
    _CoreSchemaLoader.add_implicit_resolver(_TAG + _kind, re.compile(f"({_pattern.pattern})$"), None)
_CoreSchemaLoader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"<<$"), None)
_CoreSchemaLoader.add_constructor(
    f"{_TAG}int", lambda loader, node: int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))
)


class _CoreSchemaDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quoted where YAML 1.2 would take it for something else; PyYAML itself looks after 1.1."""
    is_other = any(pattern.fullmatch(text) for pattern in _TYPES.values())
    has_breaks = any(character in text for character in "\x85\u2028\u2029")  # PyYAML loses them in single quotes
    return dumper.represent_scalar(f"{_TAG}str", text, style='"' if has_breaks else "'" if is_other else None)


_CoreSchemaDumper.add_representer(str, _represent_str)
