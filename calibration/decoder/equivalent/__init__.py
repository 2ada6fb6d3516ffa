"""Models that compute the same with other weights: smoothed, rotated, behind Hadamard transforms."""
