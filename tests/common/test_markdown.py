import html
import re

import pytest
from markdown_it import MarkdownIt

from distill.common.markdown import (
    bullets,
    code,
    escaped,
    table,
)

NAMES = [
    *("a|b", "`a`", "``", "<b>x</b>", "<script>alert(1)</script>", "*a*", "**a**", "_a_", "a_b", "__a__", "[x](http://y)"),
    *("![x](y)", "a\\", "a\\|b", "&lt;", "&", "~~a~~", "$x$", "{x}", "#a", "1. a", "- a", "no", " `a", "a` ", "[ham]"),
    *("<!-- a", "http://a.b/c_d", "<http://a.b>", "a*b*c", "_", "*", "|", "\\*", "é_è", "é_", "a**b**"),
]  # fmt: skip


def rendered(text):
    """(the text that is shown, the HTML's tags) by an independent implementation."""
    found = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    return html.unescape(re.sub(r"<[^>]+>", "", found)), re.findall(r"<[^/][^>]*>", found)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is_wherever_it_stands(name):
    shown, tags = rendered(f"The label {escaped(name)}, of two.")
    assert (shown.strip(), tags) == (f"The label {name}, of two.", ["<p>"])
    shown, tags = rendered(f"The model {code(name)}, of two.")
    assert (shown.strip(), tags) == (f"The model {name}, of two.", ["<p>", "<code>"])
    shown, tags = rendered(bullets([f"the model {name} is slow", "b"]))
    assert ([line.strip() for line in shown.split("\n") if line], tags[1:]) == (
        [f"the model {name} is slow", "b"],
        ["<li>"] * 2,
    )
    shown, tags = rendered(table([["name", name], [f"x {name}", "1"]]))
    assert [line.strip() for line in shown.split("\n") if line] == ["name", name.strip(), f"x {name}".strip(), "1"]
    assert len([tag for tag in tags if tag.startswith(("<td", "<th>", "<th "))]) == 4
    assert not any(tag.startswith(("<a", "<em", "<code", "<s", "<img", "<b")) for tag in tags)


def test_line_breaks_and_control_characters_end_no_line():
    assert escaped("a\r\n# b\u2028c") == "a # b c"
    assert escaped("a\x1b[0m") == "a\\\\x1b\\[0m"
    assert code("a\n`b`") == "`` a `b` ``"
    assert "\n" not in table([["a\nb", "c"]]).splitlines()[0]


def test_usual_names_stay_readable():
    assert (
        escaped("not_equivalent, minilm-l6.v2 (f1_macro) + 0.5 %") == "not_equivalent, minilm-l6.v2 (f1_macro) + 0.5 %"
    )
