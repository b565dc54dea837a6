"""What GPTQ, training or mixing formats won back of what a plain quantization costs."""

import math

from distill.common.records import Measurement, Recovery
from distill.evaluation.evaluate import Evaluation
from distill.evaluation.intervals import won_back
from distill.models.replacements import is_quantized
from distill.recipes.plan import Plan, PlannedStep
from distill.runs.run import lineage
from distill.verbs.all import VERBS

_SAME_SIZE = 0.1
"""Models within this share of another's bytes and parameters are as large; adapters of rank 8 add less than that."""


def find_recoveries(
    plan: Plan, evaluations: dict[str, Evaluation], benchmarks: dict[str, Measurement]
) -> list[Recovery]:
    """Measure what GPTQ, training or mixing formats won back of a plain quantization's divergence from the baseline.

    Each such model made from the baseline is held against the plainly quantized baseline that has as many parameters in
    as many bytes, adapters aside.
    """
    if plan.baseline not in evaluations:
        return []
    quantized = [
        name for name, planned in plan.steps.items() if name in evaluations and is_quantized(planned.plan.config)
    ]
    sizes = {name: benchmarks[name].size_on_disk_bytes or 0 for name in quantized}
    counts = {name: benchmarks[name].num_parameters for name in quantized}
    plain = [name for name in quantized if _is_plain(plan.steps[name], plan.baseline)]
    found = []
    for name in quantized:
        alike = [
            other
            for other in plain
            if math.isclose(sizes[other], sizes[name], rel_tol=_SAME_SIZE)
            and math.isclose(counts[other], counts[name], rel_tol=_SAME_SIZE)
        ]
        if name in plain or not alike or plan.baseline not in lineage(plan, plan.steps[name]):
            continue
        over = min(alike, key=lambda other: abs(sizes[other] - sizes[name]))
        logits = [evaluations[each].logits for each in (plan.baseline, over, name)]
        won = won_back(plan.data.task, *(each for each in logits if each is not None)) if all(logits) else None
        if won is not None:
            found.append(Recovery(name, over, won[0], list(won[1])))
    return found


def _is_plain(planned: PlannedStep, baseline: str) -> bool:
    """Whether a step does nothing but quantize the baseline to one format."""
    return planned.parents == (baseline,) and VERBS[planned.step.run].is_plain(planned.step.options)
