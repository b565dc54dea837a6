"""Write an ONNX graph as an engine's file, in float32 or float16."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill.export.record import Engine
from distill.export.runtime import import_openvino

if TYPE_CHECKING:
    import onnx


def write_graph(graph: onnx.ModelProto, file: Path, engine: Engine, *, half: bool = False) -> None:
    """Write a graph with its weights: one ONNX file, or OpenVINO's `.xml` with its `.bin`.

    Args:
        half: whether floats are stored in float16. ONNX Runtime computes in it, too, with inputs and outputs as before;
            OpenVINO computes in what its device does best.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if engine == "openvino":
        openvino = import_openvino()
        model = openvino.Core().read_model(graph.SerializeToString())
        openvino.save_model(model, file, compress_to_fp16=half)
        return
    if half:
        from onnxruntime.transformers.float16 import convert_float_to_float16  # of an extra

        graph = convert_float_to_float16(graph, keep_io_types=True)
    file.write_bytes(graph.SerializeToString())
