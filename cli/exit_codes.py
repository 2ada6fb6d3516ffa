"""Exit codes of the command line."""

DONE, GATE_MISSED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
