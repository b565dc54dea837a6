"""Names of transformers and accelerate that are private to them, and that nothing public stands for.

A release may drop or rename them without a word, so they are touched nowhere else, a test asks the installed release
for each, and pyproject.toml allows no release that the tests have not seen.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # whoever only counts processes need not wait for these
    from accelerate import Accelerator
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_PREPARED = "_is_accelerate_prepared"
_PREPARED_FORWARD = ("forward", "_original_forward", _PREPARED)


def forget_prepared(model: "nn.Module", accelerator: "Accelerator") -> None:
    """Let Accelerate prepare a model anew, as if it never had.

    Args:
        model: stays as it is, but for Accelerate's mark on it.
        accelerator: forgets every model that it prepared.
    """
    setattr(model, _PREPARED, False)
    accelerator._models.clear()


def take_prepared_forward(model: "nn.Module") -> dict[str, Any]:
    """Remove from a model the forward that Accelerate has put around its own, and its marks; give what was removed."""
    return {name: vars(model).pop(name) for name in _PREPARED_FORWARD if name in vars(model)}


def put_forward(model: "nn.Module", prepared: dict[str, Any]) -> None:
    """Put back the forward that Accelerate had put around a model's own, and its marks.

    Args:
        model: from which `take_prepared_forward` removed them.
        prepared: what it gave.
    """
    vars(model).update(prepared)


def reset_accelerator_state() -> None:
    """Forget the precision that Accelerate keeps for the process, so that the next Accelerator chooses its own."""
    from accelerate.state import AcceleratorState  # only where it is needed

    AcceleratorState._reset_state()


def shared_precision() -> str | None:
    """The precision that Accelerate keeps for the process; None where no Accelerator has been made."""
    from accelerate.state import AcceleratorState  # only where it is needed

    return AcceleratorState._shared_state.get("_mixed_precision")


def shared_states() -> list[dict[str, Any]]:
    """Accelerate's states of the process, the dictionaries themselves."""
    from accelerate.state import AcceleratorState, PartialState  # only where it is needed

    return [PartialState._shared_state, AcceleratorState._shared_state]


def attention_of_config(config: "PretrainedConfig") -> str:
    """The way a model's attention is computed: `eager`, `sdpa` and so on."""
    return config._attn_implementation


def set_attention_of_config(config: "PretrainedConfig", implementation: str) -> None:
    """Set how a model made from this config computes its attention.

    Args:
        config: is changed.
        implementation: `eager`, `sdpa` and so on.
    """
    config._attn_implementation = implementation


def model_from_config(model_class: "type[PreTrainedModel]", config: "PretrainedConfig") -> "PreTrainedModel":
    """A model with drawn weights, in the config's dtype and attention."""
    return model_class._from_config(config)


def draw_weights(model: "PreTrainedModel", module: "nn.Module") -> None:
    """Draw a module's weights anew, from torch's global generator, as the model's family draws them.

    Args:
        model: one of the family.
        module: inside of the model; modules within it are drawn anew too.
    """
    module.apply(model._init_weights)


def unsplit_modules(model: "PreTrainedModel") -> set[str]:
    """Names of the classes of modules that must stay on one device: where FSDP cuts."""
    return set(model._no_split_modules or ())


def class_of_config(auto_class: Any, config: "PretrainedConfig") -> "type[PreTrainedModel] | None":
    """The class that an auto class makes of a config; None where it knows none.

    Args:
        auto_class: `AutoModelForSequenceClassification` or another of transformers' auto classes.
        config: only its type matters.
    """
    mapping = auto_class._model_mapping
    return mapping.get(type(config), None)


def finish_loading(model: "PreTrainedModel") -> "PreTrainedModel":
    """A quantized model, after its weights have come, as its quantizer leaves it."""
    return model.hf_quantizer._process_model_after_weight_loading(model)


def untie(model: "PreTrainedModel", weight: str) -> None:
    """Leave a weight out of those that transformers ties to another.

    Args:
        model: is changed.
        weight: the weight's full name, of an output layer for example (`lm_head.weight`).
    """
    model.all_tied_weights_keys.pop(weight, None)
    model._tied_weights_keys = {
        tied: source for tied, source in (model._tied_weights_keys or {}).items() if tied != weight
    }


def sharding_config() -> Any:
    """A weak reference to DeepSpeed's config, by which transformers shards weights; None without."""
    from transformers.integrations import deepspeed

    return deepspeed._hf_deepspeed_config_weak_ref


def set_sharding_config(reference: Any) -> None:
    """Put back what `sharding_config` gave."""
    from transformers.integrations import deepspeed

    deepspeed._hf_deepspeed_config_weak_ref = reference
