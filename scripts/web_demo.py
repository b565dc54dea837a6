"""Write a static page on which a person tries an export in a browser.

    python scripts/web_demo.py runs/served                     # writes runs/served-web
    python -m http.server --directory runs/served-web

The export is one of `export_model(…, web=True)` that classifies texts or tokens. The page has it beside itself, with
transformers.js and the runtime in WebAssembly, which npm fetches now; later neither needs a network.
"""

import argparse
import html
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from distill.common.console import log_errors, results
from distill.common.folders import written_whole
from distill.errors import InputError
from distill.export.record import read_export

TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"
"""The version that pages get and tests run."""

_LIBRARY = "transformers.min.js"
_RUNTIME = ("ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}


def main() -> int:
    """Write it, and tell how to serve it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the export")
    parser.add_argument("--output", type=Path, metavar="DIR", help="of the page; by default FOLDER-web")
    arguments = parser.parse_args()
    folder = arguments.folder.expanduser().resolve()
    output = folder.with_name(f"{folder.name}-web") if arguments.output is None else arguments.output.expanduser()
    try:
        write_demo(folder, output)
    except InputError as error:
        log_errors(error.problems)
        return 2
    results.print(f"→ {output / 'index.html'}\npython -m http.server --directory {output}")
    return 0


def write_demo(folder: Path, output: Path) -> None:
    """Write the page's folder: `index.html`, the export as `model/`, and `lib/` with what npm brings.

    Raises:
        InputError: the export is none for the web or of another kind, the output is a folder with other things, or npm
            is missing or gets nothing.
    """
    record = read_export(folder)
    made = next((made for head, made in _CLASSES.items() if record.architecture.endswith(head)), None)
    problems = []
    if not record.web:
        problems.append(f"{folder}: is no export for the web; export it with web=True, so that what can't be is told")
    if made is None:
        problems.append(f"{folder}: the page is for classes of texts or tokens, and this is a {record.architecture}")
    if shutil.which("npm") is None:
        problems.append("npm: is not installed; it comes with Node.js (Debian: apt-get install npm)")
    if output.exists() and not (output / "lib" / _LIBRARY).is_file():
        problems.append(f"{output}: is there already, and no page; name another with --output")
    if made is None or problems:
        raise InputError(*problems)
    with written_whole(output) as partial:
        _copy_runtime(partial / "lib")
        shutil.copytree(folder, partial / "model", ignore=shutil.ignore_patterns("*.md", "*.safetensors", ".*"))
        page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        page = page.replace("@title@", html.escape(folder.name)).replace("@class@", made)
        (partial / "index.html").write_text(page, encoding="utf-8")


def _copy_runtime(folder: Path) -> None:
    """Copy transformers.js, and the runtime of the very version that it was built with."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as cache:
        library = fetch_package(TRANSFORMERS_JS, Path(cache) / "library")
        needed = json.loads((library / "package.json").read_text(encoding="utf-8"))["dependencies"]["onnxruntime-web"]
        runtime = fetch_package(f"onnxruntime-web@{needed}", Path(cache) / "runtime")
        shutil.copy(library / "LICENSE", folder / "LICENSE")
        for file in (library / "dist" / _LIBRARY, *(runtime / "dist" / name for name in _RUNTIME)):
            shutil.copy(file, folder / file.name)


def fetch_package(name: str, folder: Path) -> Path:
    """The files of a package as npm has them, none of which is run.

    Raises:
        InputError: npm gets none.
    """
    folder.mkdir(parents=True)
    command = ["npm", "pack", name, "--silent", "--pack-destination", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        why = (found.stderr.strip() or found.stdout.strip() or f"status {found.returncode}").splitlines()[-1]
        raise InputError(f"npm: can't get {name} ({why}); it needs its registry, or a cache that holds it")
    (packed,) = folder.glob("*.tgz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


if __name__ == "__main__":
    sys.exit(main())
