"""Trimmed vocabularies of every family: what reads as before, what falls into pieces, and folders that reload."""

import json
import random
import string
from collections import Counter
from typing import NamedTuple

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AlbertTokenizer,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    DebertaV2Tokenizer,
    GPT2Tokenizer,
    MPNetTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    ViTConfig,
    XLMRobertaTokenizer,
)

from distill import (
    DataOptions,
    DistillationConfig,
    DistillationTrainer,
    InputError,
    load_data,
    quantize_model,
    trim_vocabulary,
)
from distill.compression.tokenizer_file import (
    necessary_ids,
    parents_of,
    read_description,
    with_description,
    with_tokens,
)
from distill.compression.trimmed_model import trim_model
from distill.compression.vocabulary import TrimCoverage, choose_tokens, count_tokens, trim_coverage
from distill.data.fingerprints import token_fingerprint
from distill.verbs.training.train import read_rows
from tests.conftest import make_tokenizer, tiny_bert, write_rows

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 130, "initializer_range": 0.2, "num_labels": 3,
}  # fmt: skip
DEBERTA = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
CONFIGS = {
    "bert": ("BertConfig", {}),
    "electra": ("ElectraConfig", {"embedding_size": 16}),
    "distilbert": ("DistilBertConfig", {}),
    "mpnet": ("MPNetConfig", {}),
    "roberta": ("RobertaConfig", {}),
    "gpt2": ("GPT2Config", {}),
    "modernbert": ("ModernBertConfig", {"global_attn_every_n_layers": 2, "local_attention": 8}),
    "albert": ("AlbertConfig", {"embedding_size": 16}),
    "xlm-roberta": ("XLMRobertaConfig", {}),
    "deberta-v2": ("DebertaV2Config", {**DEBERTA, "norm_rel_ebd": "layer_norm"}),
}
FAMILIES = list(CONFIGS)
NAMES_ELSEWHERE = {
    "distilbert": {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
                   "intermediate_size": "hidden_dim"},
    "gpt2": {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
             "intermediate_size": "n_inner", "max_position_embeddings": "n_positions"},
}  # fmt: skip
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = 600
TRIMMED = {"bert": 240, "electra": 240, "distilbert": 240, "mpnet": 240, "roberta": 520, "gpt2": 520, "modernbert": 520,
           "albert": 280, "xlm-roberta": 320, "deberta-v2": 320}  # fmt: skip


def made_up_texts(count, seed=0):
    """Sentences of invented words, a few of them frequent, with marks, digits and letters beyond ASCII."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "é")]
    words = ["".join(random.Random(n).choices(syllables, k=1 + n % 4)) for n in range(400)]
    weights = [1 / (1 + n) for n in range(400)]
    texts = []
    for _ in range(count):
        chosen = draw.choices(words, weights, k=draw.randint(3, 12))
        chosen[0] = chosen[0].capitalize()
        texts.append(" ".join(chosen) + draw.choice([".", "!", ", 42", " (ñ)", ""]))
    return texts


def nonsense(count, seed=0):
    """Texts of letters in any order, and of some that no vocabulary knows."""
    draw = random.Random(seed)
    letters = string.ascii_letters + "  éñ.,!(42)" + "漢☃"
    return ["".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(count)]


TEXTS, OTHERS = made_up_texts(600), made_up_texts(200, seed=1)


def word_piece(special):
    backend = Tokenizer(models.WordPiece(unk_token=next(token for token in special if "unk" in token.lower())))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend.get_vocab()


def byte_pairs(special):
    """Vocabulary and merges of a byte-level BPE."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return backend


