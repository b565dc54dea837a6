"""Replace matrices of a model by products of two smaller ones: truncated SVD that knows what inputs look like."""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from distill.common.console import progress
from distill.compression.factorization.ranks import choices_of, spread
from distill.compression.factorization.settings import (
    FactorizationSettings,
    Ranks,
    bytes_beside,
    factorizable_modules,
    planned_ranks,
)
from distill.compression.factorization.spectra import Method, factors_at, matrix_of, measurements, spectrum_of
from distill.compression.quantization.mixed import size_in_bytes
from distill.errors import InputError
from distill.models.adapters import has_adapters, merged_copy
from distill.models.modules import factors_of
from distill.models.replacements import Factorized, restructure
from distill.models.weights import refuse_not_finite

logger = logging.getLogger(__name__)


def factorize_model(
    model: PreTrainedModel | PeftModel,
    batches: Sequence[Mapping[str, Tensor]] = (),
    *,
    modules: Literal["embeddings", "linear", "all"] | list[str] | None = None,
    rank: int | dict[str, int] | None = None,
    energy: float | None = None,
    size: str | None = None,
    method: Method = "activation",
) -> PreTrainedModel:
    """Replace matrices of a model by products of two, in place, and return it, ready for `save_pretrained`.

    The folder loads after `import distill`; it trains, quantizes and takes adapters as any other.

    Args:
        model: a float model; of one with adapters a copy in which they are merged is factorized.
        batches: calibration rows: the model's inputs, without labels; only `svd` needs none.
        modules: the word `embeddings` (by default), the `linear` layers of the blocks, `all`, or patterns of names.
        rank: of every factor, or by full name of the module.
        energy: instead, the share of a matrix that is kept on average.
        size: instead, most bytes of the file in float32, such as `8MB`.
        method: `activation` keeps the outputs of layers (Chen et al. 2021), `fisher` the rows of weights that
            predictions depend on (Hsu et al. 2022), `svd` the weights.

    Raises:
        InputError: a model that can't be factorized, a setting that is wrong, or ranks that make nothing smaller.
    """
    settings = FactorizationSettings(modules=modules, rank=rank, energy=energy, size=size, method=method)
    if has_adapters(model):
        model = merged_copy(model)
    factorized, _ = factorize_with(model, batches, settings)
    return factorized


def factorize_with(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], settings: FactorizationSettings
) -> tuple[PreTrainedModel, Ranks]:
    """Factorize a model in place, and tell the rank of each module that is.

    These ranks, given as `rank`, make the same model.

    Args:
        model: a float model without adapters.
        batches: as for `factorize_model`.
        settings: what is chosen.

    Raises:
        InputError: as `factorize_model`.
    """
    planned = planned_ranks(model, settings)
    refuse_not_finite(model, "model")
    if settings.reads_rows and not batches:
        raise InputError("batches: there are none; give calibration rows, or method svd")
    names = factorizable_modules(model, settings) if planned is None else planned
    modules = {name: model.get_submodule(name) for name in names}
    measured = measurements(model, modules, batches, settings.method)
    spectra = {
        name: spectrum_of(module, measured.pop(name, None), settings.method)
        for name, module in progress(modules.items(), "Factorizing")
    }
    ranks = planned
    if ranks is None:
        choices = {name: choices_of(matrix_of(modules[name]).shape, each.energies) for name, each in spectra.items()}
        if settings.size is not None:
            chosen = spread(choices, budget=size_in_bytes(settings.size) - bytes_beside(model, list(modules)))
        else:
            chosen = spread(choices, energy=settings.energy or 1.0)
        ranks = {name: each for name, each in chosen.items() if each is not None}
    whole = [name for name in factorizable_modules(model, settings) if name not in ranks]
    if whole and planned is not None:
        logger.warning("%d modules stay whole, since their factors would be no smaller: %s", len(whole), whole[0])
    if not ranks:
        return model, ranks
    weights = {
        f"{name}.{key}": factor
        for name, rank in ranks.items()
        for key, factor in factors_at(modules[name], spectra[name], rank).items()
    }
    return restructure(model, {name: Factorized(rank) for name, rank in ranks.items()}, weights), ranks


def put_ranks(model: PreTrainedModel, ranks: Ranks) -> None:
    """Put empty factors into a model on meta and note them in its config: the shape of what `factorize_with` makes.

    Args:
        model: is changed.
        ranks: by full name of the module.
    """
    weights = {
        f"{name}.{key}": empty
        for name, rank in ranks.items()
        for key, empty in factors_of(model.get_submodule(name), rank).items()
    }
    restructure(model, {name: Factorized(rank) for name, rank in ranks.items()}, weights)
