"""Plain modules: norms, rotary positions, gated MLPs, embedding and head, cross-entropy. No state."""
