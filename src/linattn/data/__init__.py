"""Text to token shards, tokenizers, and a loader whose whole position is one integer."""

from linattn.data.bundled import bundled_names, bundled_text
from linattn.data.loader import Batch, Loader, validation_batches
from linattn.data.meta import Meta
from linattn.data.prepare import prepare
from linattn.data.read import kind_of, read_pieces
from linattn.data.shards import TokenShards
from linattn.data.stream import StreamBatch, StreamLoader
from linattn.data.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Loader",
    "Meta",
    "StreamBatch",
    "StreamDecoder",
    "StreamLoader",
    "TokenShards",
    "Tokenizer",
    "bundled_names",
    "bundled_text",
    "kind_of",
    "load_tokenizer",
    "prepare",
    "read_pieces",
    "validation_batches",
]
