"""What the bridge itself costs: over moving the same bytes once, and over a step without it."""
