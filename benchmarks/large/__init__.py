"""Models of a large shape, with invented weights."""
