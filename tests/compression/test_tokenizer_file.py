"""Which tokens no text can do without, on vocabularies small enough to see it, and the files that are written."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizer, DebertaV2Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from distill.compression.tokenizer_file import (
    ids_of,
    necessary_ids,
    parents_of,
    read_description,
    with_description,
    with_tokens,
)
from distill.errors import InputError


def fast(model, **special):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def necessary_tokens(tokenizer):
    description = read_description(tokenizer)
    necessary = necessary_ids(tokenizer, description)
    return [token for token, number in ids_of(description).items() if number in necessary]


def trimmed_to(tokenizer, tokens):
    description = read_description(tokenizer)
    kept = sorted(ids_of(description)[token] for token in tokens)
    return with_description(tokenizer, with_tokens(description, kept))


def test_a_word_piece_vocabulary_keeps_characters_and_what_they_alone_cannot_spell():
    tokens = ["[UNK]", "a", "b", "##a", "##b", "#", "##", "###", "ab", "##ab", "xa", "##ax", "[unused0]", "é", "漢"]
    tokens += ["##y", "ya"]
    tokenizer = fast(
        models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"), unk_token="[UNK]"
    )
    # ## is a word of two marks, whose second one within a word is ###. x is no token by itself, y none at the start.
    assert set(tokens) - set(necessary_tokens(tokenizer)) == {"##", "ab", "##ab"}
    trimmed = trimmed_to(tokenizer, necessary_tokens(tokenizer))
    assert trimmed.tokenize("abab xa ##") == ["a", "##b", "##a", "##b", "xa", "#", "###"]
    assert tokenizer.tokenize("abab xa ##") == ["ab", "##ab", "xa", "##"]


def test_byte_fallback_and_ends_of_words_stay():
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "a": 2, "b": 3, "a</w>": 4, "b</w>": 5, "ab</w>": 6, "ab": 7, "<0x0a>": 8}
    model = models.BPE(vocabulary, [("a", "b</w>"), ("a", "b")], unk_token="<unk>", end_of_word_suffix="</w>")
    tokenizer = fast(model, unk_token="<unk>")
    assert set(vocabulary) - set(necessary_tokens(tokenizer)) == {"ab</w>", "ab"}
    # <0x0a> holds characters that are no tokens
    assert trimmed_to(tokenizer, set(vocabulary) - {"ab</w>"}).tokenize("abab ab") == ["ab", "a", "b</w>", "a", "b</w>"]


def test_parents_are_both_sides_of_every_merge():
    vocabulary = {token: number for number, token in enumerate(["a", "##b", "##c", "ab", "##bc", "abc"])}
    merges = [("a", "##b"), ("##b", "##c"), ("ab", "##c"), ("a", "##bc")]
    tokenizer = fast(models.BPE(vocabulary, merges, continuing_subword_prefix="##"))
    assert parents_of(read_description(tokenizer)) == {3: {0, 1}, 4: {1, 2}, 5: {0, 2, 3, 4}}
    left = trimmed_to(tokenizer, ["a", "##b", "##c", "##bc"])
    assert read_description(left)["model"]["merges"] == [["##b", "##c"]]
    assert (tokenizer.tokenize("abc"), left.tokenize("abc")) == (["abc"], ["a", "##bc"])


def test_the_lowest_score_of_a_unigram_vocabulary_stays_since_unknown_characters_are_scored_by_it():
    """x scores 10 less than the lowest: a+bx is −28 and ab+x −31; without zz, ab+x would be −25 and win."""
    pieces = [("<unk>", 0.0), ("a", -14.0), ("b", -14.0), ("z", -1.0), ("ab", -1.0), ("bx", -14.0), ("zz", -20.0)]
    pieces += [("za", -3.0)]
    tokenizer = fast(models.Unigram(pieces, unk_id=0), unk_token="<unk>")
    assert {piece for piece, _ in pieces} - set(necessary_tokens(tokenizer)) == {"ab", "za"}
    trimmed = trimmed_to(tokenizer, [piece for piece, _ in pieces if piece != "za"])
    assert tokenizer.tokenize("abx") == trimmed.tokenize("abx") == ["a", "bx"]
    assert trimmed_to(tokenizer, ["<unk>", "a", "b", "z", "ab", "bx"]).tokenize("abx") == ["ab", "x"]


@pytest.mark.parametrize(
    "around",
    [
        processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 4), ("</s>", 5)]
        ),
        processors.RobertaProcessing(("</s>", 5), ("<s>", 4), trim_offsets=False),
        processors.BertProcessing(("</s>", 5), ("<s>", 4)),
        processors.Sequence([
            processors.ByteLevel(),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 4), ("</s>", 5)]),
        ]),
    ],
    ids=["template", "roberta", "bert", "sequence"],
)  # fmt: skip
def test_tokens_around_texts_padding_and_added_ones_get_their_new_ids(around):
    tokens = ["[UNK]", "a", "##a", "aa", "<s>", "</s>", "<pad>"]
    backend = Tokenizer(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = around
    backend.enable_padding(pad_id=6, pad_token="<pad>", length=5)
    backend.add_tokens(["bb"])  # beside the vocabulary
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert set(tokens) - set(necessary_tokens(tokenizer)) == {"aa"}
    trimmed = trimmed_to(tokenizer, [*(set(tokens) - {"aa"}), "bb"])
    assert trimmed.backend_tokenizer.encode("aa bb").ids == [3, 1, 2, 6, 4]
    assert trimmed.backend_tokenizer.encode("a").ids == [3, 1, 4, 5, 5]


def test_the_unknown_token_of_a_deberta_is_found_again():
    pieces = [("[PAD]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -1.5), ("[UNK]", -2.0)]
    tokenizer = DebertaV2Tokenizer(vocab=pieces, unk_id=6)
    trimmed = trimmed_to(tokenizer, [token for token in tokenizer.get_vocab() if token != "ab"])
    assert (trimmed.unk_token_id, trimmed.convert_tokens_to_ids("c")) == (5, 5)
    assert trimmed("abc", add_special_tokens=False)["input_ids"][-1] == 5


def test_what_else_the_file_says_stays():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "É", "##É", "ÉÉ"]
    numbered = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = BertTokenizer(vocab=numbered, do_lower_case=False, model_max_length=77, padding_side="left")
    trimmed = trimmed_to(tokenizer, [token for token in tokenizer.get_vocab() if token != "ÉÉ"])
    before, after = read_description(tokenizer), read_description(trimmed)
    assert before.keys() == after.keys()
    assert all(before[key] == after[key] for key in before if key != "model")
    assert {**after["model"], "vocab": None} == {**before["model"], "vocab": None}
    assert (trimmed.model_max_length, trimmed.padding_side, trimmed.name_or_path) == (77, "left", "")
    assert trimmed.tokenize("ÉÉ") == ["É", "##É"]
    assert tokenizer.tokenize("ÉÉ") == ["ÉÉ"]


def test_a_class_that_does_not_read_its_own_file_is_told():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a", "aa"]
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(vocabulary)})
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "a")  # which BertTokenizer does not read
    with pytest.raises(InputError, match=r"BertTokenizer does not read its own tokenizer\.json as it is written"):
        trimmed_to(tokenizer, vocabulary[:-1])


def test_a_tokenizer_without_a_file_is_told():
    class Slow(PreTrainedTokenizer):
        vocab_size = 0

        def get_vocab(self):
            return {}

    with pytest.raises(InputError, match="Slow is not one of the tokenizers library"):
        read_description(Slow())
