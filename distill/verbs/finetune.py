"""The verb `finetune`: train a model on labels alone."""

from pathlib import Path

import transformers

from distill.data.load import Data
from distill.models.load import load_for_finetuning
from distill.verbs.base import StepResult, Verb
from distill.verbs.options import FinetuneOptions
from distill.verbs.training import cut_student, train


def finetune(
    options: FinetuneOptions, inputs: dict[str, str], data: Data, folder: Path, *, profile: bool = False
) -> StepResult:
    """Train `inputs["model"]`, or a student cut from it, on the labels."""
    transformers.set_seed(options.seed)  # a new head is drawn here
    model = load_for_finetuning(inputs["model"], data.task, from_scratch=options.from_scratch)
    return train(cut_student(model, options), [], options, data, inputs["model"], folder, profile)


FINETUNE = Verb(name="finetune", options=FinetuneOptions, run=finetune)
