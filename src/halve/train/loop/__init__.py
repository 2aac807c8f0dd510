"""One step after the other, resumable to the bit."""
