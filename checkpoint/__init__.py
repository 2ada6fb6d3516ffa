"""A model as it was given: Hugging Face directory or GGUF file, its configuration, family and tensors."""
