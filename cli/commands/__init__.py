"""The commands, one file each: its options and the call."""
