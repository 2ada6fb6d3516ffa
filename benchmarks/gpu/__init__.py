"""Plans on an NVIDIA GPU: parity, speed, and what the GPU could do at most."""
