"""Standard tasks: what quantization does to a bundle's answers."""
