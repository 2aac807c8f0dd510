"""What did the user ask? Reads recipes; needs no torch."""
