"""Which processes train together, and who holds which part of a model?"""
