"""What the ways to share reach and cost: real jobs, launched and compared."""
