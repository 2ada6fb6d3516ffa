"""The documents that pass between the stages, and how any file is written whole or not at all."""
