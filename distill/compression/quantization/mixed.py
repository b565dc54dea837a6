"""Mixed precision: what each format costs in each module, measured, and the best formats within a budget of bytes."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.common.console import progress
from distill.common.serialized import json_text
from distill.compression.quantization.embeddings import QuantizedEmbedding
from distill.compression.quantization.formats import (
    EmbeddingFormat,
    QuantizationSettings,
    fixed_formats,
    model_size,
    module_size,
    quantizable_modules,
)
from distill.compression.quantization.layers import Int8Linear, dequantized
from distill.compression.quantization.modules import DTYPES
from distill.compression.quantization.quantize import quantized_module
from distill.errors import InputError
from distill.models.structure import accepted_inputs
from distill.tasks.kinds import targets_of
from distill.tasks.outputs import logits_of, refuse_not_finite_outputs
from distill.tasks.targets import Targets, logits_under_mask

_FORMATS = ("none", "int8", "nf4")
_LARGEST_COST, _LARGEST_SIZE = 1e6, 1e4  # for the solver, whose absolute tolerances are 1e-6
_TOKENS = 1000  # a language model's logits of all tokens would not fit into memory
_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Sensitivity:
    """One module in one format, everything else unquantized."""

    module: str
    format: str
    """`none`: as the rest of the model, in its dtype."""
    size: int
    """Bytes of its weights."""
    divergence: float
    """From the unquantized model's predictions, as `divergence` has it."""


@dataclass(frozen=True)
class Mix:
    """A format for every quantizable module, `none` among them."""

    name: str
    formats: dict[str, str]
    size: int
    """Bytes of all the model's weights."""
    divergence: float
    """Of all modules together in these formats."""


def choose_mix(
    model: PreTrainedModel,
    settings: QuantizationSettings,
    budget: int,
    *,
    predict: Callable[[PreTrainedModel], np.ndarray],
    targets: Targets,
) -> tuple[list[Mix], list[Sensitivity]]:
    """The formats with the least divergence whose bytes stay within a budget.

    Measures every module alone in every format that the settings leave open; adds these up, as if modules erred
    independently, to pick the best mix; measures that mix as a whole, and the same for every uniform choice within
    the budget.

    Args:
        model: a float32 model, the same afterwards.
        budget: most bytes of all its weights.
        predict: the model's logits on the calibration rows.

    Returns:
        Mixes, the one of least measured divergence first; and what was measured of single modules.

    Raises:
        InputError: as `check_budget`.
    """
    check_budget(model, settings, budget)
    modules, allowed = quantizable_modules(model), allowed_formats(model, settings)
    reference = predict(model)
    measured = []
    pairs = [(name, format) for name, formats in allowed.items() for format in formats]
    for name, format in progress(pairs, "Measuring what formats cost"):
        with _in_format(model, name, format, settings):
            found = divergence(targets, reference, predict(model))
        measured.append(Sensitivity(name, format, module_size(modules[name], format, settings), found))
    rest = model_size(model, dict.fromkeys(modules, "none"), settings)
    rest -= sum(module_size(module, "none", settings) for module in modules.values())
    candidates = {"mixed": best_formats(measured, budget - rest)} | _uniform(modules, allowed)
    mixes = []
    for name, formats in candidates.items():
        size = model_size(model, formats, settings)
        if size <= budget:
            with contextlib.ExitStack() as stack:
                for module, format in formats.items():
                    stack.enter_context(_in_format(model, module, format, settings))
                mixes.append(Mix(name, formats, size, divergence(targets, reference, predict(model))))
    return sorted(mixes, key=lambda mix: mix.divergence), measured


