"""What does the teacher say of a batch: now, from a cache, or in part?"""
