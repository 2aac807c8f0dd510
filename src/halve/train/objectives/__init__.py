"""What does a training minimize?"""
