"""Text and tokens, independent of the runtime: options, sampling, prompts, stop strings, streams."""
