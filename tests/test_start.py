"""Nothing is imported before it is needed."""

import json
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from statistics import median

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BitsAndBytesConfig

import distill
import distill.data
from distill import cli, commands
from distill.compression.quantization.formats import QuantizationSettings
from distill.compression.quantization.quantize import quantize_model
from distill.models.description import METHOD
from distill.verbs.all import VERBS
from tests.architectures import IDS, MASK, logits, small_model
from tests.models.restructured import cut_heads_and_neurons, family_model, remove

HEAVY = {"torch", "transformers", "datasets", "numpy", "bitsandbytes", "peft", "sklearn", "scipy", "evaluate"}


def run_python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def loaded_by(code, *arguments):
    """The top-level modules that a program has imported when it ends, and what it wrote to stderr."""
    end = "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = run_python(code + end, *arguments)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1])), done.stderr


RUN_COMMAND = """
import sys
from distill.cli import main
expected, *words = sys.argv[1:]
try:
    status = main(words)
except SystemExit as exit_:
    status = exit_.code
assert status == int(expected), status
"""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, ""),
        (["run", "--help"], 0, ""),
        (["bench", "--help"], 0, ""),
        (["check", "--help"], 0, ""),
        (["runn", "recipe.yaml"], 2, "invalid choice: 'runn'"),
        (["run", "recipe.yaml", "--forse"], 2, "unrecognized arguments: --forse"),
        (["run", "recipe.yaml", "--student.temperature"], 2, "needs a value"),
        (["check", "--help-options", "distil"], 2, "invalid choice: 'distil'"),
        (["run", "nowhere.yaml"], 2, "no such recipe"),
        (["check", "wrong.yaml"], 2, "not readable as YAML"),
        (["report", "run"], 2, "not readable as YAML"),
        (["run", "right.yaml", "--student.layers", "[1", "--a.b", "}"], 2, "--a.b: '}' is no YAML value"),
        (["report", "done", "--baseline", "[1"], 2, "--baseline: '[1' is no YAML value"),
    ],
)
def test_help_and_what_is_wrong_with_words_or_yaml_come_without_torch(tmp_path, monkeypatch, words, status, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text("steps: [1\n")
    (tmp_path / "right.yaml").write_text("steps: {}\n")
    for folder, text in (("run", "steps: [1\n"), ("done", "steps: {}\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "recipe.yaml").write_text(text)
    modules, error = loaded_by(RUN_COMMAND, str(status), *words)
    assert said in error
    assert not HEAVY & modules


def test_the_static_words_of_the_command_line_are_the_real_ones():
    assert (*VERBS, "data", "benchmark", "report", "search") == cli._WITH_OPTIONS
    (parsers,) = (action for action in cli._parser()._actions if action.dest == "command")
    assert list(parsers.choices) == list(commands.COMMANDS)


def test_import_distill_imports_only_the_standard_library():
    modules, _ = loaded_by("import distill, distill.data; dir(distill), dir(distill.data)")
    assert not HEAVY & modules
    assert modules - loaded_by("import logging, importlib.abc, importlib.machinery")[0] <= {
        "distill",
        *sys.stdlib_module_names,
    }


@pytest.mark.parametrize("package", [distill, distill.data])
def test_the_public_names_are_listed_and_found(package):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match=r"has no attribute 'load_dat'"):
        package.load_dat  # noqa: B018


def test_every_public_name_says_where_it_is_defined():
    assert list(distill._MODULES) == distill.__all__
    for name, module in distill._MODULES.items():
        assert getattr(distill, name).__module__ == module


@pytest.mark.parametrize(
    "order",
    [
        "import distill; from transformers import AutoModel",
        "from transformers import AutoModel; import distill",
        "import distill, transformers.quantizers.auto",
        "import transformers.quantizers.auto, distill",
        "import distill.compression.loading",
    ],
)
def test_the_format_is_registered_whatever_is_imported_first_and_bitsandbytes_waits(order):
    code = f"""
from importlib.machinery import SourceFileLoader
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING[{METHOD!r}].__module__ == "distill.compression.loading"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[{METHOD!r}].__module__ == "distill.models.description"
assert isinstance(auto.__loader__, SourceFileLoader)
"""
    modules, _ = loaded_by(order + code)
    assert "torch" in modules
    assert not modules & {"bitsandbytes", "peft", "datasets", "evaluate", "scipy", "sklearn", "pydantic"}


# --- an environment that has what loading a quantized folder needs, and nothing else --------------------------------

LOAD_WITHOUT = """
import sys
folder, absent, logits = sys.argv[1], set(sys.argv[2].split(",")), sys.argv[3]

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
from safetensors.torch import save_file
import distill
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(folder)
with torch.no_grad():
    found = model(input_ids=torch.tensor({ids}), attention_mask=torch.tensor({mask})).logits.float()
save_file({{"logits": found}}, logits)
model.save_pretrained(folder + "-again")
"""


def needed_by(*roots):
    """The distributions that these need, themselves included, without extras."""
    found, queue = set(), list(roots)
    while queue:
        name = canonicalize_name(queue.pop())
        if name in found:
            continue
        try:
            requirements = [Requirement(each) for each in requires(name) or ()]
        except PackageNotFoundError:  # of another platform's
            continue
        found.add(name)
        queue += [each.name for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})]
    return found


