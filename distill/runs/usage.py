"""The code on the card of an export: an inference engine, tokenizers and numpy, or transformers' pipeline where those
don't make the inputs."""

from pathlib import Path

from distill.export.record import ExportRecord, read_export
from distill.models.load import load_processor
from distill.tasks.base import TaskKind
from distill.tasks.kinds import KINDS, engine_code, usage_code

_INPUTS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
"""For each input of a model what `tokenizers` calls it."""


def export_usage(folder: Path, kind: TaskKind, name: str, *, max_length: int, pairs: bool) -> str:
    """Write the Python code that loads an export and prints a prediction.

    Args:
        folder: of the export.
        kind: of its task.
        name: of a repository on the Hub, or of a folder.
        max_length: in tokens, where rows are cut.
        pairs: whether it reads two texts.
    """
    record, processor = read_export(folder), load_processor(str(folder), kind)
    code = engine_code(kind, pairs=pairs, mask=getattr(processor, "mask_token", None) or "")
    if code is None or not (folder / "tokenizer.json").is_file() or not set(record.inputs) <= _INPUTS.keys():
        return _by_pipeline(kind, name, pairs=pairs)
    rows, reading = code
    on_the_hub, names = "/" in name, "names[" in reading
    folder_code = f'Path(snapshot_download("{name}"))' if on_the_hub else f'Path("{name}")'
    imports = [
        *(["import json"] if names else []),
        "from pathlib import Path",
        "",
        "import numpy as np",
        f"import {record.engine}",
        *(["from huggingface_hub import snapshot_download  # comes with tokenizers"] if on_the_hub else []),
        "from tokenizers import Tokenizer",
    ]
    loading = [
        f"folder = {folder_code}",
        *(['names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]'] if names else []),
        'tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))',
        f"tokenizer.enable_truncation({max_length})",
        f'tokenizer.enable_padding(pad_id={processor.pad_token_id}, pad_token="{processor.pad_token}")',
        _load(record),
    ]
    arrays = [f'    "{name}": np.array([row.{_INPUTS[name]} for row in rows]),' for name in record.inputs]
    computing = [f"rows = tokenizer.encode_batch({rows})", "inputs = {", *arrays, "}", *_compute(record)]
    return "\n".join([*imports, "", *loading, "", *computing, reading])


def _load(record: ExportRecord) -> str:
    file = f'str(folder / "{record.file}")'
    if record.engine == "onnxruntime":
        return f'model = onnxruntime.InferenceSession({file}, providers=["CPUExecutionProvider"])'
    options = ', {"INFERENCE_PRECISION_HINT": "f32"}' if record.format == "fp32" else ""
    return f'model = openvino.Core().compile_model({file}, "CPU"{options})'


def _compute(record: ExportRecord) -> list[str]:
    """The lines that name every output as transformers does."""
    if record.engine == "onnxruntime":
        listed = ", ".join(f'"{name}"' for name in record.outputs)
        return [f"[{', '.join(record.outputs)}] = model.run([{listed}], inputs)"]
    return ["outputs = model(inputs)", *(f'{name} = outputs["{name}"]' for name in record.outputs)]


def _by_pipeline(kind: TaskKind, name: str, *, pairs: bool) -> str:
    """The kind's own code, its model loaded by `load_exported`."""
    of_images = KINDS[kind].reads == "images"
    made_by, option = ("AutoImageProcessor", "image_processor") if of_images else ("AutoTokenizer", "tokenizer")
    code = usage_code(kind, name, pairs=pairs, needs_import=False)
    code = code.replace("from transformers import pipeline", f"from transformers import {made_by}, pipeline", 1)
    code = code.replace("\n\n", "\n\nfrom distill import load_exported\n\n", 1)
    loaded = f'model=load_exported("{name}"), {option}={made_by}.from_pretrained("{name}")'
    return code.replace(f'"{name}"', loaded, 1)
