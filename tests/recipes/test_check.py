import pytest
import torch

from distill.compression.quantization.quantize import quantize_model
from distill.errors import InputError
from distill.recipes.check import (
    estimate_step,
    print_plan,
)
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.training.trainer import DistillationTrainer
from distill.verbs.base import Memory
from distill.verbs.training.timing import kept_for_backward
from tests.conftest import WORDS, make_tokenizer, tiny_bert


def test_what_autograd_keeps_is_counted_once_and_without_the_weights():
    inputs, weight = torch.randn(4, 10), torch.randn(10, 10, requires_grad=True)
    with kept_for_backward([weight]) as kept:
        product = inputs @ weight  # keeps inputs (4×10×4 = 160 bytes) and the weight, which is left out
        sine = product.sin()  # keeps product: 160
        (sine * product.view(2, 20).view(4, 10)).exp().sum().backward()  # sine: 160, product again, exp's result: 160
    assert sum(kept.values()) == 4 * 160
    with torch.no_grad(), kept_for_backward([weight]) as kept:
        (inputs @ weight).sin()
    assert not kept


def test_the_peak_is_the_sum_of_its_parts():
    memory = Memory(weights=40_000_000, gradients=30_000_000, optimizer=60_000_000, teachers=5_000_000)
    assert memory.peak == 135_000_000
    assert str(memory) == "135.0 MB of memory at the peak (weights 40.0, gradients 30.0, optimizer 60.0, teachers 5.0)"


@pytest.fixture
def estimates(tmp_path, sst2_folder, monkeypatch, capsys):
    """The memory of each step, as `distill check` finds it."""
    found = {}

    def estimate(plan, planned):
        return found.setdefault(planned.step.name, estimate_step(plan, planned))

    monkeypatch.setattr("distill.recipes.check.estimate_step", estimate)
    recipe = tmp_path / "r.yaml"
    reordered = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
    tiny_bert(**reordered).save_pretrained(tmp_path / "teacher")
    quantize_model(tiny_bert(**reordered), format="nf4").save_pretrained(tmp_path / "quantized")
    for name in ("teacher", "quantized"):
        make_tokenizer().save_pretrained(tmp_path / name)
    student = f"run: distill, teacher: {tmp_path / 'teacher'}, num_layers: 2"
    recipe.write_text(
        f"task: sst2\noutput_dir: {tmp_path / 'out'}\ndata: {{path: {sst2_folder}, max_length: 24}}\nsteps:\n"
        f"  small: {{{student}, per_device_train_batch_size: 8}}\n"
        f"  large: {{{student}, per_device_train_batch_size: 32}}\n"
        f"  frozen: {{{student}, freeze_embeddings: true}}\n"
        "  nf4: {run: quantize, model: small, format: nf4}\n"
        "  bf16: {run: quantize, model: small, format: bf16}\n"
        f"  again: {{run: distill, model: bf16, teacher: {tmp_path / 'teacher'}}}\n"
        f"  adapters: {{run: distill, model: nf4, teacher: {tmp_path / 'teacher'}, lora: {{r: 4}}}}\n"
        "  saved: {run: finetune, model: QUANTIZED, lora: {r: 4}}\n".replace("QUANTIZED", str(tmp_path / "quantized"))
    )
    print_plan(make_plan(load_recipe(recipe)))
    return found


def test_memory_is_measured_step_by_step(estimates, capsys):
    small, large, frozen = (estimates[name].memory for name in ("small", "large", "frozen"))
    size = 4 * estimates["small"].num_parameters
    position_ids = 2 * 8 * 64
    assert (small.weights, small.gradients) == (size + position_ids, size)
    assert small.optimizer == pytest.approx(2 * size, rel=0.01)  # AdamW's two moments, and its step counts
    assert small.teachers == 4 * sum(parameter.numel() for parameter in tiny_bert().parameters())
    assert 3 * small.activations < large.activations < 5 * small.activations  # four times the rows
    embeddings = 4 * (len(WORDS) + 5) * 64
    assert frozen.gradients == size - embeddings
    assert frozen.optimizer == pytest.approx(2 * (size - embeddings), rel=0.01)
    assert estimates["again"].weight_bytes == size  # trained as a whole it is float32 again
    assert estimates["bf16"].weight_bytes == pytest.approx(size / 2, rel=0.01)
    assert estimates["nf4"].memory.peak == size + estimates["nf4"].weight_bytes
    out = capsys.readouterr().out
    assert out.count(" MB of memory at the peak (weights") == 8
    assert out.count(": 1 negative → 0 negative, 0 positive → 1 positive\n") == 5


def test_adapters_of_a_quantized_model_are_measured_on_one(estimates, tmp_path):
    nf4, adapters, saved = (estimates[name] for name in ("nf4", "adapters", "saved"))
    config = tiny_bert().config
    width, inner = config.hidden_size, config.intermediate_size
    block = 4 * (4 * 2 * width + 2 * (width + inner))  # rank 4 of six linear layers, four of them square
    head = 4 * 2 * width + width * 2 + 2  # the pooler's adapter, and the classifier as a whole
    for found, layers in ((adapters, 2), (saved, config.num_hidden_layers)):
        trained = 4 * (layers * block + head)
        assert found.memory.gradients == trained
        assert found.memory.optimizer == pytest.approx(2 * trained, rel=0.01)
        assert found.num_parameters == sum(p.numel() for p in tiny_bert(num_hidden_layers=layers).parameters()) + (
            trained // 4
        )
        assert found.memory.weights < 0.6 * 4 * found.num_parameters
    assert adapters.weight_bytes == pytest.approx(nf4.weight_bytes + 4 * (2 * block + head), rel=0.01)
    quantized = (tmp_path / "quantized" / "model.safetensors").stat().st_size
    assert saved.weight_bytes == pytest.approx(quantized + 4 * (config.num_hidden_layers * block + head), rel=0.01)


def test_steps_under_fsdp_are_not_timed(tmp_path, sst2_folder, pretrained, monkeypatch):
    class Sharded(DistillationTrainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.is_fsdp_enabled = True

    monkeypatch.setattr("distill.verbs.training.timing.DistillationTrainer", Sharded)
    path = tmp_path / "r.yaml"
    path.write_text(f"""
task: sst2
output_dir: {tmp_path / "run"}
data: {{path: {sst2_folder}, max_length: 24}}
steps: {{a: {{run: finetune, model: {pretrained}, max_steps: 2}}}}
""")
    made = make_plan(load_recipe(path))
    with pytest.raises(InputError, match="under FSDP or DeepSpeed can't be timed"):
        estimate_step(made, made.steps["a"])
