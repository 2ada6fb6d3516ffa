"""What a plan is: header, sidecar, paths, safety, and the options and the graph it was built from."""
