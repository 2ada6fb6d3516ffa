"""How close a bundle is to the model it was made of."""