def unigram(special, unknown):
    """Pieces and scores."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(
            vocab_size=VOCABULARY, special_tokens=special, unk_token=unknown, show_progress=False, max_piece_length=12
        ),
    )
    return [tuple(piece) for piece in json.loads(backend.to_str())["model"]["vocab"]]


def tokenizer_of(family):
    if family in ("bert", "electra", "distilbert"):
        made = BertTokenizer(vocab=word_piece(BERT_SPECIAL))
        made.add_tokens(["<new word>"])
        return made
    if family == "mpnet":
        return MPNetTokenizer(vocab=word_piece(["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]))
    if family in ("roberta", "gpt2"):
        special = ROBERTA_SPECIAL if family == "roberta" else ["<|endoftext|>"]
        model = json.loads(byte_pairs(special).to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        made = (RobertaTokenizer if family == "roberta" else GPT2Tokenizer)(vocab=model["vocab"], merges=merges)
        made.pad_token = made.pad_token or "<|endoftext|>"
        return made
    if family == "modernbert":
        backend = byte_pairs(BERT_SPECIAL)
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, **{f"{name}_token": BERT_SPECIAL[number] for name, number in names.items()}
        )
    if family == "albert":
        special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
        return AlbertTokenizer(vocab=unigram(special, "<unk>"), keep_accents=True)
    if family == "xlm-roberta":
        return XLMRobertaTokenizer(vocab=unigram(ROBERTA_SPECIAL, "<unk>"))
    return DebertaV2Tokenizer(vocab=unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[UNK]"))  # the mask stands beside


def model_of(family, tokenizer, auto_class=AutoModelForSequenceClassification, **changes):
    """A random model with more rows than there are tokens, as DeBERTa-v3 and ModernBERT have."""
    torch.manual_seed(0)
    name, more = CONFIGS[family]
    renamed = NAMES_ELSEWHERE.get(family, {})
    sizes = {renamed.get(size, size): value for size, value in SIZES.items()}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
           "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    if family == "modernbert":
        ids |= {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    settings = {**sizes, **more, **ids, "vocab_size": len(tokenizer) + 5, **changes}
    config = getattr(transformers, name)(**settings)
    return auto_class.from_config(config).eval()


class Family(NamedTuple):
    """A tokenizer and a classifier, and both with about half of the tokens."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    model: torch.nn.Module
    small: torch.nn.Module
    trimmed: PreTrainedTokenizerFast


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    name = request.param
    tokenizer = tokenizer_of(name)
    model = model_of(name, tokenizer)
    return Family(name, tokenizer, model, *trim_vocabulary(model, tokenizer, TEXTS, vocab_size=TRIMMED[name] - 4))


def as_before(tokenizer, trimmed, texts):
    """The texts of which no token is gone."""
    left = trimmed.get_vocab()
    return [text for text in texts if all(token in left for token in tokenizer.tokenize(text))]


def logits_of(model, tokenizer, texts):
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    with torch.no_grad():
        return model(**inputs).logits


def unknown_tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"].count(tokenizer.unk_token_id)


def test_the_trimmed_one_is_as_small_as_was_said(family):
    name, tokenizer, model, small, trimmed = family
    assert small.config.vocab_size == len(trimmed) == TRIMMED[name]  # a multiple of 8
    assert small.get_input_embeddings().weight.shape[0] == TRIMMED[name]
    assert model.config.vocab_size == len(tokenizer) + 5  # as it was
    assert sorted(trimmed.get_vocab().values()) == list(range(TRIMMED[name]))
    before, after = tokenizer.get_vocab(), trimmed.get_vocab()
    assert sorted(after, key=after.get) == sorted(after, key=before.get)  # in the old order
    assert type(trimmed) is type(tokenizer)
    assert token_fingerprint(trimmed) != token_fingerprint(tokenizer)  # so a teacher gets tokens of its own


def test_rows_without_dropped_tokens_read_as_before(family):
    tokenizer, trimmed = family.tokenizer, family.trimmed
    kept = as_before(tokenizer, trimmed, OTHERS)
    assert 20 < len(kept) < len(OTHERS) - 20
    for text in kept:
        assert trimmed.tokenize(text) == tokenizer.tokenize(text)
        for pair in ((), (kept[0],)):  # with what stands around them
            ids = [each(text, *pair)["input_ids"] for each in (tokenizer, trimmed)]
            words = [each.convert_ids_to_tokens(row) for each, row in zip((tokenizer, trimmed), ids, strict=True)]
            assert words[0] == words[1]
    assert torch.equal(logits_of(family.small, trimmed, kept), logits_of(family.model, tokenizer, kept))
    assert trim_coverage(tokenizer, trimmed, OTHERS).touched_rows == len(OTHERS) - len(kept)


