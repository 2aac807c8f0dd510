"""Which sizes are valid, and which entries are kept?"""
