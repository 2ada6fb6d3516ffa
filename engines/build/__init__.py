"""Making a plan from a bundle."""
