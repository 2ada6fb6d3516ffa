"""The embedded engine: a bundle in ONNX Runtime."""
