"""Trim a vocabulary: count the tokens of texts, and leave out what they don't need from tokenizer and model."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.common.console import progress
from distill.compression.tokenizer_file import (
    ids_of,
    necessary_ids,
    parents_of,
    read_description,
    with_description,
    with_tokens,
)
from distill.compression.trimmed_model import ids_of_config, trim_model
from distill.errors import InputError
from distill.models.adapters import has_adapters, merged_copy
from distill.models.replacements import is_quantized

_MULTIPLE = 8  # of which matrix kernels like their sizes to be
_BATCH = 1000

Texts = Iterable[str | list[str] | tuple[str, ...]]
"""Rows, each a text or a pair of texts."""


def trim_vocabulary(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    *,
    vocab_size: int | None = None,
    coverage: float | None = None,
    min_count: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer with only the tokens that `texts` use most; plain transformers loads both.

    Texts without a token that is left out become the same tokens as before (under new ids, in the old order) and get
    the same logits. A word that is left out falls into smaller tokens, and never becomes unknown where it was not:
    special and added tokens, single characters, bytes, and what kept tokens are merged from stay. The number of
    tokens is rounded up to a multiple of 8, where there are as many.

    Args:
        model: of any family, in float; it stays as it is, and so does the tokenizer. Of a PEFT model the result has the
            weights with its active adapters added to them, and none of its own.
        tokenizer: of the tokenizers library, with a WordPiece, BPE or Unigram vocabulary.
        texts: rows, each a text or a pair of texts; read once, some at a time.
        vocab_size: how many tokens stay, those that always do included.
        coverage: the share of the texts' tokens (special ones aside) that stay, above 0 and up to 1.
        min_count: tokens that stand in the texts as often stay.

    Raises:
        InputError: not exactly one of the three, or one that cannot be; a model that is quantized or has no vocabulary
            of its own; a tokenizer of another kind; texts that are none, or without a token.
    """
    refuse_limits(vocab_size=vocab_size, coverage=coverage, min_count=min_count)
    if is_quantized(model.config):
        raise InputError("model: is quantized; trim the vocabulary of the float model, and quantize what comes of it")
    if has_adapters(model):
        model = merged_copy(model)
    chosen = partial(kept_tokens, model, tokenizer, vocab_size=vocab_size, coverage=coverage, min_count=min_count)
    chosen(Counter())  # tells what can't be before the texts are read
    kept = chosen(count_tokens(tokenizer, texts))
    return trim_model(model, kept), with_description(tokenizer, with_tokens(read_description(tokenizer), kept))


def kept_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[int],
    *,
    vocab_size: int | None = None,
    coverage: float | None = None,
    min_count: int | None = None,
) -> list[int]:
    """The ids of the tokens of a model and its tokenizer that stay, in ascending order.

    Args:
        model: may lie on meta.
        counts: how often each id stands in the texts.
        vocab_size: as of `trim_vocabulary`, `coverage` and `min_count` too.

    Raises:
        InputError: as of `trim_vocabulary`, but for what is wrong with the texts.
    """
    rows = getattr(model.config, "vocab_size", None)
    if rows is None:
        raise InputError(f"model: {type(model).__name__} has no vocabulary of its own (vocab_size); nothing to trim")
    description = read_description(tokenizer)
    known = sorted(ids_of(description).values())
    if known[-1] >= rows:
        raise InputError(
            f"model: has embeddings for {rows:,} tokens (vocab_size), and its tokenizer {known[-1] + 1:,} tokens; take "
            "the tokenizer that belongs to it"
        )
    return choose_tokens(
        counts,
        necessary_ids(tokenizer, description) | ids_of_config(model).intersection(known),
        parents_of(description),
        known=known,
        vocab_size=vocab_size,
        coverage=coverage,
        min_count=min_count,
    )


def refuse_limits(*, vocab_size: int | None, coverage: float | None, min_count: int | None) -> None:
    """Refuse options of which not exactly one is set, or one makes no sense.

    Args:
        vocab_size: at least 1; None where it is not set, as of the others.
        coverage: above 0 and up to 1.
        min_count: at least 1.

    Raises:
        InputError: none or several are set, or one is out of its range.
    """
    given = {"vocab_size": vocab_size, "coverage": coverage, "min_count": min_count}
    said = [name for name, value in given.items() if value is not None]
    if len(said) != 1:
        raise InputError(f"{', '.join(said or given)}: say exactly one of vocab_size, coverage and min_count")
    for name, value in (("vocab_size", vocab_size), ("min_count", min_count)):
        if value is not None and value < 1:
            raise InputError(f"{name}: {value} is too few; say a whole number from 1 on")
    if coverage is not None and not 0 < coverage <= 1:
        raise InputError(f"coverage: {coverage} is no share of the tokens; say a number above 0 and up to 1")


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Counter[int]:
    """How often each token stands in the texts, by its id; the special tokens around a text are not counted.

    Args:
        texts: rows, each a text or a pair of texts; read once, some at a time.

    Raises:
        InputError: one text instead of rows, a row that is no text, or no tokens at all.
    """
    counts: Counter[int] = Counter()
    for row in _encoded(tokenizer, texts, "counting tokens"):
        counts.update(row)
    if not counts:
        raise InputError("texts: hold no tokens to count")
    return counts


