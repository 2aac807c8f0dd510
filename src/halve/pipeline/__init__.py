"""In which order? Read this first."""
