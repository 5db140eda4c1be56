"""Plain modules: norms, rotary positions, gated MLPs, embedding and head, cross-entropy. No state."""

from linattn.nn.embedding import Embedding, Head, cut_logits, padded_vocab
from linattn.nn.gated_norm import gated_rms_norm
from linattn.nn.linear import Linear, linear
from linattn.nn.loss import cross_entropy
from linattn.nn.lrpe import LRPE, apply_lrpe
from linattn.nn.mlp import SGLU, SwiGLU
from linattn.nn.norm import RMSNorm, SimpleRMSNorm, make_norm, rms_norm
from linattn.nn.rotary import Rotary, apply_rotary, rotary_angles, rotary_frequencies

__all__ = [
    "LRPE",
    "SGLU",
    "Embedding",
    "Head",
    "Linear",
    "RMSNorm",
    "Rotary",
    "SimpleRMSNorm",
    "SwiGLU",
    "apply_lrpe",
    "apply_rotary",
    "cross_entropy",
    "cut_logits",
    "gated_rms_norm",
    "linear",
    "make_norm",
    "padded_vocab",
    "rms_norm",
    "rotary_angles",
    "rotary_frequencies",
]