def best_formats(measured: list[Sensitivity], budget: int) -> dict[str, str]:
    """One format per module with the least sum of divergences: the multiple-choice knapsack, as an integer programme.

    Of a module's formats that diverge equally, the one measured first that fits; later modules choose first. Every
    module has its smallest format if nothing fits.

    Args:
        budget: most bytes of these modules; at least what their smallest formats take.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    by_module: dict[str, list[Sensitivity]] = {}
    for each in measured:
        by_module.setdefault(each.module, []).append(each)
    options = [choice for choices in by_module.values() for choice in choices]
    one_each = np.array([[choice.module == name for choice in options] for name in by_module], dtype=float)
    costs = np.array([choice.divergence for choice in options])
    usable = np.isfinite(costs)
    scale = max(costs[usable].max(initial=0), np.finfo(np.float32).tiny) / _LARGEST_COST
    unit = max(choice.size for choice in options) / _LARGEST_SIZE
    solution = milp(
        np.where(usable, costs, 0) / scale,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, usable.astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.array([[choice.size / unit for choice in options]]), ub=budget / unit),
        ],
        options={"mip_rel_gap": 0, "presolve": False},  # putting presolve's answer back, HiGHS prints if it must round
    )
    if solution.x is None:
        return {name: min(choices, key=_size).format for name, choices in by_module.items()}
    chosen = {choice.module: choice for choice, part in zip(options, solution.x, strict=True) if part > 0.5}
    equal = {
        name: [choice for choice in choices if choice.divergence <= chosen[name].divergence]
        for name, choices in by_module.items()
    }
    left = budget - sum(min(map(_size, choices)) for choices in equal.values())
    for name, choices in reversed(equal.items()):
        left += min(map(_size, choices))
        chosen[name] = next((choice for choice in choices if choice.size <= left), min(choices, key=_size))
        left -= chosen[name].size
    return {name: chosen[name].format for name in by_module}


def calibration_logits(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> np.ndarray:
    """The logits of every prediction that counts, N×C; of a language model's tokens about 1,000, evenly spread.

    Args:
        batches: a model's inputs without labels, on any device.
    """
    targets, device = targets_of(model), model.device
    found: list[Tensor] = []
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches) if targets.over_vocabulary else 0
    with torch.inference_mode():
        for batch in batches:
            batch = {name: values.to(device) for name, values in batch.items()}
            logits = logits_of(model(**accepted_inputs(model, batch)))
            refuse_not_finite_outputs(logits, batch.get("attention_mask"), model.name_or_path or type(model).__name__)
            of_batch = logits_under_mask(targets, batch, logits)
            found.append(of_batch[:: 1 + tokens // _TOKENS].float().cpu())
    widest = max(each.shape[-1] for each in found)  # spans are as wide as their batch
    return torch.cat([F.pad(each, (0, widest - each.shape[-1]), value=-1e4) for each in found]).numpy()


def divergence(targets: Targets, reference: np.ndarray, logits: np.ndarray) -> float:
    """The mean over predictions of `Targets.divergences`.

    Args:
        reference: logits N×C; logits alike.
    """
    return float(targets.divergences(reference, logits).mean())


def allowed_formats(model: PreTrainedModel, settings: QuantizationSettings) -> dict[str, tuple[str, ...]]:
    """For every quantizable module the formats that the settings leave open.

    Args:
        model: a float model, possibly on meta.
        settings: of which `overrides`, `skip` and `embeddings` count; `format` does not.

    Raises:
        InputError: a pattern that matches nothing, or fp4 for an embedding.
    """
    fixed = fixed_formats(model, settings)
    allowed: dict[str, tuple[str, ...]] = {}
    for name, module in quantizable_modules(model).items():
        allowed[name] = (fixed[name],) if name in fixed else _FORMATS
        if name not in fixed and settings.embeddings and isinstance(module, nn.Embedding):
            allowed[name] = (settings.embeddings,)
    return allowed


def budget_in_bytes(budget: float | str, model: PreTrainedModel, settings: QuantizationSettings) -> int:
    """A budget as bytes of all the model's weights.

    Args:
        budget: bits per quantizable weight on average (their scales counted), or bytes like 15.3MB.
    """
    if isinstance(budget, str):
        return size_in_bytes(budget)
    modules = quantizable_modules(model)
    weights = sum(module.weight.numel() for module in modules.values())
    unquantized = sum(module_size(module, "none", settings) for module in modules.values())
    rest = model_size(model, dict.fromkeys(modules, "none"), settings) - unquantized
    return rest + int(budget * weights / 8)


def size_in_bytes(size: str) -> int:
    """Bytes, from a number with its unit like 15.3MB."""
    return int(float(size[:-2]) * _UNITS[size[-2:]])


def check_budget(model: PreTrainedModel, settings: QuantizationSettings, budget: int) -> int:
    """Refuse a budget that can't be kept, or that needs no choice; return bytes that a model within it will have.

    These are right to 1 % unless the model's modules are few and large.

    Args:
        model: a float model, possibly on meta.
        budget: most bytes of all its weights.

    Raises:
        InputError: the budget is less than the smallest formats take, or has room for all weights in the rest's dtype;
            or a pattern matches nothing.
    """
    modules, allowed = quantizable_modules(model), allowed_formats(model, settings)

    def size(choose: Callable[..., str]) -> int:
        formats = {
            name: choose(allowed[name], key=functools.partial(module_size, modules[name], settings=settings))
            for name in modules
        }
        return model_size(model, formats, settings)

    if budget < size(min):
        raise InputError(
            f"bits_budget: {budget / 1e6:.2f} MB are too few; in the smallest formats the weights take "
            f"{size(min) / 1e6:.2f} MB"
        )
    if budget >= size(max) and all("none" in formats for formats in allowed.values()):
        raise InputError(
            f"bits_budget: {budget / 1e6:.2f} MB leave room for every weight in {settings.rest_dtype} "
            f"({size(max) / 1e6:.2f} MB); say format: bf16, or a smaller budget"
        )
    return min(budget, size(max))


def write_sensitivity(folder: Path, budget: int, mixes: list[Mix], measured: list[Sensitivity]) -> None:
    """Leave what was measured and chosen in a run folder: `sensitivity.json`, and a plot of it.

    Args:
        folder: the run folder.
        budget: most bytes of all the model's weights.
        mixes: as `choose_mix` gives them, the chosen one first.
        measured: of single modules, as `choose_mix` gives it.
    """
    content = {
        "budget_bytes": budget,
        "chosen": mixes[0].name,
        "mixes": [asdict(mix) for mix in mixes],
        "modules": [asdict(each) | {"chosen": mixes[0].formats[each.module] == each.format} for each in measured],
    }
    (folder / "sensitivity.json").write_text(json_text(content) + "\n", encoding="utf-8")
    _draw(mixes[0], measured, folder / "sensitivity.png")


def _draw(mix: Mix, measured: list[Sensitivity], path: Path) -> None:
    """A row per module, its divergence in each format, the chosen one filled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(mix.formats)
    figure, axis = pyplot.subplots(figsize=(9, 1.2 + 0.22 * len(names)), layout="constrained")
    smallest = min((each.divergence for each in measured if each.divergence > 0), default=1e-9)
    for color, format in zip(("C7", "C0", "C1", "C2"), (*_FORMATS, "fp4"), strict=True):
        of_format = [each for each in measured if each.format == format]
        axis.scatter(
            [max(each.divergence, smallest) for each in of_format],
            [names.index(each.module) for each in of_format],
            s=[70 if mix.formats[each.module] == format else 14 for each in of_format],
            color=color,
            label=f"{format} (large: chosen)" if of_format else None,
        )
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("divergence from the unquantized model, this module alone quantized")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=4, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _size(choice: Sensitivity) -> int:
    return choice.size


