"""What INT8 costs in perplexity: methods, texts, heads, formats."""
