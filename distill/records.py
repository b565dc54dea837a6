"""What a run folder says of itself: step.json."""

import json
from pathlib import Path
from typing import Any


def read_record(folder: Path) -> dict[str, Any]:
    """A run folder's step.json; empty where there is none."""
    try:
        return json.loads((folder / "step.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
