"""Exit codes of the command line."""

DONE, GATE_MISSED, BAD_INPUT, PROGRAM_FAULT, INTERRUPTED = 0, 1, 2, 3, 130
