"""Where a bundle first computes something else than the model and the recipe say."""
