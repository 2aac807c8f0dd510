"""One artifact in, one artifact out. No stage imports another; `halve.pipeline.order` says which follows which."""
