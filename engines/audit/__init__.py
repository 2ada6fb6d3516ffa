"""What really runs in a plan."""
