"""What survives a kill, and is it sound? Files, folders and their hashes."""
