"""Engines: run, check and build what export wrote."""
