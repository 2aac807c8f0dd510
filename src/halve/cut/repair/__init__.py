"""What can be made good in closed form after a cut, and before it?"""
