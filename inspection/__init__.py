"""What is in an engine, a bundle or a run, as values."""
