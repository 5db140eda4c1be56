"""Evaluation: perplexity and recall."""
