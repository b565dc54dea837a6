"""What a training says while it runs: the layers it matches, its losses and scores, where the time of a step goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function, schedule, supported_activities
from transformers import TrainerCallback

from distill.common.console import log
from distill.training.features import show_pairs
from distill.training.teachers import Teacher

# The trainer marks these; they nest, so that a phase's own time is what its parts leave.
_PARTS = {"training step": ("student forward", "losses"), "losses": ("teacher",)}
_PHASES = {
    "data": "data",
    "teacher": "teacher",
    "student forward": "student forward",
    "losses": "losses",
    "training step": "backward",
    "optimizer": "optimizer",
}
_FIRST_STEPS, _STEPS = 5, 20
_WATCHERS: ContextVar[tuple[TrainerCallback, ...]] = ContextVar("watchers", default=())


@contextmanager
def watched_by(*callbacks: TrainerCallback) -> Iterator[None]:
    """Give these callbacks to every training of the recipe's steps that begins within the block."""
    token = _WATCHERS.set((*_WATCHERS.get(), *callbacks))
    try:
        yield
    finally:
        _WATCHERS.reset(token)


def watchers() -> tuple[TrainerCallback, ...]:
    """The callbacks of the `watched_by` blocks around."""
    return _WATCHERS.get()


class Announcement(TrainerCallback):
    """Says at the start of a training which layers are matched."""

    def __init__(self, teachers: list[Teacher]):
        self._teachers = teachers

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print each loss's pairs of layers."""
        if not state.is_world_process_zero:
            return
        for number, teacher in enumerate(self._teachers, start=1):
            of = f" {number}" if len(self._teachers) > 1 else ""
            for part, pairs in teacher.pairs.items():
                log.print(f"      {part} loss: layers {show_pairs(pairs)} (student→teacher{of}; 0 is the embeddings)")
            if "attention" in teacher.pairs:
                log.print("      attention maps are read, so student and teacher run in eager attention (slower)")


class ProgressLines(TrainerCallback):
    """For a log file: one line per logging step, with an estimate, where a terminal has Trainer's moving bar."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note where this session starts."""
        self._started, self._first_step = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Print the loss, its parts, and the time that is left."""
        if "loss" not in logs or not state.is_world_process_zero:
            return
        parts = ", ".join(f"{key.partition('/')[2]} {logs[key]:.4f}" for key in sorted(logs) if key.startswith("loss/"))
        done = state.global_step - self._first_step
        left = (time.perf_counter() - self._started) / max(done, 1) * (state.max_steps - state.global_step)
        step = f"step {state.global_step}/{state.max_steps}"
        log.print(f"      {step}, loss {logs['loss']:.4f} ({parts}), {left:.0f} s left")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Print the scores of an evaluation on the way."""
        if state.is_world_process_zero:
            shown = {name.partition("_")[2]: value for name, value in metrics.items() if "/" not in name}
            times = ("runtime", "samples_per_second", "steps_per_second")
            scores = ", ".join(f"{name} {value:.4f}" for name, value in shown.items() if name and name not in times)
            log.print(f"      step {state.global_step}/{state.max_steps}, validation: {scores}")


class StepProfile(TrainerCallback):
    """Profiles some steps after the first few; writes `profile.md` and `profile.json`.

    Args:
        folder: where to. The trace opens in ui.perfetto.dev or chrome://tracing.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._profiler: profile | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the steps, and leave out the first ones."""
        if not state.is_world_process_zero:
            return
        left = state.max_steps - state.global_step
        skipped = min(_FIRST_STEPS, max(left - 2, 0))
        self._steps = max(1, min(_STEPS, left - skipped - 1))
        self._profiler = profile(
            activities=supported_activities(),
            schedule=schedule(wait=skipped, warmup=1, active=self._steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the optimizer's phase."""
        self._optimizer = record_function("optimizer")
        self._optimizer.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark its end."""
        self._optimizer.__exit__(None, None, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the profiler."""
        if self._profiler is not None:
            self._profiler.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where there were fewer steps than expected."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self._folder / "profile.json"))
        (self._folder / "profile.md").write_text(_table(profiler, self._steps), encoding="utf-8")
        log.print(f"      profile of {self._steps} steps for the run folder: profile.md, profile.json (a trace)")


def _table(profiler: profile, steps: int) -> str:
    """Milliseconds of each phase in a step; on a GPU those that it computes, which the host does not wait for."""
    on_accelerator = supported_activities() != {ProfilerActivity.CPU}
    name = "device_time_total" if on_accelerator else "cpu_time_total"
    totals = {event.key: getattr(event, name) / 1000 / steps for event in profiler.key_averages()}
    whole = sum(event.cpu_time_total for event in profiler.key_averages() if event.key.startswith("ProfilerStep"))
    whole = whole / 1000 / steps
    own = {
        shown: totals.get(marked, 0.0) - sum(totals.get(part, 0.0) for part in _PARTS.get(marked, ()))
        for marked, shown in _PHASES.items()
    }
    own["the rest (clipping, schedule, log)"] = whole - sum(own.values())
    lines = ["| phase | ms a step | share |", "| --- | ---: | ---: |"]
    lines += [f"| {phase} | {time:.2f} | {time / whole:.1%} |" for phase, time in own.items()]
    return "\n".join([*lines, f"| all | {whole:.2f} | 100 % |"]) + "\n"
