"""Language models whose memory of the past is one state of constant size."""

__version__ = "0.1.0"
