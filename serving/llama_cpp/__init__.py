"""Endpoints as llama.cpp's own server has them, for clients that were written for it."""