@pytest.mark.parametrize("texts", [OTHERS, nonsense(400)], ids=["words", "letters"])
def test_nothing_becomes_unknown_and_texts_stay_texts(family, texts):
    tokenizer, trimmed = family.tokenizer, family.trimmed
    for text in texts:
        assert unknown_tokens(trimmed, text) == unknown_tokens(tokenizer, text), text
        decoded = [each.decode(each(text)["input_ids"], skip_special_tokens=True) for each in (tokenizer, trimmed)]
        assert decoded[0] == decoded[1]


@pytest.mark.parametrize("seed", range(3))
def test_any_choice_of_tokens_reads_what_it_knows_as_before(family, seed):
    """Not only frequent tokens, whose parents and neighbours are frequent too."""
    draw, tokenizer = random.Random(seed), family.tokenizer
    description = read_description(tokenizer)
    necessary, known = necessary_ids(tokenizer, description), sorted(tokenizer.get_vocab().values())
    counts = Counter({number: draw.random() for number in known})
    size = draw.randint(len(necessary) + 8, len(known) - 8)
    kept = choose_tokens(counts, necessary, parents_of(description), known=known, vocab_size=size)
    trimmed = with_description(tokenizer, with_tokens(description, kept))
    new = {old: number for number, old in enumerate(kept)}
    texts = made_up_texts(60, seed + 2) + nonsense(60, seed + 2)
    for text, before, after in zip(texts, tokenizer(texts)["input_ids"], trimmed(texts)["input_ids"], strict=True):
        if new.keys() >= set(before):
            assert after == [new[number] for number in before], text
        assert after.count(trimmed.unk_token_id) == before.count(tokenizer.unk_token_id), text
        assert trimmed.decode(after) == tokenizer.decode(before)


def test_a_plan_gets_the_sizes_without_weights(family):
    with torch.device("meta"):
        model = type(family.model)(family.model.config)
    small = trim_model(model, range(64))
    assert small.device.type == "meta"
    assert small.get_input_embeddings().weight.shape[0] == small.config.vocab_size == 64


def test_special_tokens_and_the_ids_of_configs_go_along(family):
    tokenizer, trimmed = family.tokenizer, family.trimmed
    assert trimmed.special_tokens_map == tokenizer.special_tokens_map
    assert trimmed.all_special_tokens == tokenizer.all_special_tokens
    model, small = family.model, family.small
    before = tokenizer.convert_ids_to_tokens
    for key, number in vars(model.config).items():
        if key.endswith("_token_id") and number is not None and number < len(tokenizer):
            assert trimmed.convert_ids_to_tokens(getattr(small.config, key)) == before(number), key
    assert small.get_input_embeddings().padding_idx == (
        None if model.get_input_embeddings().padding_idx is None else trimmed.pad_token_id
    )
    if "<new word>" in tokenizer.get_vocab():
        assert trimmed.tokenize("ba <new word>")[-1] == "<new word>"
        assert tokenizer.convert_tokens_to_ids("<new word>") == VOCABULARY


def test_a_saved_folder_loads_by_transformers_alone_and_saves_the_same(family, tmp_path):
    small, trimmed = family.small, family.trimmed
    small.save_pretrained(tmp_path / "first")
    trimmed.save_pretrained(tmp_path / "first")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    read = AutoTokenizer.from_pretrained(tmp_path / "first")
    for text in OTHERS[:50]:
        assert read(text)["input_ids"] == trimmed(text)["input_ids"]
    assert torch.equal(logits_of(loaded, read, OTHERS[:50]), logits_of(small, trimmed, OTHERS[:50]))
    loaded.save_pretrained(tmp_path / "second")
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    folders = [tmp_path / "first", tmp_path / "second"]
    first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert first == second
    assert all(b"/tmp" not in content for file, content in first.items() if file.endswith(".json"))


