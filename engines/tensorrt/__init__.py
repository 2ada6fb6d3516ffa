"""Plans run on a GPU."""
