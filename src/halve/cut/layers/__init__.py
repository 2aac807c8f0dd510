"""Which layers go, and what becomes of those that stay beside them?"""
