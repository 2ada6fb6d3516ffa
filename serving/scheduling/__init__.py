"""Which sequence is computed when, and the thread that does it."""
