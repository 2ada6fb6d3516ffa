"""The methods, one file each, and how each is chosen: QFeM, QFeP, smoothing, rotation, head, overflow guard."""
