"""What the losses compare: which layers of a model, read in one forward, projected where widths differ."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.common.private_names import unsplit_modules
from distill.errors import InputError
from distill.losses import mean_pool
from distill.models.modes import attention_of
from distill.models.packing import unpacked
from distill.models.structure import find_blocks, input_names, width_of
from distill.tasks.outputs import logits_of, plain_model

LayerMap = Literal["uniform", "last", "first"] | list[tuple[int, int]]


# Last names of the query, key and value projections inside a block; one name is a layer that holds all three.
_PROJECTION_NAMES: tuple[tuple[str, ...], ...] = (
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA, ALBERT, ViT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, ViT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2
    ("q", "k", "v"),  # MPNet
    ("Wqkv",),  # ModernBERT
    ("c_attn",),  # GPT-2
)


def resolve_layer_map(
    layer_map: LayerMap, num_student_layers: int, num_teacher_layers: int, *, name: str = "layer_map", lowest: int = 0
) -> list[tuple[int, int]]:
    """Pairs (student, teacher) of layers: n is the output of block n, 0 the embeddings, −1 the last block.

    `uniform` pairs student block m with teacher block m·T/S, the end of the m-th of S equal parts (TinyBERT,
    Jiao et al. 2020, section 4.1); `last` with block T−S+m; `first` with block m.

    Args:
        lowest: 0 where the embeddings can be matched, 1 where only blocks can (attention).

    Raises:
        InputError: a pair out of range, or a student that is deeper than its teacher for `last` and `first`.
    """
    if isinstance(layer_map, str):
        if layer_map != "uniform" and num_student_layers > num_teacher_layers:
            raise InputError(
                f"{name}: {layer_map} needs a teacher at least as deep as the student "
                f"({num_student_layers} layers against {num_teacher_layers}); say uniform, or name the pairs"
            )
        teacher_blocks = {
            "uniform": lambda block: max(1, round(block * num_teacher_layers / num_student_layers)),
            "last": lambda block: num_teacher_layers - num_student_layers + block,
            "first": lambda block: block,
        }[layer_map]
        return [(block, teacher_blocks(block)) for block in range(1, num_student_layers + 1)]
    depths = (num_student_layers, num_teacher_layers)
    pairs = [
        tuple(layer + depth + 1 if layer < 0 else layer for layer, depth in zip(pair, depths, strict=True))
        for pair in layer_map
    ]
    wrong = [
        list(given)
        for given, pair in zip(layer_map, pairs, strict=True)
        if not all(lowest <= layer <= depth for layer, depth in zip(pair, depths, strict=True))
    ]
    if wrong or not pairs:
        raise InputError(
            f"{name}: {wrong or 'no pair'} is out of range; pairs are [student {lowest} to {num_student_layers}, "
            f"teacher {lowest} to {num_teacher_layers}], {'0 the embeddings, ' if lowest == 0 else ''}−1 the last layer"
        )
    return [(student, teacher) for student, teacher in pairs]


def show_pairs(pairs: Sequence[tuple[int, int]]) -> str:
    """`1→2, 2→4`."""
    return ", ".join(f"{student}→{teacher}" for student, teacher in pairs)


@dataclass(frozen=True)
class FeatureSpec:
    """Which of a model's representations to read; layers are numbered as in a layer map."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    relations: tuple[int, ...] = ()
    embedding: bool = False
    pooled: bool = False

    @property
    def hidden_states(self) -> bool:
        """Whether the model must return its hidden states."""
        return bool(self.hidden) or self.embedding or self.pooled


@dataclass
class Representations:
    """One forward's representations, in the order of `FeatureSpec`."""

    hidden: list[Tensor] = field(default_factory=list)
    """Each B×T×D."""
    attention: list[Tensor] = field(default_factory=list)
    """Each B×H×T×T probabilities."""
    relations: list[list[Tensor]] = field(default_factory=list)
    """Each the queries, keys and values of a block, B×T×D."""
    embedding: Tensor | None = None
    pooled: Tensor | None = None
    """B×D: the mean of the last hidden states."""

    def cloned(self) -> "Representations":
        """The same values in memory of their own."""
        return Representations(
            hidden=[state.clone() for state in self.hidden],
            attention=[state.clone() for state in self.attention],
            relations=[[state.clone() for state in states] for states in self.relations],
            embedding=None if self.embedding is None else self.embedding.clone(),
            pooled=None if self.pooled is None else self.pooled.clone(),
        )

    def at_tokens(self, places: Tensor) -> "Representations":
        """The same of other tokens of each row; what is pooled stays.

        Args:
            places: B×T, where each of the new tokens stands among these.
        """

        def moved(states: Tensor) -> Tensor:
            return states.take_along_dim(places.unsqueeze(-1), dim=1)

        rows, columns = places[:, None, :, None], places[:, None, None, :]
        return Representations(
            hidden=[moved(state) for state in self.hidden],
            attention=[maps.take_along_dim(rows, dim=2).take_along_dim(columns, dim=3) for maps in self.attention],
            relations=[[moved(state) for state in states] for states in self.relations],
            embedding=None if self.embedding is None else moved(self.embedding),
            pooled=self.pooled,
        )


