"""What is removed, and how is the rest adjusted? Only the files at this level know the order of the subpackages."""
