"""What a run knows of the machine: its processes, its memory, and whether the user stops it."""
