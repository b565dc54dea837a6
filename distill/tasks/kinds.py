"""The kinds of task by name, and what is found through them: a model's targets, a user's task, code for a card."""

from copy import copy
from string import Template

from transformers import PretrainedConfig, PreTrainedModel

from distill.errors import InputError
from distill.tasks.base import Kind, Task, TaskKind
from distill.tasks.classification import CLASSIFICATION, MULTI_LABEL, REGRESSION
from distill.tasks.image_classification import IMAGE_CLASSIFICATION
from distill.tasks.language_modeling import CAUSAL_LM, MASKED_LM
from distill.tasks.outputs import plain_model
from distill.tasks.question_answering import QUESTION_ANSWERING
from distill.tasks.targets import Targets
from distill.tasks.token_classification import TOKEN_CLASSIFICATION

KINDS: dict[TaskKind, Kind] = {
    "classification": CLASSIFICATION,
    "multi-label": MULTI_LABEL,
    "regression": REGRESSION,
    "token-classification": TOKEN_CLASSIFICATION,
    "question-answering": QUESTION_ANSWERING,
    "masked-lm": MASKED_LM,
    "causal-lm": CAUSAL_LM,
    "image-classification": IMAGE_CLASSIFICATION,
}
"""In the order in which they are told."""

_TEXT, _PAIR = '"The plot is thin, but the cast was great."', '{"text": "A man is asleep.", "text_pair": "He sleeps."}'
_TUPLE = '("A man is asleep.", "He sleeps.")'


def targets_of(model: PreTrainedModel) -> Targets:
    """Find what a model predicts, by its class and config.

    Raises:
        InputError: another class, a problem type that no kind has, or a regression with several outputs.
    """
    name, config = type(plain_model(model)).__name__, model.config
    of_class = [kind.targets for kind in KINDS.values() if name.endswith(kind.architectures)]
    if not of_class:
        endings = dict.fromkeys(ending for kind in KINDS.values() for ending in kind.architectures)
        known = ", ".join(f"…{ending}" for ending in endings)
        raise InputError(f"{name}: not a class that can be distilled; these can: {known}")
    found = next((targets for targets in of_class if targets.fits(config)), None)
    if found is None:
        raise InputError(f"{name}: its problem_type, {config.problem_type!r}, is not one that can be distilled")
    if found.one_output and config.num_labels > 1:
        raise InputError(f"{name}: a {found.name} with {config.num_labels} outputs; one is supported")
    return found


def kind_of(config: PretrainedConfig, reference: str, given: TaskKind | None = None) -> TaskKind:
    """Find what kind of task a model was made for, by the class and the problem type that its config names.

    Args:
        config: of the model.
        reference: of the model, for messages.
        given: the kind that a user or a record names. It is taken unless the config contradicts.

    Raises:
        InputError: the config names no class with a head and no kind was given, or it names one of another kind.
    """
    named, names = config.problem_type, config.architectures or []
    known = {name: kind for name, kind in KINDS.items() if any(each.endswith(kind.architectures) for each in names)}
    found = [name for name, kind in known.items() if _fits(config, kind)]
    if given is None and found:
        return found[0]
    if given is None:
        raise InputError(
            f"{reference}: {' or '.join(names) or 'its config'} names no head that predicts "
            f"{', '.join(KINDS)}; give the folder of a model that was trained for one of these"
        )
    if given not in KINDS or not names or (not known and given in KINDS):
        return given  # told of when its options are checked, or its weights read
    as_given = copy(config)
    as_given.problem_type = named or KINDS[given].targets.problem_type
    if given not in known or not _fits(as_given, KINDS[given]):
        outputs = f", problem_type {named}" if named else ""
        made_for = f"; it was made for {found[0]}" if found else ""
        raise InputError(
            f"data.kind: {given} is not what {reference} predicts ({names[0]}{outputs}, {config.num_labels} "
            f"outputs){made_for}"
        )
    return given


def _fits(config: PretrainedConfig, kind: Kind) -> bool:
    return kind.targets.fits(config) and not (kind.targets.one_output and config.num_labels > 1)


def own_task(kind: TaskKind, text: tuple[str, ...], label: str) -> Task:
    """Make a task of a user's own columns; its label names are read from the data.

    Args:
        kind: of the task.
        text: names of the columns that the kind reads.
        label: name of the label column; empty for kinds without labels.
    """
    its = KINDS[kind]
    return Task("own", kind, text, label, metrics=its.metrics, primary_metric=its.primary_metric)


def usage_code(kind: TaskKind, model: str, *, pairs: bool, needs_import: bool) -> str:
    """Write the Python code that loads a model and prints a prediction.

    Args:
        kind: of the task.
        model: what `from_pretrained` is given.
        pairs: whether the model reads two texts.
        needs_import: whether it has modules that `import distill` registers.
    """
    code = Template(KINDS[kind].usage).safe_substitute(model=model, example=_PAIR if pairs else _TEXT)
    return f"import distill  # registers its format\n{code}" if needs_import else code


def engine_code(kind: TaskKind, *, pairs: bool, mask: str) -> tuple[str, str] | None:
    """Write the Python code of the rows that an export predicts for, and the lines that print what it predicts.

    Args:
        kind: of the task.
        pairs: whether the model reads two texts.
        mask: the tokenizer's mask, of those that have one.

    Returns:
        None for a kind whose inputs transformers makes.
    """
    its = KINDS[kind].engine_usage
    if its is None:
        return None
    values = {"example": _TUPLE if pairs else _TEXT, "mask": mask}
    return Template(its.rows).safe_substitute(values), Template(its.reading).safe_substitute(values)
