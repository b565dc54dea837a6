"""Models as files of an inference engine: ONNX Runtime or OpenVINO; made, checked, and loaded again."""
