"""``gradient-bridge doctor``: what a file system gives, and which settings fit it."""
