"""How is the student aligned: on conversations, and on which of two answers people or a reward prefer?"""
