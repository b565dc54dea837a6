"""Memory and speed of many rows: a corpus of short texts is checked, tokenized and trained on, beside a small one.

    python scripts/benchmark_rows.py                           # 10,000 and 1,000,000 texts, some minutes
    python scripts/benchmark_rows.py --rows 10000 200000 --format parquet

Each corpus, in several files, goes through `distill check` and `distill run` (a masked language model with a tiny BERT,
50 steps) in processes of their own, whose private memory (RssAnon) is sampled. Then its training rows are tokenized,
against the tokenizer's own batch call over the same texts. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.common.console import log, results
from distill.data.load import DataOptions, load_data

_SHARDS = 4
_WORDS = 5000
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_MAX_LENGTH = 64
_ROWS_OF_A_CALL = 10_000
_RECIPE = """
output_dir: {folder}/run
data: {{kind: masked-lm, path: {folder}/corpus, max_length: {max_length}, max_eval_rows: 500}}
steps:
  student:
    {{run: finetune, model: {folder}/model, from_scratch: true, max_steps: 50, per_device_train_batch_size: 32,
      use_cpu: true, bf16: false, disable_tqdm: true}}
"""


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--format", choices=("jsonl", "csv", "parquet"), default="jsonl")
    parser.add_argument("--rounds", type=int, default=3, help="of tokenizing; the median counts")
    arguments = parser.parse_args()
    sizes = {}
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="distill-rows-") as name:
            sizes[str(rows)] = _measure(Path(name), rows, arguments.format, arguments.rounds)
    results.print_json(
        json.dumps({"format": arguments.format, "cpus": len(os.sched_getaffinity(0)), "rows": sizes}), indent=None
    )


def _measure(folder: Path, rows: int, ending: str, rounds: int) -> dict[str, float]:
    _write_corpus(folder / "corpus", rows, ending)
    tokenizer = _write_model(folder / "model")
    recipe = folder / "recipe.yaml"
    recipe.write_text(_RECIPE.format(folder=folder, max_length=_MAX_LENGTH), encoding="utf-8")
    found: dict[str, float] = {}
    for command in ("check", "run"):
        started = time.perf_counter()
        found[f"{command}_peak_anonymous_mb"] = _peak_of([command, str(recipe)], folder / "home")
        found[f"{command}_seconds"] = round(time.perf_counter() - started, 1)
        log.print(f"{rows:,} rows, {command}: {found}")
    return found | _speed(folder, tokenizer, rounds)


def _peak_of(words: list[str], home: Path) -> float:
    """Peak of RssAnon (MB) of a `distill` command and of its children, which it must end well."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    log_file = home.with_suffix(".log")
    with log_file.open("w+b") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "import sys; from distill.cli import main; sys.exit(main())", *words],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.01)
    if process.returncode != 0:
        raise SystemExit(log_file.read_text(encoding="utf-8")[-3000:])
    return round(peak / 1e3, 1)


def _anonymous(process: int) -> int:
    """RssAnon of a process, in kB; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)


def _speed(folder: Path, tokenizer: PreTrainedTokenizerBase, rounds: int) -> dict[str, float]:
    """Tokens a second of tokenizing the training rows, and of the tokenizer's own call over their texts."""
    rates: dict[str, list[float]] = {"ours": [], "tokenizer": []}
    for number in range(rounds):
        # Another length limit makes other rows, so that none are found from before; no text is as long.
        options = DataOptions(kind="masked-lm", path=str(folder / "corpus"), max_length=_MAX_LENGTH + 1 + number)
        data = load_data(None, options)
        started = time.perf_counter()
        rows = data.tokenized("train", tokenizer)
        seconds = time.perf_counter() - started
        tokens = pc.sum(rows.with_format("arrow")["length"][:]).as_py()
        rates["ours"].append(tokens / seconds)
        texts = data.splits["train"][data.task.text[0]][:]
        started = time.perf_counter()
        for start in range(0, len(texts), _ROWS_OF_A_CALL):
            tokenizer(texts[start : start + _ROWS_OF_A_CALL], truncation=True, max_length=_MAX_LENGTH + 1 + number)
        rates["tokenizer"].append(tokens / (time.perf_counter() - started))
        log.print(f"tokens a second: { ({name: round(of_one[-1]) for name, of_one in rates.items()}) }")
    found = {f"{name}_tokens_per_second": round(statistics.median(of_one)) for name, of_one in rates.items()}
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    return {**found, "ratio": round(statistics.median(ratios), 3)}


def _write_corpus(folder: Path, rows: int, ending: str) -> None:
    """Texts of 4 to 24 made-up words, the frequent ones short, in some shards."""
    folder.mkdir()
    for shard in range(_SHARDS):
        texts = list(_texts(rows // _SHARDS, seed=shard))
        path = folder / f"train-{shard:05}-of-{_SHARDS:05}.{ending}"
        if ending == "parquet":
            pyarrow.parquet.write_table(pa.table({"text": texts}), path)
        elif ending == "csv":
            path.write_text("text\n" + "".join(f"{text}\n" for text in texts), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def _texts(count: int, seed: int) -> Iterator[str]:
    generator = np.random.default_rng(0)
    letters = ["".join(pair) for pair in zip("bcdfghjklmnpqrstvwz" * 5, "aeiou" * 19, strict=True)]
    words = ["".join(generator.choice(letters, 1 + number % 4)) for number in range(_WORDS)]
    generator = np.random.default_rng([1, seed])
    for _ in range(0, count, 10_000):
        numbers = np.minimum(generator.zipf(1.3, (10_000, 24)) - 1, _WORDS - 1)
        lengths = generator.integers(4, 25, 10_000)
        for row in range(min(count, 10_000)):
            yield " ".join(words[number] for number in numbers[row, : lengths[row]])


def _write_model(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer of word pieces, and a tiny BERT that reads them."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        _texts(10_000, seed=0), trainers.WordPieceTrainer(vocab_size=3000, special_tokens=_SPECIAL)
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)
    transformers.set_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


if __name__ == "__main__":
    main()
