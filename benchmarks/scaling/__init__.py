"""What many machines would do, computed from what one was measured to do."""
