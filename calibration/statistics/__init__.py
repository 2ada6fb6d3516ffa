"""What is recorded of activations, and how parts of it merge."""
