"""How does the student learn from the teacher?"""
