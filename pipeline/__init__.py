"""A run: the stages one after another over a work directory."""
