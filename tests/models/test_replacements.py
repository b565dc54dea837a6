import copy
import itertools
import json
import subprocess
import sys

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, BertConfig, PretrainedConfig, Trainer, TrainingArguments

from distill import DistillationConfig, DistillationTrainer, build_student, quantize_model
from distill.compression.quantization.layers import FourBitLinear
from distill.data.load import tokenize
from distill.errors import InputError
from distill.evaluation.benchmark import BenchmarkOptions, benchmark_models
from distill.models.description import METHOD, Description, entries_of
from distill.models.load import find_model, from_config
from distill.models.replacements import Removed, RemovedModule, Resized, is_quantized, restructure, structure_of
from distill.models.weights import fit_of, plain_names, stored_shapes, weight_files
from distill.tasks.base import GLUE
from tests.architectures import small_model
from tests.conftest import make_tokenizer, sentences, tiny_bert
from tests.models.restructured import LAYOUTS, block_of, cut_heads_and_neurons, family_model, outputs, remove


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_model_without_heads_and_neurons_computes_as_if_they_added_nothing_and_reloads_bit_for_bit(tmp_path, family):
    model = family_model(family)
    before = model.num_parameters()
    known = cut_heads_and_neurons(family, model)
    torch.testing.assert_close(outputs(model), known, atol=2e-5, rtol=0)
    assert model.num_parameters() < before
    again = reloaded(model, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize(("family", "part"), [
    (family, part) for family in LAYOUTS for part in ("attention", "feed-forward")
    if (family, part) != ("albert", "attention")  # whose residual and norm lie inside of it
])  # fmt: skip
def test_a_model_without_a_sublayer_computes_as_if_it_added_its_bias_alone_and_reloads_bit_for_bit(
    tmp_path, family, part
):
    model = family_model(family)
    known = remove(family, model, part)
    torch.testing.assert_close(outputs(model), known, atol=2e-5, rtol=0)
    assert torch.equal(outputs(reloaded(model, tmp_path)), outputs(model))


def pruned_bert():
    """Without a head and some neurons in the first block, and without sublayers in the second."""
    model = family_model("bert")
    cut_heads_and_neurons("bert", model)
    remove("bert", model, "attention")
    remove("bert", model, "feed-forward")
    return model


# --- what is saved --------------------------------------------------------------------------------------------------


def test_what_is_saved_names_each_module_with_how_it_is_built():
    model = family_model("distilbert")
    cut_heads_and_neurons("distilbert", model)
    remove("distilbert", model, "attention")
    block = "distilbert.transformer.layer.0"
    assert model.config.to_dict()["quantization_config"] == {
        "quant_method": METHOD,
        "version": 2,
        "replacements": [
            {"kind": "resized", "in_features": 96, "out_features": 72,
             "names": [f"{block}.attention.{part}_lin" for part in "qkv"]},
            {"kind": "resized", "in_features": 96, "out_features": 132, "names": [f"{block}.ffn.lin1"]},
            {"kind": "resized", "in_features": 72, "out_features": 96, "names": [f"{block}.attention.out_lin"]},
            {"kind": "resized", "in_features": 132, "out_features": 96, "names": [f"{block}.ffn.lin2"]},
            {"kind": "removed", "attention": True, "bias": "out_lin.bias",
             "names": ["distilbert.transformer.layer.1.attention"]},
        ],
    }  # fmt: skip


def test_another_size_takes_the_place_of_the_one_before():
    model = family_model("bert")
    name = "bert.encoder.layer.0.intermediate.dense"
    for size in (100, 50):
        layer = model.get_submodule(name)
        weights = {f"{name}.weight": layer.weight[:size], f"{name}.bias": layer.bias[:size]}
        out = "bert.encoder.layer.0.output.dense"
        weights[f"{out}.weight"] = model.get_submodule(out).weight[:, :size]
        restructure(model, {name: Resized(96, size), out: Resized(size, 96)}, weights)
    assert [(entry.names, entry.fields["out_features"]) for entry in entries_of(model.config)] == [
        ((name,), 50),
        ((out,), 96),
    ]


@pytest.mark.parametrize("copied", [
    copy.deepcopy, lambda config: type(config).from_dict(config.to_dict()),
    lambda config: BertConfig.from_dict(json.loads(config.to_json_string())),
])  # fmt: skip
def test_copies_of_a_config_keep_its_description(copied):
    model = pruned_bert()
    again = copied(model.config)
    assert structure_of(again) == structure_of(model.config) != []
    assert not is_quantized(again)
    assert from_config(again, "classification").num_parameters() == model.num_parameters()


@pytest.mark.parametrize(
    "read", [Description.from_dict, lambda stored: entries_of(PretrainedConfig(quantization_config=stored))]
)
def test_a_description_of_a_newer_version_is_refused(read):
    with pytest.raises(InputError, match=r"version is 3, and this package reads up to 2; install a newer one"):
        read({"quant_method": METHOD, "version": 3, "layers": []})


@pytest.mark.parametrize(("change", "problem"), [
    ({"version": 3}, r"version is 3, and this package reads up to 2"),
    ({"replacements": [{"kind": "woven", "names": ["bert.pooler"]}]}, r"no kind .woven.; there are resized, removed"),
])  # fmt: skip
def test_a_folder_of_something_newer_is_refused(tmp_path, change, problem):
    model = pruned_bert()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=problem):
        type(model).from_pretrained(tmp_path)
    if "version" in change:
        with pytest.raises(InputError, match=f"{tmp_path}: quantization_config: its {problem}"):
            find_model(str(tmp_path))