def _uniform(modules: Mapping[str, nn.Module], allowed: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, str]]:
    """Every mix of one format for all linear layers and one for all embeddings, where the settings leave it open."""
    mixes = {}
    for of_linears in ("int8", "nf4"):
        for of_embeddings in get_args(EmbeddingFormat):
            wanted = {n: of_embeddings if isinstance(m, nn.Embedding) else of_linears for n, m in modules.items()}
            formats = {n: format if format in allowed[n] else allowed[n][0] for n, format in wanted.items()}
            mixes[f"{of_linears}, embeddings {of_embeddings}"] = formats
    return mixes


@contextlib.contextmanager
def _in_format(model: PreTrainedModel, name: str, format: str, settings: QuantizationSettings) -> Iterator[None]:
    """The model with one module's weights as a format leaves them; int8 layers also round their inputs."""
    module: Any = model.get_submodule(name)
    before = module.weight.data
    if format == "none":
        module.weight.data = before.to(DTYPES[settings.rest_dtype]).to(before.dtype)
    else:
        quantized: Any = quantized_module(module, format, settings, before.dtype)  # type: ignore[arg-type]
        if isinstance(quantized, Int8Linear):
            model.set_submodule(name, quantized.train(module.training))
        else:
            weight = quantized.dense() if isinstance(quantized, QuantizedEmbedding) else dequantized(quantized)
            module.weight.data = (weight.T if isinstance(module, Conv1D) else weight).to(before.dtype)
    try:
        yield
    finally:
        module.weight.data = before
        model.set_submodule(name, module)
