"""Which tasks does a model solve, and how sure is that?"""
