"""What can be repaired in closed form before and after a cut?"""
