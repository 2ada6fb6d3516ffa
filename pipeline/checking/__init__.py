"""What a bundle is worth, without the run that made it: beside the model that it was made of."""
