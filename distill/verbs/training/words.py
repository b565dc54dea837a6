"""What is told of a training: before it runs, and on the card of its model."""

from collections.abc import Callable

from distill.common.records import StepRecord
from distill.training.config import TrainingConfig
from distill.training.features import show_pairs
from distill.verbs.training.options import TrainingOptions, holds_adapter
from distill.verbs.training.planning import TrainingPlan


def lines_of_training(options: TrainingOptions, plan: TrainingPlan) -> list[str]:
    """Describe the student's layers, its quantization-aware training, and the layers that its losses match, in lines.

    Args:
        options: where `qat` is set, a line says so.
        plan: holds the layers.
    """
    lines = ["new weights"] if plan.layers is None else [f"source layers {', '.join(map(str, plan.layers))} (from 0)"]
    if options.qat is not None:
        lines.append(_awareness(options))
    for teacher, pairs in plan.layer_pairs.items():
        for part, layers in pairs.items():
            lines.append(f"{part} loss: {show_pairs(layers)} (student→{teacher}; 0 is the embeddings)")
    return lines


def details_of_training(record: StepRecord, named: Callable[[str], str], losses: list[str]) -> list[str]:
    """A card's lines on layers, losses, adapters and training.

    Args:
        record: of the step.
        named: how the card names a model.
        losses: the lines on these.
    """
    options, lines = record.options, []
    if record.layers is not None and not holds_adapter(options):
        lines.append(f"Layers taken from the source (from 0): {', '.join(map(str, record.layers))}")
    lines += losses
    for teacher, maps in record.layer_pairs.items():
        for part, pairs in maps.items():
            shown = ", ".join(f"{student}→{source}" for student, source in pairs)
            lines.append(f"Layers matched by the {part} loss (student→{named(teacher)}, 0: embeddings): {shown}")
    if options.get("lora") is not None:
        lines.append(f"Adapters (LoRA): rank {options['lora'].get('r', 8)}{', merged' if options['merge'] else ''}")
    if record.train_seconds is not None:
        length = (
            f"{options['max_steps']} steps" if options["max_steps"] > 0 else f"{options['num_train_epochs']} epochs"
        )
        batch = f"{options['per_device_train_batch_size']} rows a batch and process"
        rate = options["learning_rate"]
        lines.append(
            f"Training: {record.rows['train']} rows, {length}, {batch}, "
            f"{f'learning rate {rate:g}, ' if rate else ''}seed {options['seed']}, {record.train_seconds:.0f} s"
        )
    return lines


def _awareness(options: TrainingConfig) -> str:
    """What a quantization-aware step trains with, and from when on."""
    parts = [f"{options.qat} weights", f"{options.qat_embeddings} embeddings"]
    if options.qat_engine is not None:
        parts[0] = f"the int8 arithmetic of {options.qat_engine}"
    parts[-1] = "embeddings as they are" if options.qat_embeddings == "none" else parts[-1]
    if options.qat_activations:
        parts.append("8-bit inputs")
    delay = f"{options.qat_delay:.0%} of its steps" if options.qat_delay < 1 else f"{options.qat_delay:.0f} steps"
    return f"quantization-aware: {', '.join(parts)}" + (f", after {delay}" if options.qat_delay else "")
