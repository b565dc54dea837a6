"""What an exported folder says of itself in `export.json`, and where its model lies."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from distill.common.folders import write_atomically
from distill.common.records import SCHEMA, read_record
from distill.common.serialized import as_json, from_json
from distill.errors import InputError
from distill.models.folders import EXPORT_RECORD, is_export

Engine = Literal["onnxruntime", "openvino"]
Format = Literal["fp32", "fp16", "int8", "int4"]

ENGINES: tuple[Engine, ...] = get_args(Engine)
FORMATS: tuple[Format, ...] = get_args(Format)

LIBRARIES: dict[Engine, str] = {"onnxruntime": "onnx", "openvino": "openvino"}
"""For each engine what the Hub calls its files."""

RECORD = EXPORT_RECORD
ENGINE_FOLDERS = ("onnx", "openvino")

_ONNX_FILES: dict[Format, str] = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
    "int4": "onnx/model_q4.onnx",
}
_OPENVINO_FILE = "openvino/openvino_model.xml"


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """What was exported, and what was measured and decided on the way."""

    schema: int = SCHEMA
    engine: Engine
    format: Format
    architecture: str
    """The class of the model in transformers."""
    file: str
    """The model, in its folder."""
    inputs: list[str]
    outputs: list[str]
    largest_difference: float
    """Of an output on random rows, as a share of the largest output: of the float graph, before any quantization."""
    embeddings: str | None = None
    """What embeddings are stored as, of int8 and int4: `int8`, `int4`, or `same` for float."""
    quantized_layers: list[str] = field(default_factory=list)
    """Of int8: what computes in 8 bit, of int4: what has 4-bit weights, by the names of the model's modules."""
    float_layers: list[str] = field(default_factory=list)
    """Of int8 and int4: what could be quantized and stayed in float."""
    trained_for: str | None = None
    """Of int8: the engine that the model's training simulated (`qat`), whose layers and scales these are; None where
    they were chosen on calibration rows."""
    calibration_rows: int | None = None
    agreement: float | None = None
    """Share of the calibration rows' predictions that are the float model's."""
    divergence: float | None = None
    """Mean over them of the KL from the float model's in nats, or of the squared difference of values."""
    web: bool = False
    """Whether transformers.js reads it, too."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that made it."""
    structure: dict[str, Any] | None = None
    """The modules of other sizes that the model had, as its config.json described them; null of a plain one."""


def file_of(engine: Engine, format: Format) -> str:
    """Where an export's model lies in its folder, as those who read such folders expect it."""
    return _ONNX_FILES[format] if engine == "onnxruntime" else _OPENVINO_FILE


def write_export(folder: Path, record: ExportRecord) -> None:
    """Write an exported folder's `export.json`."""
    write_atomically(folder / RECORD, as_json(record))


def read_export(folder: Path) -> ExportRecord:
    """What an exported folder says of itself.

    Raises:
        InputError: it is no exported folder, its model is missing, or a newer version wrote it.
    """
    try:
        record = from_json(ExportRecord, read_record(folder, RECORD) if is_export(folder) else {})
    except (TypeError, ValueError):
        raise InputError(f"{folder}: holds no {RECORD}, so it is no exported model (distill.export_model)") from None
    if not (folder / record.file).is_file():
        raise InputError(f"{folder}: its model, {record.file}, is missing; export it again")
    return record
