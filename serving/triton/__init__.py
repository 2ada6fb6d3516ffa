"""A model repository for NVIDIA Triton: the server's scheduler inside Triton's Python backend."""
