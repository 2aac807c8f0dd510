"""Which process is this, what may it start, and how does it end?"""
