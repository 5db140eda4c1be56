"""Prefill, decode by the state, sampling, prompting, and States on disk."""
