"""Sharded and sequence-parallel training. Takes any nn.Module; knows no model."""
