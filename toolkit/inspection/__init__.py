"""``gradient-bridge inspect``: what the jobs of a run have written."""
