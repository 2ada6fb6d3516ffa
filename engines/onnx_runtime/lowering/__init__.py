"""Passes that turn a loaded graph into what ONNX Runtime computes best; the file on disk stays standard ONNX."""