def choose_tokens(
    counts: Counter[int],
    necessary: Iterable[int],
    parents: Mapping[int, Iterable[int]],
    *,
    known: Sequence[int],
    vocab_size: int | None = None,
    coverage: float | None = None,
    min_count: int | None = None,
) -> list[int]:
    """The ids of the tokens that stay, in ascending order.

    Args:
        counts: how often each id stands in the texts.
        necessary: ids that stay in any case.
        parents: of a token, the ids without which it cannot stay.
        known: all ids, in ascending order; of tokens that are as frequent the first stays.

    Raises:
        InputError: `vocab_size` is more than there are, or leaves no room for those that always stay.
    """
    kept: set[int] = set()

    def lineage(token: int) -> set[int]:
        """The token and those of its ancestors that are not kept yet."""
        found, open_ids = set(), [token]
        while open_ids:
            number = open_ids.pop()
            if number not in kept and number not in found:
                found.add(number)
                open_ids += parents.get(number, ())
        return found

    for token in necessary:
        kept |= lineage(token)
    always = len(kept)
    if vocab_size is not None and vocab_size > len(known):
        raise InputError(f"vocab_size: {vocab_size:,} is more than the {len(known):,} tokens that there are")
    size = None if vocab_size is None else _rounded(vocab_size, len(known))
    if size is not None and size < always:
        raise InputError(
            f"vocab_size: {vocab_size:,} is too few; {always:,} tokens always stay (special tokens, characters and "
            f"bytes), so say at least {_rounded(always, len(known)):,}"
        )
    frequent = sorted(known, key=lambda token: (-counts[token], token))
    if size is None:
        enough = math.inf if coverage is None else coverage * counts.total()
        covered = sum(counts[number] for number in kept)
        for token in frequent:
            if covered >= enough or (min_count is not None and counts[token] < min_count):
                break
            added = lineage(token)
            covered += sum(counts[number] for number in added)
            kept |= added
        size = _rounded(len(kept), len(known))
    while len(kept) < size:  # a second time for tokens whose parents came after them
        for token in frequent:
            added = lineage(token)
            if len(kept) + len(added) <= size:
                kept |= added
    return sorted(kept)


@dataclass(frozen=True)
class TrimCoverage:
    """What of some texts a trimmed vocabulary changes: rows and tokens, and those with or of a token that is gone."""

    rows: int
    touched_rows: int
    tokens: int
    touched_tokens: int

    @property
    def row_share(self) -> float:
        """The share of the rows that are read otherwise."""
        return self.touched_rows / max(self.rows, 1)

    @property
    def token_share(self) -> float:
        """The share of the tokens that fall into smaller ones."""
        return self.touched_tokens / max(self.tokens, 1)


def trim_coverage(tokenizer: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase, texts: Texts) -> TrimCoverage:
    """How many rows and tokens of some texts a trimmed vocabulary changes.

    Args:
        tokenizer: the one before.
        texts: rows, each a text or a pair of texts.

    Raises:
        InputError: a row that is no text.
    """
    left = trimmed.get_vocab()
    gone = {number for token, number in tokenizer.get_vocab().items() if token not in left}
    sizes, touched = [], []
    for row in _encoded(tokenizer, texts, "reading tokens"):
        sizes.append(len(row))
        touched.append(sum(number in gone for number in row))
    return TrimCoverage(len(sizes), sum(map(bool, touched)), sum(sizes), sum(touched))


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Texts, doing: str) -> Iterator[list[int]]:
    """The ids of each row, without the special tokens around it."""
    if isinstance(texts, str):
        raise InputError("texts: is one text; give a list of texts, or of pairs of texts")
    rows = iter(progress(texts, doing, len(texts) if isinstance(texts, Sized) else None))
    while batch := list(itertools.islice(rows, _BATCH)):
        parts = [row if isinstance(row, (list, tuple)) else [row] for row in batch]
        flat = list(itertools.chain.from_iterable(parts))
        wrong = [part for part in flat if not isinstance(part, str)]
        if wrong:
            raise InputError(f"texts: {wrong[0]!r} is no text; give a list of texts, or of pairs of texts")
        encoded = iter(tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"] if flat else ())
        for row in parts:
            yield list(itertools.chain.from_iterable(itertools.islice(encoded, len(row))))


def _rounded(size: int, most: int) -> int:
    return min(-(-size // _MULTIPLE) * _MULTIPLE, most)
