"""How progress and tables appear on a terminal."""
