"""A Hugging Face checkpoint in the format compressed-tensors, which vLLM loads: the recipe without an ONNX graph."""
