"""The decoder as a whole: feed-forward blocks, experts, the head, and the order of the layers."""
