"""The wheel that users install."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_package_its_card_and_the_launch_configurations(tmp_path):
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("distill", "accelerate_configs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("distill_transformers-")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    found = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if ".dist-info" not in str(file)}
    files = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "distill").rglob("*.*")
        if file.suffix in (".py", ".md", ".html", ".css", ".js")
    }
    configs = {f"distill/accelerate_configs/{file.name}" for file in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert {name for name in found if "." in name} == files | configs
    assert len(configs) >= 7
    code = (
        "from distill.runs.launch import find_config; import distill; print(find_config('multi_gpu'), distill.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout.split()
    assert said == [
        str(unpacked / "distill" / "accelerate_configs" / "multi_gpu.yaml"),
        str(unpacked / "distill" / "__init__.py"),
    ]


def test_what_the_package_imports_is_declared():
    """Each top-level module of a third party stands in pyproject.toml under its distribution's name, or in an extra."""
    requirements = declared_dependencies() + declared_extras()
    declared = {requirement.partition(">=")[0].replace("_", "-").lower() for requirement in requirements}
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "distill").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    modules = {name.partition(".")[0] for name in imported} - {*sys.stdlib_module_names, "distill"}
    names = {name: {each.replace("_", "-").lower() for each in packages_distributions()[name]} for name in modules}
    missing = {name for name in modules if not names[name] & declared}
    assert modules >= {"torch", "transformers", "numpy"}
    assert not missing


def declared_extras() -> list[str]:
    """Of users; developers' aside."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^\[project.optional-dependencies\]\n(.*?)^dev = \[", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return re.findall(r'"([^"]+)"', block.group(1))


def declared_dependencies() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return re.findall(r'"([^"]+)"', block.group(1))
