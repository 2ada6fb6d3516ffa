"""What this process may take of its machine: threads, memory, and work that runs in a process of its own."""
