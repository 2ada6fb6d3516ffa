"""What all parts of the graph are written with: the builder, linears, norms."""