def test_a_second_save_writes_the_same_bytes(tmp_path):
    model = pruned_bert()
    reloaded(model, tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_plain_transformers_refuses_it(tmp_path):
    for family, part in itertools.product(("bert", "modernbert"), ("heads", "attention", "feed-forward")):
        model = family_model(family)
        cut_heads_and_neurons(family, model) if part == "heads" else remove(family, model, part)
        model.save_pretrained(tmp_path / f"{family} {part}")
    code = """
import sys
from transformers import AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    try:
        AutoModelForSequenceClassification.from_pretrained(folder)
    except RuntimeError as error:
        assert "ignore_mismatched_sizes" in str(error), error
    else:
        raise AssertionError(folder)
assert "distill" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert METHOD in done.stderr  # it says what would load it


# --- an ordinary float model ----------------------------------------------------------------------------------------


def rows():
    return tokenize(datasets.Dataset.from_list(sentences(16)), GLUE["sst2"], make_tokenizer(), 32)


def pruned_tiny(seed=0):
    model = tiny_bert(seed)
    block = f"{block_of('bert', model, 0)}"
    neurons = model.get_submodule(f"{block}.intermediate.dense")
    weights = {
        f"{block}.intermediate.dense.weight": neurons.weight[:7],
        f"{block}.intermediate.dense.bias": neurons.bias[:7],
    }
    weights[f"{block}.output.dense.weight"] = model.get_submodule(f"{block}.output.dense").weight[:, :7]
    width = model.config.hidden_size
    restructure(
        model, {f"{block}.intermediate.dense": Resized(width, 7), f"{block}.output.dense": Resized(7, width)}, weights
    )
    return restructure(
        model,
        {f"{block}.attention.self": Removed(attention=True), f"{block}.attention.output.dense": Removed(bias="bias")},
        {},
    )


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("trainer_of", ["transformers", "distill"])
def test_it_trains_as_any_float_model_and_keeps_its_structure(tmp_path, trainer_of, loaded):
    model = pruned_tiny()
    if loaded:
        model = reloaded(model, tmp_path / "before")
    before = copy.deepcopy(model.state_dict())
    given = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "report_to": [],
    }
    tokenizer = make_tokenizer()
    if trainer_of == "transformers":
        trainer = Trainer(model, TrainingArguments(**given), train_dataset=rows(), processing_class=tokenizer)
    else:
        trainer = DistillationTrainer(
            model=model, teacher=tiny_bert(1), args=DistillationConfig(**given, hidden_weight=1.0, save_steps=2),
            train_dataset=rows(), processing_class=tokenizer,
        )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "after"))
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight.cpu(), before[name].cpu())}
    names = {name for name, _ in model.named_parameters()}
    assert changed - names == set()
    assert {name for name in names - changed if "key.bias" not in name} == set()  # these move all keys alike
    again = type(model).from_pretrained(tmp_path / "after")
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.cpu().eval()(ids).logits)
    assert structure_of(again.config) == structure_of(model.config)


def test_adapters_train_on_it_and_reload(tmp_path):
    model = reloaded(pruned_bert(), tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    expected = outputs(adapted)
    adapted.save_pretrained(tmp_path / "adapters")
    again = type(model).from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapters"))
    assert torch.equal(outputs(again), expected)
    assert not torch.equal(outputs(pruned_bert()), expected)
    assert adapted.merge_and_unload().get_submodule("bert.encoder.layer.0.attention.self.query").out_features == 72


def test_it_takes_another_dtype(tmp_path):
    model = reloaded(pruned_bert(), tmp_path)
    expected = outputs(model)
    assert {weight.dtype for weight in model.half().parameters()} == {torch.float16}
    torch.testing.assert_close(outputs(model.to(torch.bfloat16).float()), expected, atol=0.1, rtol=0)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}


def test_a_cache_counts_the_tokens_of_a_decoder_whose_attention_is_left_out():
    model = small_model("gpt2", language_model=True)
    remove("gpt2", model, "attention", index=0)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :2], use_cache=True)
        name = "cache" if "cache" in first else "past_key_values"  # as in 5.21
        rest = model(ids[:, 2:], **{name: first[name]}).logits
    torch.testing.assert_close(rest, whole[:, 2:])


# --- composed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert"])
def test_a_resized_model_is_quantized_in_one_description_and_reloads_bit_for_bit(tmp_path, family, format):
    model = family_model(family)
    cut_heads_and_neurons(family, model)
    remove(family, model, "attention")
    structure = structure_of(model.config)
    quantize_model(model, format=format)
    assert is_quantized(model.config)
    kinds = [entry.kind for entry in entries_of(model.config)]
    assert kinds == [*(entry.kind for entry in structure), *dict.fromkeys(["int8", format])]
    again = reloaded(model, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    assert structure_of(again.config) == structure
    assert torch.equal(outputs(reloaded(again, tmp_path / "again")), outputs(model))


def test_a_description_is_applied_in_its_order():
    """nf4 inside of what an earlier entry has put there."""
    model = family_model("bert")
    cut_heads_and_neurons("bert", model)
    quantize_model(model, format="nf4")
    layer = model.get_submodule("bert.encoder.layer.0.output.dense")
    assert isinstance(layer, FourBitLinear)
    assert (layer.in_features, layer.out_features) == (132, 96)


def test_a_quantized_model_is_not_cut():
    model = quantize_model(family_model("bert"), format="int8")
    with pytest.raises(InputError, match="is quantized, and its layers can't be cut"):
        restructure(model, {"bert.encoder.layer.0.intermediate": Removed()}, {})


def test_what_cannot_be_put_in_is_told_before_anything_changes():
    model = family_model("bert")
    before = outputs(model)
    block = "bert.encoder.layer.0"
    with pytest.raises(InputError) as caught:
        restructure(
            model,
            {
                f"{block}.intermediate.dense": Resized(96, 100),
                f"{block}.intermediate": Resized(96, 100),
                f"{block}.attention.self.query": Resized(96, 0),
                f"{block}.attention": Removed(attention=True),
                f"{block}.ffn": Removed(),
                f"{block}.output.dense": Removed(bias="beta"),
            },
            {"bert.pooler.dense.weight": torch.zeros(1)},
        )
    assert list(caught.value.problems) == [
        f"{block}.intermediate.dense.weight: is (160, 96), and (100, 96) in the new layer",
        f"{block}.intermediate: is a BertIntermediate, and only linear layers can be resized",
        f"{block}.attention.self.query: 96 → 0 leaves nothing; say Removed",
        f"{block}.attention: holds a norm, so more than what is added to the residual would be lost; name what is "
        "before it",
        f"{block}.ffn: BertForSequenceClassification has no such module",
        f"{block}.output.dense: has no bias 'beta'",
        "bert.pooler.dense.weight: belongs to no module that is replaced",
    ]
    assert torch.equal(outputs(model), before)
    assert not entries_of(model.config)


# --- models of a config ---------------------------------------------------------------------------------------------


def test_a_model_of_its_config_has_its_sizes_whatever_the_head(tmp_path):
    model = pruned_bert()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    drawn = from_config(config, "token-classification")
    layer = drawn.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert (layer.in_features, layer.out_features) == (96, 72)
    assert 0.08 < layer.weight.std() < 0.12  # as BERT draws them
    assert not layer.bias.any()
    assert isinstance(drawn.bert.encoder.layer[1].attention.self, RemovedModule)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(encoder.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)
    with torch.device("meta"):
        assert from_config(config, "classification").num_parameters() == model.num_parameters()


@pytest.mark.parametrize("quantized", [False, True])
def test_its_weights_are_those_of_its_config(tmp_path, quantized):
    model = pruned_bert()
    if quantized:
        quantize_model(model, format="nf4")
    model.save_pretrained(tmp_path)
    stored = stored_shapes(weight_files(tmp_path))
    config = AutoConfig.from_pretrained(tmp_path)
    fit = fit_of(stored, type(model), config, plain_names(stored, type(model), config))
    assert (fit.problem, fit.untrained, fit.unread) == (None, (), ())
    del config.quantization_config
    assert fit_of(stored, type(model), config, {name: name for name in stored}).reshaped


def test_the_benchmark_counts_what_is_left(tmp_path):
    model = pruned_bert()
    model.save_pretrained(tmp_path / "pruned")
    whole = family_model("bert")
    whole.save_pretrained(tmp_path / "whole")
    options = BenchmarkOptions(sequence_length=16, throughput_batch_size=1, rounds=1)
    measured = benchmark_models({name: str(tmp_path / name) for name in ("pruned", "whole")}, options)
    assert measured["pruned"].num_parameters == model.num_parameters()
    assert measured["whole"].num_parameters == whole.num_parameters()
    # of the first block a head (4 layers and 2 products) and 28 neurons, of the second all but nothing
    a_head = 2 * 16 * 4 * 96 * 24 + 2 * 2 * 16 * 16 * 24
    neurons = 2 * 16 * 2 * 96 * 28
    a_block = 4 * a_head + 2 * 16 * 2 * 96 * 160
    assert measured["whole"].flops_per_sample - measured["pruned"].flops_per_sample == a_head + neurons + a_block


def test_a_student_keeps_all_of_a_pruned_teacher_or_is_refused():
    teacher = pruned_bert()
    student = build_student(teacher)
    assert student is not teacher
    assert torch.equal(outputs(student), outputs(teacher))
    with pytest.raises(InputError, match="no student is cut from it; keep all of its layers and sizes"):
        build_student(teacher, num_layers=1)


@pytest.mark.parametrize("part", ["attention", "relation"])
def test_heads_that_are_not_there_are_not_compared(tmp_path, part):
    config = DistillationConfig(output_dir=str(tmp_path), report_to=[], **{f"{part}_weight": 1.0})
    with pytest.raises(InputError, match=f"{part}_weight: compares heads, and a model lacks some"):
        DistillationTrainer(
            model=pruned_tiny(),
            teacher=tiny_bert(1),
            args=config,
            train_dataset=rows(),
            processing_class=make_tokenizer(),
        )
