"""The demo: the whole pipeline on a teacher that comes with the package."""
