"""Calibration: from a checkpoint and a corpus to spike statistics and a recipe."""
