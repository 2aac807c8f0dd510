"""What do the weights of a cut model look like?"""