@pytest.mark.parametrize("name", FAMILIES)
def test_output_layers_over_the_words_go_along(name, tmp_path):
    tokenizer = tokenizer_of(name)
    auto_class = AutoModelForCausalLM if name == "gpt2" else AutoModelForMaskedLM
    model = model_of(name, tokenizer, auto_class)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight_name.endswith("bias"):
                weight.normal_()
    small, trimmed = trim_vocabulary(model, tokenizer, TEXTS, coverage=0.9)
    before, after = tokenizer.get_vocab(), trimmed.get_vocab()
    assert len(after) < 550
    kept = sorted(before[token] for token in after)
    texts = as_before(tokenizer, trimmed, OTHERS)
    expected = logits_of(model, tokenizer, texts)[..., kept]
    found = logits_of(small, trimmed, texts)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # a narrower product may add up in another order
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) == tied
    small.save_pretrained(tmp_path)
    assert torch.equal(logits_of(auto_class.from_pretrained(tmp_path), trimmed, texts), found)


def test_the_three_ways_to_choose():
    tokenizer = tokenizer_of("bert")
    model = model_of("bert", tokenizer)
    counts = count_tokens(tokenizer, TEXTS)
    assert counts.total() == sum(len(tokenizer.tokenize(text)) for text in TEXTS)

    _, often = trim_vocabulary(model, tokenizer, TEXTS, min_count=20)
    frequent = {tokenizer.convert_ids_to_tokens(number) for number, count in counts.items() if count >= 20}
    assert frequent <= often.get_vocab().keys()
    assert len(often) % 8 == 0
    rest = set(tokenizer.get_vocab()) - frequent - {token for token in often.get_vocab() if len(token) == 1}
    assert len(rest & often.get_vocab().keys()) < 60  # ## characters, special tokens, those that fill up to 8

    _, covering = trim_vocabulary(model, tokenizer, TEXTS, coverage=0.95)
    share = 1 - trim_coverage(tokenizer, covering, TEXTS).token_share
    assert 0.95 <= share < 0.97
    _, everything = trim_vocabulary(model, tokenizer, TEXTS, coverage=1.0)
    assert trim_coverage(tokenizer, everything, TEXTS) == TrimCoverage(len(TEXTS), 0, counts.total(), 0)

    whole, same = trim_vocabulary(model, tokenizer, TEXTS, vocab_size=len(tokenizer))
    assert same.get_vocab() == tokenizer.get_vocab()
    assert whole.config.vocab_size == len(tokenizer)  # the rows without tokens are gone


def test_pairs_and_streams_of_texts_count_as_lists_of_texts():
    tokenizer = tokenizer_of("roberta")
    pairs = list(zip(TEXTS[::2], TEXTS[1::2], strict=True))
    assert count_tokens(tokenizer, pairs) == count_tokens(tokenizer, (text for text in TEXTS))
    _, trimmed = trim_vocabulary(model_of("roberta", tokenizer), tokenizer, iter(pairs), vocab_size=400)
    alone, both = (trim_coverage(tokenizer, trimmed, texts) for texts in (TEXTS, pairs))
    assert (alone.tokens, alone.touched_tokens) == (both.tokens, both.touched_tokens)
    assert (alone.rows, both.rows) == (600, 300)
    assert alone.touched_rows > both.touched_rows > alone.touched_rows / 2


