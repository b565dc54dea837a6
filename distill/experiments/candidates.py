"""What `distill compress` tries: shapes cut from a model, the formats that each is stored in, and steps of both."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from distill.evaluation.front import dominating
from distill.experiments.footprint import Footprint

TEACHER = "teacher"
"""The step that fine-tunes a model without a head."""
_DEPTHS = (1.0, 2 / 3, 1 / 2, 1 / 3)

Steps = dict[str, dict[str, Any]]
"""Of a recipe: `run` and the options of each."""
Each = TypeVar("Each")

FORMATS: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "bf16": {"run": "quantize", "format": "bf16"},
    "int8": {"run": "quantize", "format": "int8"},
    "nf4": {"run": "quantize", "format": "nf4", "gptq": True},
    "onnxruntime-fp32": {"run": "export", "engine": "onnxruntime"},
    "onnxruntime-int8": {"run": "export", "engine": "onnxruntime", "format": "int8"},
    "openvino-fp32": {"run": "export", "engine": "openvino"},
    "openvino-int8": {"run": "export", "engine": "openvino", "format": "int8"},
}
"""For each format the step that stores a model in it; None where a training leaves it so."""


@dataclass(frozen=True)
class Shape:
    """What is left of a model; None where nothing is taken."""

    num_layers: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None

    @property
    def name(self) -> str:
        """The sizes that differ from the model's; the step that trains the shape first is called so."""
        sizes = (("layers", self.num_layers), ("neurons", self.intermediate_size), ("tokens", self.vocab_size))
        return "-".join(f"{what}-{size}" for what, size in sizes if size is not None) or "whole"

    @property
    def is_whole(self) -> bool:
        """Whether nothing is taken, so that nothing is to be won back by a training."""
        return self == Shape()


@dataclass(frozen=True)
class Candidate:
    """A shape in a format."""

    shape: Shape
    format: str

    @property
    def name(self) -> str:
        """That of its last step, where its format needs one."""
        return f"{self.shape.name}-{self.format}"


def shapes_of(num_layers: int, *, intermediate_size: int | None, vocab_size: int | None) -> list[Shape]:
    """List the shapes of a grid: depth by width by vocabulary, the whole model first.

    Args:
        num_layers: of the model; 1 or less where its depth can't be cut.
        intermediate_size: neurons of the narrow shapes; None where there are none.
        vocab_size: tokens of a trimmed vocabulary; None where it can't be trimmed.
    """
    depths = list(dict.fromkeys(max(1, round(share * num_layers)) for share in _DEPTHS))
    widths = [None] if intermediate_size is None else [None, intermediate_size]
    vocabularies = [None] if vocab_size is None else [None, vocab_size]
    return [
        Shape(None if depth >= num_layers else depth, width, tokens)
        for depth in depths
        for width in widths
        for tokens in vocabularies
    ]


def candidates_of(shapes: Iterable[Shape], engines: Collection[str]) -> list[Candidate]:
    """List each shape in each format of the engines; the whole model in float32 is what there is already."""
    found = [Candidate(shape, name) for shape in shapes for name, step in FORMATS.items() if _engine(step) in engines]
    return [each for each in found if not (each.shape.is_whole and FORMATS[each.format] is None)]


def _engine(step: Mapping[str, Any] | None) -> str:
    return "torch" if step is None else str(step.get("engine", "torch"))


