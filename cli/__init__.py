"""The command line over all stages."""
