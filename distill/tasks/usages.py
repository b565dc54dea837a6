"""How models of each kind of task are used: the Hub's name of the kind, and Python that runs one."""

from dataclasses import dataclass
from string import Template


@dataclass(frozen=True)
class Usage:
    """How models of one kind of task are used."""

    pipeline_tag: str
    """The Hub's name of the kind."""
    code: str
    """Python that prints a prediction of `$model`, for `string.Template`."""


def _pipeline(tag: str, example: str, more: str = "") -> Usage:
    code = (
        f'from transformers import pipeline\n\npredict = pipeline("{tag}", "$model"{more})\nprint(predict({example}))'
    )
    return Usage(tag, code)


# transformers 5 has no pipeline that answers questions.
_ANSWER = """from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$model")
model = AutoModelForQuestionAnswering.from_pretrained("$model").eval()
inputs = tokenizer("Where do bees live?", "Bees live in hives.", truncation="only_second", return_tensors="pt")
outputs = model(**inputs)
start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))"""

_TEXT, _PAIR = '"The plot is thin, but the cast was great."', '{"text": "A man is asleep.", "text_pair": "He sleeps."}'

USAGES: dict[str, Usage] = {
    "classification": _pipeline("text-classification", "$example, truncation=True"),
    "multi-label": _pipeline("text-classification", "$example, truncation=True, top_k=None"),
    "regression": _pipeline("text-classification", '$example, truncation=True, function_to_apply="none"'),
    "token-classification": _pipeline("token-classification", _TEXT, ', aggregation_strategy="first"'),
    "question-answering": Usage("question-answering", _ANSWER),
    "masked-lm": _pipeline("fill-mask", 'f"The cast was {predict.tokenizer.mask_token}."'),
    "causal-lm": _pipeline("text-generation", '"The plot", max_new_tokens=20'),
    "image-classification": _pipeline("image-classification", '"photo.jpg"'),
}


def usage_code(kind: str, model: str, *, pairs: bool, quantized: bool) -> str:
    """Python that loads a model and prints a prediction.

    Args:
        kind: of the task.
        model: what `from_pretrained` is given.
        pairs: whether the model reads two texts.
        quantized: whether it has a format that `import distill` registers.
    """
    code = Template(USAGES[kind].code).safe_substitute(model=model, example=_PAIR if pairs else _TEXT)
    return f"import distill  # registers the quantized format\n{code}" if quantized else code
