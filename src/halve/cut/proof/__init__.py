"""Can this family be cut along an axis? Random twins say."""