@pytest.mark.parametrize(
    ("counts", "size", "kept"),
    [
        ({6: 5, 7: 3, 4: 1, 8: 2}, 8, [4, 5, 6, 7]),
        ({8: 9, 9: 8, 10: 7, 6: 1}, 8, [4, 8, 9, 10]),  # no room for 6 with 4 and 5; 4 comes first of the rest
        ({8: 9, 6: 1}, 8, [4, 5, 6, 8]),
        ({8: 9, 6: 1}, 7, [4, 5, 6, 8]),  # rounded up
        ({}, 12, [4, 5, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_what_a_merge_comes_from_stays_and_the_rest_goes_by_its_count(counts, size, kept):
    parents = {6: {4, 5}, 4: {0, 1}, 5: {2, 3}, 7: {1, 2}}  # abcd, ab, cd, bc of a, b, c, d
    chosen = choose_tokens(Counter(counts), {0, 1, 2, 3}, parents, known=range(12), vocab_size=size)
    assert chosen == [0, 1, 2, 3, *kept]


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        ({"coverage": 0.5}, [4]),  # 2 of 20 always stay, and 4 are 10 of them
        ({"coverage": 0.61}, [4, 5]),
        ({"coverage": 0.05}, []),
        ({"coverage": 1.0}, [4, 5, 6]),
        ({"min_count": 5}, [4, 5]),
        ({"min_count": 1}, [4, 5, 6]),
    ],
)
def test_shares_and_counts_are_those_of_the_texts(limit, kept):
    counts = Counter({0: 2, 4: 10, 5: 5, 6: 3})
    chosen = choose_tokens(counts, {0, 1, 2, 3}, {}, known=range(7), **limit)  # seven: none to fill up with
    assert chosen == [0, 1, 2, 3, *kept] or len(chosen) == 7
    filled = choose_tokens(counts, {0, 1, 2, 3}, {}, known=range(20), **limit)
    assert filled == [0, 1, 2, 3, 4, 5, 6, 7]


def test_the_positions_of_a_roberta_stay_where_they_were():
    """They count from the padding's id, which must not move."""
    vocabulary = byte_pairs(["<s>", "</s>", "<unk>", "<mask>"])
    model = json.loads(vocabulary.to_str())["model"]
    order = sorted(model["vocab"], key=model["vocab"].get)
    order.insert(470, "<pad>")
    tokenizer = RobertaTokenizer(
        vocab={token: number for number, token in enumerate(order)}, merges=[tuple(m) for m in model["merges"]]
    )
    assert tokenizer.pad_token_id == 470
    model = model_of("roberta", tokenizer, max_position_embeddings=600)
    small, trimmed = trim_vocabulary(model, tokenizer, TEXTS, vocab_size=480)
    assert small.config.pad_token_id == trimmed.pad_token_id == 470
    texts = as_before(tokenizer, trimmed, OTHERS)
    assert torch.equal(logits_of(small, trimmed, texts), logits_of(model, tokenizer, texts))


def test_a_generator_keeps_its_ids():
    tokenizer = tokenizer_of("gpt2")
    model = model_of("gpt2", tokenizer, AutoModelForCausalLM)
    last = len(tokenizer) - 1
    model.generation_config.forced_eos_token_id = last
    model.generation_config.suppress_tokens = [5, last - 1, last]
    small, trimmed = trim_vocabulary(model, tokenizer, TEXTS, vocab_size=400)
    ids = small.generation_config
    assert trimmed.convert_ids_to_tokens(ids.forced_eos_token_id) == tokenizer.convert_ids_to_tokens(last)
    assert trimmed.convert_ids_to_tokens(ids.suppress_tokens)[-1] == tokenizer.convert_ids_to_tokens(last)
    assert model.generation_config.forced_eos_token_id == last


def test_types_of_weights_stay_and_no_weights_are_shared(tmp_path):
    tokenizer = tokenizer_of("modernbert")
    model = model_of("modernbert", tokenizer, AutoModel).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    small, trimmed = trim_vocabulary(model, tokenizer, TEXTS, vocab_size=400)
    assert small.dtype == torch.bfloat16
    assert small.training
    texts = as_before(tokenizer, trimmed, OTHERS)[:8]
    states = []
    for each, its in ((model, tokenizer), (small, trimmed)):
        with torch.no_grad():
            states.append(each.eval()(**its(texts, padding=True, return_tensors="pt")).last_hidden_state)
    assert torch.equal(*states)
    places = [{weight.data_ptr() for weight in each.parameters()} for each in (model, small)]
    assert not places[0] & places[1]  # training one leaves the other as it is


def test_adapters_are_added_to_the_weights():
    tokenizer = tokenizer_of("bert")
    plain = model_of("bert", tokenizer)
    model = get_peft_model(plain, LoraConfig(target_modules=["query"], init_lora_weights=False)).eval()
    small, trimmed = trim_vocabulary(model, tokenizer, TEXTS, vocab_size=400)
    texts = as_before(tokenizer, trimmed, OTHERS)
    assert not [name for name, _ in small.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits_of(small, trimmed, texts), logits_of(model, tokenizer, texts), rtol=0, atol=1e-5)
    assert any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({}, "say exactly one of vocab_size, coverage and min_count"),
        ({"vocab_size": 400, "coverage": 0.9}, "vocab_size, coverage: say exactly one"),
        ({"vocab_size": 16}, r"vocab_size: 16 is too few; \d+ tokens always stay .*say at least \d+"),
        ({"vocab_size": 5000}, r"vocab_size: 5,000 is more than the 601 tokens"),
        ({"vocab_size": 0}, "vocab_size: 0 is too few"),
        ({"min_count": 0}, "min_count: 0 is too few"),
        ({"coverage": 0.0}, "coverage: 0.0 is no share"),
        ({"coverage": 95}, "coverage: 95 is no share"),
    ],
)
def test_limits_that_cannot_be_are_told(limits, problem):
    tokenizer = tokenizer_of("bert")
    with pytest.raises(InputError, match=problem):
        trim_vocabulary(model_of("bert", tokenizer), tokenizer, TEXTS, **limits)


