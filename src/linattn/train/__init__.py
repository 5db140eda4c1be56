"""Training: one loop (loop.py), and what it is made of."""

from linattn.train.config import TrainConfig
from linattn.train.evaluate import Evaluation, evaluate
from linattn.train.loop import train
from linattn.train.objective import JRT, NextToken
from linattn.train.optim import AdamWConfig
from linattn.train.schedule import WSD, Cosine
from linattn.train.stop import TrainingStopped
from linattn.train.weights import export, load_model, load_model_tokenizer

__all__ = [
    "JRT",
    "WSD",
    "AdamWConfig",
    "Cosine",
    "Evaluation",
    "NextToken",
    "TrainConfig",
    "TrainingStopped",
    "evaluate",
    "export",
    "load_model",
    "load_model_tokenizer",
    "train",
]
