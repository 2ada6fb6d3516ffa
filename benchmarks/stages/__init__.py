"""What the stages of the job take in time and memory."""
