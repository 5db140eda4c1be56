"""The decoder skeleton and the published models built on it."""
