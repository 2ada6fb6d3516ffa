"""Rules about any ONNX graph."""
