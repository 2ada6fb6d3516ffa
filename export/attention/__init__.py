"""The attention block, its rotation, and the caches it reads and writes."""