def absent_modules():
    """The installed top-level modules of distributions that loading a quantized folder should not need."""
    present = needed_by("torch", "transformers", "safetensors", "bitsandbytes")
    return {
        module
        for module, distributions in packages_distributions().items()
        if module != "distill" and not present & {canonicalize_name(name) for name in distributions}
    }


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [QuantizationSettings(format="int8"), QuantizationSettings(format="nf4", embeddings="nf4")],
    ids=["int8", "nf4"],
)
def test_a_quantized_folder_loads_bit_for_bit_where_only_torch_transformers_and_bitsandbytes_are(
    tmp_path, architecture, settings
):
    absent = absent_modules()
    assert absent >= {"peft", "datasets", "evaluate", "scipy", "sklearn", "pyarrow", "pandas", "accelerate", "PIL"}
    model = quantize_model(small_model(architecture, 96), settings)
    model.save_pretrained(tmp_path / "model")
    code = LOAD_WITHOUT.format(ids=IDS.tolist(), mask=MASK.tolist())
    modules, _ = loaded_by(code, str(tmp_path / "model"), ",".join(absent), str(tmp_path / "logits.safetensors"))
    assert "bitsandbytes" in modules
    assert not (absent | {"pydantic", "rich"}) & modules  # these two come with the Hub's client
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(model))
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "model-again"))
    assert first == again


def test_a_folder_of_other_sizes_loads_bit_for_bit_without_bitsandbytes(tmp_path):
    model = family_model("bert")
    cut_heads_and_neurons("bert", model)
    remove("bert", model, "attention")
    model.save_pretrained(tmp_path / "model")
    absent = {*absent_modules(), "bitsandbytes"}
    code = LOAD_WITHOUT.format(ids=IDS.tolist(), mask=MASK.tolist())
    modules, _ = loaded_by(code, str(tmp_path / "model"), ",".join(absent), str(tmp_path / "logits.safetensors"))
    assert not absent & modules
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(model))
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "model-again"))
    assert first == again


# --- seconds --------------------------------------------------------------------------------------------------------


def seconds(*programs, rounds=5):
    """The median time of each program in alternating rounds, after one that warms the files up."""
    times = [[] for _ in programs]
    for _ in range(rounds + 1):
        for code, taken in zip(programs, times, strict=True):
            start = time.perf_counter()
            done = run_python(*code)
            taken.append(time.perf_counter() - start)
            assert done.returncode == 0, done.stderr
    return [median(taken[1:]) for taken in times]


@pytest.mark.slow
def test_the_start_takes_no_longer_than_what_it_needs(tmp_path):
    (tmp_path / "wrong.yaml").write_text("steps: [1\n")
    (tmp_path / "right.yaml").write_text("steps: {}\n")
    for folder, text in (("run", "steps: [1\n"), ("done", "steps: {}\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "recipe.yaml").write_text(text)
    words = [(RUN_COMMAND, "0", "--help"), (RUN_COMMAND, "0", "run", "--help"), (RUN_COMMAND, "2", "runn")]
    words += [(RUN_COMMAND, "2", "run", "r.yaml", "--forse"), (RUN_COMMAND, "2", "run", str(tmp_path / "wrong.yaml"))]
    of_torch, *of_words = seconds(("import torch",), *words)
    assert max(of_words) <= of_torch / 2
    registering = "from transformers.quantizers import register_quantizer"
    alone, distill_first, registered = seconds((registering,), ("import distill",), (f"import distill; {registering}",))
    assert distill_first <= 1.15 * alone
    assert registered <= 1.15 * alone


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_quantized_folder_loads_as_fast_as_one_of_bitsandbytes(tmp_path, format):
    float_model = BertForSequenceClassification(BertConfig())
    float_model.save_pretrained(tmp_path / "float")
    config = BitsAndBytesConfig(load_in_8bit=True)
    if format == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stock = BertForSequenceClassification.from_pretrained(
        tmp_path / "float", quantization_config=config, device_map="cpu"
    )
    stock.save_pretrained(tmp_path / "stock")
    quantize_model(float_model, format=format).save_pretrained(tmp_path / "ours")
    load = "from transformers import BertForSequenceClassification as B; import sys; B.from_pretrained(sys.argv[1])"
    stock_seconds, our_seconds = seconds(
        (load, str(tmp_path / "stock")), (f"import distill; {load}", str(tmp_path / "ours"))
    )
    assert our_seconds <= 1.15 * stock_seconds
