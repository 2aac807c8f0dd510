"""Which sizes are legal, and which indices are kept?"""
