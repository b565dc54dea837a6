"""The verbs that a recipe's steps can run, by name."""

from typing import Any

from distill.verbs.base import Verb
from distill.verbs.distill import DISTILL
from distill.verbs.export import EXPORT
from distill.verbs.factorize import FACTORIZE
from distill.verbs.finetune import FINETUNE
from distill.verbs.prune import PRUNE
from distill.verbs.quantize import QUANTIZE
from distill.verbs.share import SHARE
from distill.verbs.trim_vocabulary import TRIM_VOCABULARY

VERBS: dict[str, Verb[Any, Any]] = {
    verb.name: verb for verb in (FINETUNE, DISTILL, TRIM_VOCABULARY, PRUNE, FACTORIZE, SHARE, QUANTIZE, EXPORT)
}
