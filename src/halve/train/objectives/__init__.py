"""What does a training make small?"""