def test_what_cannot_be_trimmed_is_told():
    tokenizer = tokenizer_of("bert")
    model = model_of("bert", tokenizer)
    for texts, problem in (("one text", "is one text"), ([""], "no tokens"), ([None], "None is no text"),
                           ([("a", 3.0)], "3.0 is no text")):  # fmt: skip
        with pytest.raises(InputError, match=problem):
            trim_vocabulary(model, tokenizer, texts, vocab_size=400)
    with pytest.raises(InputError, match="WordLevel vocabulary cannot be trimmed"):
        trim_vocabulary(tiny_bert(), make_tokenizer(), TEXTS, vocab_size=16)
    with pytest.raises(InputError, match=r"embeddings for 25 tokens .* its tokenizer 601"):
        trim_vocabulary(tiny_bert(), tokenizer, TEXTS, vocab_size=400)
    images = transformers.ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(InputError, match="no vocabulary of its own"):
        trim_vocabulary(images, tokenizer, TEXTS, vocab_size=400)
    with pytest.raises(InputError, match="is quantized; trim the vocabulary of the float model"):
        trim_vocabulary(quantize_model(model, format="int8"), tokenizer, TEXTS, vocab_size=400)


def test_a_teacher_with_the_whole_vocabulary_reads_its_own_tokens(tmp_path):
    tokenizer = tokenizer_of("bert")
    teacher = model_of("bert", tokenizer)
    student, trimmed = trim_vocabulary(teacher, tokenizer, TEXTS, vocab_size=240)
    for model, its, name in ((teacher, tokenizer, "teacher"), (student, trimmed, "student")):
        model.save_pretrained(tmp_path / name)
        its.save_pretrained(tmp_path / name)
    rows = [{"text": text, "label": number % 3} for number, text in enumerate(OTHERS)]
    data = load_data(None, DataOptions(kind="classification", path=str(write_rows(tmp_path / "rows.jsonl", rows))))
    read = read_rows(data, str(tmp_path / "student"), [str(tmp_path / "teacher")])
    for row in read.train.select(range(20)):
        words = [each.decode(row[column], skip_special_tokens=True) for each, column in
                 ((trimmed, "input_ids"), (tokenizer, "teacher1_input_ids"))]  # fmt: skip
        assert words[0] == words[1]
    trainer = DistillationTrainer(
        model=student, teacher=teacher, train_dataset=read.train, eval_dataset=read.validation,
        processing_class=read.processor, args=DistillationConfig(output_dir=str(tmp_path / "run"), disable_tqdm=True),
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss/soft"] > 1e-4  # rows that read otherwise are predicted otherwise
