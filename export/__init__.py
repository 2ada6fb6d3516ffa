"""Export: from a checkpoint and a recipe to an ONNX bundle."""