def steps_of_shape(shape: Shape, teacher: str, lengths: Sequence[int]) -> Steps:
    """The steps that make a shape and train it against the teacher, one training after the other.

    Args:
        shape: none are needed where it is the whole model.
        teacher: the step or the model that it is cut from.
        lengths: optimizer steps of each training.
    """
    steps: Steps = {}
    start, made = teacher, []
    if shape.vocab_size is not None:
        made.append(f"trimmed-{shape.vocab_size}")
        steps[made[-1]] = {"run": "trim_vocabulary", "model": start, "vocab_size": shape.vocab_size}
        start = made[-1]
    if shape.intermediate_size is not None:
        name = "-".join([*made, f"pruned-{shape.intermediate_size}"])
        steps[name] = {"run": "prune", "model": start, "intermediate_size": shape.intermediate_size}
        start = name
    if shape.is_whole:
        return steps
    for number, length in enumerate(lengths, start=1):
        options: dict[str, Any] = {"run": "distill", "teacher": teacher, "max_steps": length}
        if start != teacher:
            options["model"] = start
        if number == 1 and shape.num_layers is not None:
            options["num_layers"] = shape.num_layers
        start = trained_name(shape, number)
        steps[start] = options
    return steps


def trained_name(shape: Shape, trainings: int) -> str:
    """The step of a shape's last training, of so many."""
    return shape.name if trainings == 1 else f"{shape.name}-{trainings}"


def final_step(candidate: Candidate, teacher: str, trainings: int) -> tuple[str, Steps]:
    """The step whose model a candidate is, and the steps that are to be added to those of its shape.

    Args:
        candidate: of a shape that was trained.
        teacher: the step or the model that the shape is cut from.
        trainings: how many the shape has had.
    """
    trained = teacher if candidate.shape.is_whole else trained_name(candidate.shape, trainings)
    step = FORMATS[candidate.format]
    if step is None:
        return trained, {}
    return candidate.name, {candidate.name: {**step, "model": trained}}


# --- which of them are tried ----------------------------------------------------------------------------------------


def fitting(footprints: Mapping[str, Footprint], limits: Mapping[str, float], margin: float) -> list[str]:
    """The candidates within the limits, by their names.

    Args:
        footprints: by name.
        limits: `max_mb`, `max_ms`.
        margin: share of `max_ms` that is left for the clock, which tells another time each time.
    """
    return [name for name, each in footprints.items() if _excess(each, limits, margin) <= 1]


def nearest_miss(footprints: Mapping[str, Footprint], limits: Mapping[str, float], margin: float) -> str:
    """The candidate that exceeds its limits by the smallest factor."""
    return min(footprints, key=lambda name: _excess(footprints[name], limits, margin))


def _excess(footprint: Footprint, limits: Mapping[str, float], margin: float) -> float:
    """What a model takes as a share of the limit that it is worst at; 0 without limits."""
    shares = [footprint.mb / limits["max_mb"]] if "max_mb" in limits else []
    if "max_ms" in limits:
        shares.append((footprint.ms or math.inf) / (limits["max_ms"] * (1 - margin)))
    return max(shares, default=0.0)


def promising(shapes: Sequence[Shape], cheapest: Mapping[Shape, Footprint], most: int) -> list[Shape]:
    """Choose the shapes that are trained: none that another one equals in every size at less cost, spread over cost.

    Args:
        shapes: that fit, the whole model aside.
        cheapest: of each what it takes in the format that takes least.
        most: how many are chosen.

    Returns:
        The costliest first, which has most left of the model.
    """
    sizes = [
        [-(size or math.inf) for size in (shape.num_layers, shape.intermediate_size, shape.vocab_size)]
        for shape in shapes
    ]
    points = [[*size, cheapest[shape].ms or 0.0, cheapest[shape].mb] for size, shape in zip(sizes, shapes, strict=True)]
    front = [shape for shape, others in zip(shapes, dominating(points), strict=True) if not others]
    front.sort(key=lambda shape: cost(cheapest[shape]), reverse=True)
    return spread(front, most)


def spread(items: Sequence[Each], most: int) -> list[Each]:
    """At most so many items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[0]]
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def cost(footprint: Footprint) -> tuple[float, float]:
    """What is compared to find the cheapest: milliseconds to two digits, since a clock tells no more, then bytes."""
    return float(f"{footprint.ms or 0.0:.2g}"), footprint.mb
