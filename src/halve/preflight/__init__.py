"""What will it take, and can it work? Reads no weights."""
