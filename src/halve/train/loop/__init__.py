"""In which steps does a model train? Resumes bit-identically."""