def token_places(mask: Tensor, other_mask: Tensor) -> Tensor:
    """B×T: where the n-th token of each row stands in a batch that is padded otherwise; where there is none, any place.

    Args:
        mask: B×T of the batch that is asked about, 1 for tokens and 0 for padding; other_mask: B×T' of the other one.
    """
    tokens_first = other_mask.argsort(dim=1, descending=True, stable=True)
    number = (mask.cumsum(1) - 1).clamp(min=0, max=other_mask.shape[1] - 1)
    return tokens_first.gather(1, number)


def tokens_of_image(model: PreTrainedModel, wanted: Sequence["FeatureSpec"]) -> int:
    """Count the tokens that a vision transformer makes of an image; 1 for other models, and where none is compared.

    Args:
        model: runs once, on a blank image of its config's size.
        wanted: for each teacher what of the model is compared with it.
    """
    compared = any(each.hidden_states or each.relations for each in wanted)
    if not compared or "pixel_values" not in input_names(model):
        return 1
    size = model.config.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    pixels = torch.zeros(1, model.config.num_channels, *sides, device=model.device)
    with torch.inference_mode():
        return model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1].shape[1]


class FeatureExtractor:
    """Runs a model and reads representations from it.

    Queries, keys and values are caught by hooks, so they are there under every attention implementation; attention
    maps exist in eager attention alone, to which the model is switched while it is read (see `attached`).

    Raises:
        InputError: the model gives no attention maps, or its projections have names that are not known here.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, wanted: Sequence[FeatureSpec]):
        self.model = model
        self.wanted = wanted
        self._inputs = frozenset(input_names(model))
        self._needs_states = any(each.hidden_states for each in wanted)
        self._caught: dict[int, dict[str, Tensor]] | None = None
        self._names: tuple[str, ...] = ()
        self._attached = False
        self._needs_maps = any(each.attention for each in wanted)
        if self._needs_maps:
            try:
                with attention_of([model], "eager"):
                    pass
            except ValueError as error:
                raise InputError(
                    f"attention_weight: {type(model).__name__} has no eager attention ({error})"
                ) from error
        layers = sorted({layer for each in wanted for layer in each.relations})
        self._projections = self._find_projections(layers) if layers else []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model with hooks and in the attention that reading needs; a call does so by itself outside of this.

        Around a training it lets a backward that computes blocks again find the same attention.
        """
        if self._attached:
            yield
            return
        with ExitStack() as stack:
            if self._needs_maps:
                stack.enter_context(attention_of([self.model], "eager"))
            for layer, name, module in self._projections:
                stack.callback(module.register_forward_hook(self._catcher(layer, name)).remove)
            self._attached = True
            stack.callback(setattr, self, "_attached", False)
            yield

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Representations]]:
        """The logits, and what each of `wanted` names; of a batch's tensors the model gets those that it takes."""
        if self._attached:
            return self._read(inputs)
        with self.attached():
            return self._read(inputs)

    def _read(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Representations]]:
        self._caught = {}
        try:
            outputs = self.model(
                **{name: value for name, value in inputs.items() if name in self._inputs},
                output_hidden_states=self._needs_states,
                output_attentions=self._needs_maps,
            )
        finally:
            caught, self._caught = self._caught, None
        return logits_of(outputs), [self._pick(each, outputs, inputs, caught) for each in self.wanted]

    def _pick(self, wanted: FeatureSpec, outputs: Any, inputs: Mapping[str, Tensor], caught: dict) -> Representations:
        hidden: Sequence[Tensor] = outputs.hidden_states if wanted.hidden_states else []
        attentions: Sequence[Tensor] = outputs.attentions if wanted.attention else []
        for kind, found, layers in (
            ("hidden states", hidden, wanted.hidden),
            ("attention", attentions, wanted.attention),
        ):
            if layers and (not found or len(found) < max(layers)):
                raise InputError(f"{type(self.model).__name__} returned no {kind} of layer {max(layers)}")
        mask = inputs["attention_mask"]
        return Representations(
            hidden=[_padded(hidden[layer], mask) for layer in wanted.hidden],
            attention=[attentions[layer - 1] for layer in wanted.attention],
            relations=[self._projected(caught, layer, mask) for layer in wanted.relations],
            embedding=_padded(hidden[0], mask) if wanted.embedding else None,
            pooled=mean_pool(_padded(hidden[-1], mask), mask) if wanted.pooled else None,
        )

    def _projected(self, caught: dict[int, dict[str, Tensor]], layer: int, mask: Tensor) -> list[Tensor]:
        states = [_padded(caught[layer][name], mask) for name in self._names]
        if len(states) == 1:
            return list(states[0].chunk(3, dim=-1))
        heads = self.model.config.num_attention_heads if states[1].shape != states[0].shape else 1
        return [_for_every_query(state, states[0].shape[-1], heads) for state in states]

    def _find_projections(self, layers: list[int]) -> list[tuple[int, str, nn.Module]]:
        """The modules that compute the queries, keys and values of these layers, with their layer and name."""
        _, blocks = find_blocks(self.model)
        found = []
        for layer in layers:
            inside = {name.rpartition(".")[2]: module for name, module in blocks[layer - 1].named_modules()}
            names = next((names for names in _PROJECTION_NAMES if all(name in inside for name in names)), None)
            if names is None:
                raise InputError(
                    f"relation_weight: the query, key and value layers of {type(self.model).__name__} have names that "
                    "are not known; set relation_weight: 0"
                )
            self._names = names
            found += [(layer, name, inside[name]) for name in names]
        return found

    def _catcher(self, layer: int, name: str) -> Any:
        def catch(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            if self._caught is not None:
                # DeBERTa's layers run a second time, over relative positions.
                self._caught.setdefault(layer, {}).setdefault(name, output)

        return catch


def _padded(states: Tensor, mask: Tensor) -> Tensor:
    """States as B×T×D, where they are packed or not."""
    return states if states.shape[:2] == mask.shape else unpacked(states, mask)


def _for_every_query(state: Tensor, width: int, heads: int) -> Tensor:
    """Keys or values B×T×D' that several query heads share (Ainslie et al. 2023), as each of these sees them."""
    shared_by = width // state.shape[-1]
    if shared_by == 1:
        return state
    return state.unflatten(-1, (heads // shared_by, -1)).repeat_interleave(shared_by, dim=-2).flatten(-2)


class ProjectedStudent(nn.Module):
    """A student, and a linear projection for each representation whose width differs from a teacher's.

    One module with one forward, so that projections are synchronised under DDP, clipped and saved in checkpoints. It
    returns exactly what the losses use, so that DDP sees which parameters get no gradient.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        wanted: Sequence[FeatureSpec],
        teacher_widths: Sequence[int],
        *,
        uses_logits: bool,
    ):
        super().__init__()
        self.student = student
        self.config = student.config
        self.extractor = FeatureExtractor(student, wanted)
        self._uses_logits = uses_logits
        known = {type(module).__name__ for module in student.modules()}
        self._no_split_modules = sorted(known & unsplit_modules(student))  # where FSDP cuts
        self.projections = nn.ModuleDict()
        width = width_of(student.config)
        for teacher, (each, teacher_width) in enumerate(zip(wanted, teacher_widths, strict=True)):
            names = [f"{teacher}_hidden_{layer}" for layer in each.hidden]
            names += [f"{teacher}_embedding"] * each.embedding + [f"{teacher}_pooled"] * each.pooled
            for name in names if teacher_width != width else ():
                self.projections[name] = nn.Linear(width, teacher_width, bias=False)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """The student's; Trainer asks for it, by the second name before transformers 5.20."""
        known = getattr(self.student, "activation_checkpointing_enable", self.student.gradient_checkpointing_enable)
        known(**options)

    gradient_checkpointing_enable = activation_checkpointing_enable

    def get_input_embeddings(self) -> nn.Module:
        """The student's, adapters or not; Trainer's NEFTune asks for them."""
        return plain_model(self.student).get_input_embeddings()

    def forward(self, **batch: Tensor) -> dict[str, Any]:
        """`logits` B×C, and `representations`, one for each teacher."""
        logits, read = self.extractor(batch)
        for teacher, (wanted, found) in enumerate(zip(self.extractor.wanted, read, strict=True)):
            found.hidden = [
                self._project(f"{teacher}_hidden_{layer}", hidden)
                for layer, hidden in zip(wanted.hidden, found.hidden, strict=True)
            ]
            if found.embedding is not None:
                found.embedding = self._project(f"{teacher}_embedding", found.embedding)
            if found.pooled is not None:
                found.pooled = self._project(f"{teacher}_pooled", found.pooled)
        return {"logits": logits if self._uses_logits else logits.detach(), "representations": read}

    def _project(self, name: str, state: Tensor) -> Tensor:
        return self.projections[name](state) if name in self.projections else state
