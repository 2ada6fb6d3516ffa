"""What a run found and what made it: accuracy, its limits and causes, speeds, answers to tasks, command lines."""
