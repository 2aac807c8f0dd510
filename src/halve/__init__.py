"""halve."""
