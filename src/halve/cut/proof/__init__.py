"""Can this family be cut along an axis? Tested on random twins."""
