"""Pages in headless Chromium, for tests that look at what a person would see."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass
class Opened:
    """A page, and what went wrong or was asked for while it was open."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def find_chromium() -> str:
    """The path of Chromium; without one, or without playwright, the test is skipped."""
    pytest.importorskip("playwright.sync_api")
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium here; apt-get install chromium")
    return found


@contextmanager
def opened(file: Path, *, width: int = 1280, height: int = 900, color_scheme: str = "light") -> Iterator[Opened]:
    """Open a file in a window of so many pixels, in "light" or "dark"."""
    path = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=color_scheme)
        found = Opened(page)
        page.on("pageerror", lambda error: found.errors.append(str(error)))
        page.on("console", lambda said: found.errors.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: found.requests.append(request.url))
        page.goto(file.as_uri())
        yield found
        browser.close()
