"""The files of a bundle beside the graph: weights, configuration, tokenizer."""
