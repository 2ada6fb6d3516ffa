"""A decoder layer in torch, and its parts."""
