"""Tokenizers and image processors, which turn rows into a model's inputs, fitted to the model."""

from pathlib import Path

from tokenizers import normalizers
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from distill.common.sources import reason_of
from distill.errors import InputError
from distill.models.folders import TOKENIZER_FILES, base_folder, load_config
from distill.tasks.base import TaskKind
from distill.tasks.kinds import KINDS

_PADDING_TOKENS = ("[PAD]", "<pad>", "<|pad|>")
# RoBERTa and what came from it: the first token's position is the padding's id + 1.
POSITIONS_AFTER_PADDING = {
    *("camembert", "data2vec-text", "ibert", "lilt", "longformer", "markuplm", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}


def load_tokenizer(location: str, max_length: int | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; one without a padding token gets the token of the model's padding id, or its end token.

    Args:
        location: folder or Hub id.
        max_length: in tokens; becomes its `model_max_length`, so that `pipeline(truncation=True)` cuts there.

    Raises:
        InputError: there is none, or it has no token to pad with.
    """
    base = None if holds_tokenizer(location) else base_folder(Path(location))
    found = location if base is None else str(base)
    if not holds_tokenizer(found):
        raise InputError(
            f"{location}: holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])}); save one beside the model"
        )
    config = load_config(found) if (Path(found) / "config.json").is_file() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(found, config=config, trust_remote_code=False)
    except Exception as error:  # as for the config
        raise InputError(f"{location}: its tokenizer cannot be loaded ({reason_of(error)})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _padding_token(tokenizer, config, location)
    if max_length is not None:
        tokenizer.model_max_length = max_length
    return tokenizer


def _padding_token(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None, where: str) -> str:
    """A token to pad with, for a tokenizer that names none (GPT-2, Llama, one that was trained by hand)."""
    number = getattr(config, "pad_token_id", None)
    if isinstance(number, int) and 0 <= number < len(tokenizer):
        return tokenizer.convert_ids_to_tokens(number)
    if tokenizer.eos_token is not None:
        return tokenizer.eos_token
    known = next((token for token in _PADDING_TOKENS if token in tokenizer.get_vocab()), None)
    if known is None:
        raise InputError(
            f"{where}: its tokenizer has no padding token, nor an end token to pad with; set pad_token and save it"
        )
    return known


def holds_tokenizer(location: str) -> bool:
    """Tell whether a folder holds a tokenizer; a Hub id is taken for one that does."""
    folder = Path(location)
    return not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES)


def fit_to_tokenizer(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Let a model pad with its tokenizer's padding token: a causal classifier reads the last token that is none.

    Where positions count from the padding id on, as RoBERTa's do, it belongs to the weights and stays.

    Args:
        config: the model's, which is changed.
        tokenizer: that makes its inputs.
        where: the model, for messages.

    Raises:
        InputError: the tokenizer has tokens that the model has no embeddings for.
    """
    rows, vocabulary = getattr(config, "vocab_size", None), tokenizer.get_vocab()
    if tokenizer.eos_token_id not in {tokenizer.pad_token_id, *tokenizer("")["input_ids"]}:
        vocabulary.pop(tokenizer.eos_token, None)  # some classes bring one that no text becomes (Qwen2's)
    tokens = max(vocabulary.values()) + 1
    if rows is not None and tokens > rows:
        raise InputError(
            f"{where}: its tokenizer has {tokens:,} tokens, but the model embeddings for {rows:,} (vocab_size); resize "
            "them (resize_token_embeddings), or take the tokenizer that belongs to it"
        )
    if config.model_type not in POSITIONS_AFTER_PADDING:
        config.pad_token_id = tokenizer.pad_token_id


def load_processor(
    location: str, kind: TaskKind | None, max_length: int | None = None
) -> PreTrainedTokenizerBase | BaseImageProcessor:
    """Load the tokenizer, or for images the image processor, that turns a task's rows into the model's inputs.

    Args:
        location: folder or Hub id.
        kind: of the task; None for texts of any.
        max_length: in tokens, as in `load_tokenizer`.

    Raises:
        InputError: there is none, or it can't read the kind's rows.
    """
    reads = "text" if kind is None else KINDS[kind].reads
    if reads == "words":
        return _reading_words(load_tokenizer(location, max_length), location)
    if reads == "text":
        return load_tokenizer(location, max_length)
    try:
        return AutoImageProcessor.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # as for the config
        raise InputError(f"{location}: its image processor cannot be loaded ({reason_of(error)})") from error


def _reading_words(tokenizer: PreTrainedTokenizerBase, location: str) -> PreTrainedTokenizerBase:
    """A tokenizer that reads words given one by one as it reads them in a text.

    A byte-level one (RoBERTa, GPT-2) reads them as if they were one word, unless it puts a space before each.

    Raises:
        InputError: it can't be made to.
    """
    if not tokenizer.is_fast or _reads_words(tokenizer):
        return tokenizer
    spaced = AutoTokenizer.from_pretrained(tokenizer.name_or_path, add_prefix_space=True, trust_remote_code=False)
    if not _reads_words(spaced):  # one without a class of its own, for which the option does nothing
        spaces = normalizers.Prepend(" ")
        known = spaced.backend_tokenizer.normalizer
        spaced.backend_tokenizer.normalizer = spaces if known is None else normalizers.Sequence([known, spaces])
    if not _reads_words(spaced):
        raise InputError(
            f"{location}: its tokenizer reads words given one by one as one word; save it with add_prefix_space=True "
            f"(AutoTokenizer.from_pretrained({location!r}, add_prefix_space=True).save_pretrained(…))"
        )
    spaced.pad_token, spaced.model_max_length = tokenizer.pad_token, tokenizer.model_max_length
    return spaced


def _reads_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a word by itself becomes the tokens that it becomes in a text."""
    one_by_one = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    in_text = tokenizer("a a", add_special_tokens=False)["input_ids"]
    word = one_by_one[len(one_by_one) // 2 :]
    return in_text[-len(word) :] == word
