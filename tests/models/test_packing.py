import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from distill.errors import InputError
from distill.models.packing import packed
from distill.training.features import FeatureExtractor, FeatureSpec
from tests.conftest import tiny_config
from tests.training.test_exactness import only, relative_difference
from tests.training.test_speed import train

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
MODELS = {
    "bert": lambda: BertForSequenceClassification(tiny_config(num_hidden_layers=3)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SHAPE)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**SHAPE, embedding_size=16)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=50, dim=32, n_layers=3, n_heads=4, hidden_dim=64)
    ),
}


def batch(lengths=(5, 12, 3, 9)):
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return {"input_ids": torch.randint(5, 20, mask.shape) * mask + 1, "attention_mask": mask}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_forward_equals_the_padded_one(name, attention):
    model = MODELS[name]().eval()
    model.set_attn_implementation(attention)
    reader = FeatureExtractor(model, [FeatureSpec(hidden=(1, 3), relations=(2,), embedding=True, pooled=True)])
    inputs = batch()
    valid = inputs["attention_mask"].bool()
    widths = []
    first_block = next(module for path, module in model.named_modules() if path.endswith("layer.0"))
    hook = first_block.register_forward_hook(lambda m, i, o: widths.append((o[0] if isinstance(o, tuple) else o).shape))
    padded, (shown,) = reader(inputs)
    with packed([model]):
        short, (seen,) = reader(inputs)
        full = reader(batch((4, 4)))[0]  # no padding, nothing to pack
    after = reader(inputs)[0]
    hook.remove()
    assert widths[1][:2] == (1, 29)
    assert widths[0][:2] == widths[3][:2] == (4, 12)
    assert full.shape == (2, 2)
    torch.testing.assert_close(short, padded, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after, padded, rtol=0, atol=0)
    pairs = [*zip(shown.hidden, seen.hidden, strict=True), *zip(shown.relations[0], seen.relations[0], strict=True)]
    for one, other in [*pairs, (shown.embedding, seen.embedding)]:
        torch.testing.assert_close(other[valid], one[valid], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.pooled, shown.pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["none", "relations"])
def test_packed_training_is_the_padded_one(tmp_path, cache):
    options = {**only("hidden"), "relation_weight": 1.0, "soft_weight": 1.0, "optim": "sgd", "learning_rate": 0.05}
    options |= {"cache_teacher": cache, "cache_dir": str(tmp_path / "cache"), "train_sampling_strategy": "random"}
    weights = [train(tmp_path, **options, packing=packing).student.state_dict() for packing in (False, True)]
    assert relative_difference(*weights) < 1e-5


def test_models_with_other_positions_are_refused():
    model = ModernBertForSequenceClassification(ModernBertConfig(**SHAPE, pad_token_id=0))
    with pytest.raises(InputError, match="packing: not for modernbert; it works for bert"), packed([model]):
        pass
