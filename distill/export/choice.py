"""Which layers are quantized: all of them, or all but those that hurt most, until the float model is kept."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from distill.errors import InputError
from distill.tasks.targets import Targets


@dataclass(frozen=True)
class Closeness:
    """How close predictions are to the float model's."""

    agreement: float
    """Share that is the same; of values, the share of their variance that is kept."""
    divergence: float
    """Mean KL from the float model's in nats; of values, the mean squared difference."""


@dataclass(frozen=True)
class Limits:
    """How close they have to be."""

    agreement: float
    divergence: float
    """Of distributions; values are judged by their agreement alone."""
    values: bool = False

    def hold(self, closeness: Closeness) -> bool:
        """Whether predictions are as close as that."""
        near = self.values or closeness.divergence <= self.divergence
        return near and closeness.agreement >= self.agreement


def closeness(targets: Targets, reference: NDArray, logits: NDArray) -> Closeness:
    """How close a model's predictions are to another's.

    Args:
        targets: what both predict.
        reference: logits N×C of the float model; logits alike.
    """
    divergence = float(np.mean(targets.divergences(reference, logits)))
    if targets.distributions is None:
        variance = float(np.var(reference))
        return Closeness(1.0 if divergence == 0 else 1 - divergence / max(variance, 1e-12), divergence)
    first, second = (targets.distributions(torch.from_numpy(each)).argmax(-1) for each in (reference, logits))
    return Closeness(float((first == second).float().mean()), divergence)


def choose_layers(
    layers: Collection[str], measure: Callable[[Collection[str]], Closeness], limits: Limits
) -> tuple[list[str], Closeness]:
    """The layers that are quantized, as many as the limits allow, and how close the model then is.

    Where all of them are too many, each is measured alone, and those with the largest divergence stay in float: the
    least number with which the limits hold.

    Args:
        measure: (layers that are quantized) → how close the model then is to itself in float.

    Raises:
        InputError: the limits don't hold with any.
    """
    chosen = list(layers)
    found = measure(chosen)
    if limits.hold(found):
        return chosen, found
    harm = {name: measure([name]).divergence for name in chosen}
    by_harm = sorted(chosen, key=lambda name: -harm[name])

    def without(count: int) -> list[str]:
        left_out = set(by_harm[:count])
        return [name for name in chosen if name not in left_out]

    low, high = 0, len(by_harm)  # too few in float, and enough
    best = measure(without(high))
    if not limits.hold(best):
        raise InputError(
            f"agreement: {limits.agreement:g} with a divergence of {limits.divergence:g} is not reached with any layer "
            f"quantized ({best.agreement:.4f}, {best.divergence:.2g} with all in float); say embeddings='same', or less"
        )
    while high - low > 1:
        middle = (low + high) // 2
        found = measure(without(middle))
        if limits.hold(found):
            high, best = middle, found
        else:
            low = middle
    return without(high), best
