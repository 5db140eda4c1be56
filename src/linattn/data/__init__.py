"""Text to token shards, tokenizers, and a loader whose whole position is one integer."""
