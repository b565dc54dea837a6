import logging
import re
from pathlib import Path

import pytest
from rich.table import Table

from distill.common import console
from distill.common.console import (
    PlainConsole,
    log_errors,
    log_handler,
    progress,
    remark,
    styled,
    visible,
)

ROOT = Path(__file__).parents[2]
HARMFUL = ["[ham]", "[/b]", "[bold]x[/bold]", ":smile:", "a\\", "[link=http://x]y[/link]", "{0}", "%s", "[@click=f]"]


@pytest.fixture
def terminal(monkeypatch):
    """A console that believes it prints to a terminal, and all that it was given."""
    plain = PlainConsole(force_terminal=True, width=200, record=True, color_system=None)
    monkeypatch.setattr(console, "log", plain)
    return plain


@pytest.mark.parametrize("text", HARMFUL)
def test_a_text_is_printed_as_it_is_wherever_it_stands(terminal, text):
    table = Table(text, title=text)
    table.add_row(text)
    for printed in (text, styled(text), styled(("x", "red"), text), remark(text), table):
        terminal.print(printed)
        assert text in terminal.export_text()
    log_errors([text])
    assert f"error: {text}" in terminal.export_text()
    logging.getLogger("test").addHandler(log_handler)
    logging.getLogger("test").warning("%s", text)
    assert text in terminal.export_text()


@pytest.mark.parametrize("text", HARMFUL)
def test_what_a_bar_and_a_status_tell_is_shown_as_it_is(terminal, text, capsys):
    assert list(progress(iter([1, 2]), text, total=2)) == [1, 2]
    assert text in capsys.readouterr().out
    with terminal.status(text):
        pass
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten", "over\\rwritten"),
        ("\x9b31m", "\\x9b31m"),  # one byte that terminals take for ESC [
        ("\u202eevil", "\\u202eevil"),
        ("half \ud83d", "half \\ud83d"),
        ("two\nlines\té 😀 न\u200dक", "two\nlines\té 😀 न\u200dक"),
    ],
)
def test_control_characters_are_written_out(terminal, text, shown):
    assert visible(text) == shown
    for printed in (text, styled((text, "bold")), Table(text)):
        terminal.print(printed)
        said = terminal.export_text(styles=False)
        assert "\x1b" not in said
        assert shown.partition("\n")[0] in said


def test_no_token_is_printed(terminal):
    token = "hf_" + "aB3" * 11 + "x"
    log_errors([f"steps.teacher.hub_tokn: unknown option; got '{token}'"])
    terminal.print(f"Bearer {token}, hf_transfer and hf_hub are none")
    said = terminal.export_text()
    assert "got 'hf_…'" in said
    assert "Bearer hf_…, hf_transfer and hf_hub are none" in said
    assert token not in said


def test_no_module_writes_markup_that_would_be_printed_as_it_is():
    markup = re.compile(r"\[/?(red|yellow|green|bold|dim|/)\]")
    for path in [*(ROOT / "distill").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        assert not markup.search(path.read_text(encoding="utf-8")), path
