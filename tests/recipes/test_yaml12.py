import json

import pytest
import yaml

from distill.recipes.yaml12 import dump_yaml, parse_yaml, yaml_problem

NAMES = [
    *("no", "yes", "on", "Off", "y", "true", "null", "~", "", "1", "0o7", "0x1F", "1_000", "1e5", "2e-5", ".5", ".inf"),
    *(".nan", "1:30", "2020-01-01", "a: b", "- a", "# a", "a #b", "@a", "`a`", "%a", "&a", "*a", "!a", "|", ">", "{a}"),
    *("[ham]", "a'b", 'a"b', "a\\b", " a ", "a\nb", "a\n---\nb", "---", "...", "<<", "=", "?", "$x", "é", "😀"),
    *("\u2028", "\x85", "\x1b[0m", "\ufeff", "a\tb", "-", "--- a", "'", '"'),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_name_comes_back_as_it_was_by_yaml_1_1_and_1_2(name):
    content = {"names": [name], "of": {name or "empty": name}, "key": name}
    text = dump_yaml(content)
    assert parse_yaml(text) == content
    assert yaml.safe_load(text) == content
    assert not any(line.startswith("---") for line in text.splitlines())  # where a card's front matter would end


def test_other_values_come_back_too():
    content = {"a": 1, "b": 2e-5, "c": True, "d": None, "e": [1, [2.5]], "f": {}, "g": 1e20}
    assert parse_yaml(dump_yaml(content)) == content
    shared = [1, 2]
    assert "&" not in dump_yaml({"a": shared, "b": shared})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' stands there twice"),
        ("a: {b: 1,\n 'b': 2}", "line 2, column 2: key 'b' stands there twice"),
        ("a:\n\t- b", "line 2, column 1: while scanning for the next token, found character '\\t'"),
        ("a: &a [*a]", "line 1, column 4: an alias stands inside of what it repeats"),
        ("[" * 5000, "it is nested too deeply"),
        ("? [a, b]\n: c", "line 1, column 3: a key should be one word"),
        ("a: !!timestamp x", "line 1, column 4: the tag 'tag:yaml.org,2002:timestamp' has no meaning here"),
        ("a: !!python/object:os.system x", "has no meaning here"),
        ("a: !!set {b}", "has no meaning here"),
        ("!!map [a]", "has no meaning here"),
        ("a: !!int x", "line 1, column 4: 'x' is no int"),
        ("a: !!bool maybe", "'maybe' is no bool"),
        ("a: " + "9" * 5000, "is no int"),
        ('a: "\\ud83d"', "holds a NUL or half a surrogate pair"),
        ('a: "b\\0"', "holds a NUL"),
        ("a: \x00", "special characters are not allowed"),
        ("a: 1\n--- \nb: 2", "but found another document"),
        ("a: [1, 2", "expected ',' or ']'"),
    ],
)
def test_what_is_no_recipe_of_ours_is_told_with_its_place(text, problem):
    with pytest.raises(yaml.YAMLError) as error:
        parse_yaml(text)
    assert problem in yaml_problem(error.value)
    assert "\n" not in yaml_problem(error.value)


@pytest.mark.parametrize(
    "inside", ["[{0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}]", "{{<<: [{0}, {0}, {0}, {0}, {0}]}}"]
)
def test_a_few_lines_that_stand_for_millions_are_refused_at_once(inside):
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} " + inside.format(f"*a{n - 1}") for n in range(1, 30))]
    with pytest.raises(yaml.YAMLError, match="aliases stand for more than 100,000 values"):
        parse_yaml("\n".join(lines))


def test_aliases_and_merges_of_usual_size_are_read():
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\nagain: *base\n"
    assert parse_yaml(text)["other"] == {"a": 1, "b": 3}
    assert parse_yaml(text)["again"] == {"a": 1, "b": 2}
    assert parse_yaml("on: 1\nyes: 2\n2020-01-01: 3\n1: 4") == {"on": 1, "yes": 2, "2020-01-01": 3, "1": 4}
    assert parse_yaml("") is None
    assert json.dumps(parse_yaml("a: 012\nb: 1.0\nc: 1e3")) == '{"a": 12, "b": 1.0, "c": 1000.0}'
