"""Text to token shards: txt, jsonl and parquet in, a folder that `TokenShards` opens out.

Two passes: the first reads and checks everything (so that a bad line is found in seconds and not after hours) and
counts; the second tokenizes. Memory stays bounded whatever the input's size. The layout of the output is in meta.py.

    python -c "from linattn.data import prepare; prepare(['bundled:austen'], 'runs/austen')"
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from linattn.data.meta import VERSION, Meta, TokenizerMeta, read_meta, write_meta
from linattn.data.read import DOCUMENTS, PIECE, Piece, kind_of, read_pieces
from linattn.data.tokenizer import Tokenizer, load_tokenizer
from linattn.data.writer import ShardWriter, writing

_BATCH = 32 * PIECE  # characters encoded at once: about 4 MB of text, and some 16 MB of ids
_MANY = 20  # documents that must fall to validation for it to be chosen by document: then it is empty once in e^20

Progress = Callable[[int, int], None]


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | Tokenizer = "bytes",
    documents: str = "file",
    text_field: str = "text",
    validation_fraction: float = 0.01,
    shard_tokens: int = 100_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Meta:
    """Tokenize files into ``out``; every document ends with the tokenizer's end-of-document token.

    What is held out for validation depends on nothing but the text. With at least 20 documents to hold out
    (``validation_fraction`` times their number), a document is held out by the hash of its text: copies of one
    document never fall on both sides, and adding files moves none. With fewer, it is the last part of the text, in
    bytes and in the order of the inputs, cut at white space where the 128 Ki characters around have any: the document
    that is cut ends in train, and its rest is a document of its own in validation.

    Nothing is left of a run that fails or is interrupted: the work is done in ``out.partial``, renamed at the end.

    Args:
        inputs: .txt, .jsonl (each also as .gz, .xz) and .parquet files, or "bundled:NAME" (see `bundled_names`).
        out: the folder to make.
        tokenizer: "bytes", the path of a tokenizer.json (a copy is kept in ``out``), or a `Tokenizer`.
        documents: how .txt splits: "file" is one document each, "line" one a line, "paragraph-gap" cuts wherever two
            or more lines in a row are blank.
        text_field: the field of jsonl objects, or the column of parquet, that holds the text.
        validation_fraction: in [0, 0.5]; 0 writes no validation split.
        shard_tokens: the most tokens in a shard; a document may run on into the next one.
        overwrite: replace ``out`` if it holds token shards; nothing else is ever removed.
        progress: called with (bytes done, bytes in all), both of UTF-8 text.

    Returns:
        What was written, as meta.json has it.

    Raises:
        ValueError: a bad argument, or bad text, with the file, the line or byte, and the fix.
        OSError: the disk is full or cannot be written; the message has ``out``.
    """
    sources = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    sources = [str(source) for source in sources]
    _check(sources, documents, validation_fraction, shard_tokens)
    out = Path(out)
    _check_out(out, sources, overwrite)
    made = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer

    def pieces() -> Iterator[Piece]:
        for source in sources:
            yield from read_pieces(source, documents, text_field)

    count, total = _survey(pieces())
    held_out = "none" if validation_fraction == 0 else "documents"
    if held_out == "documents" and count * validation_fraction < _MANY:
        held_out = "tail"

    partial = out.with_name(out.name + ".partial")
    with writing(out):
        partial.mkdir(parents=True)
    try:
        assigned = _assign(pieces(), held_out, validation_fraction, total)
        meta = _write(partial, out, assigned, made, held_out, shard_tokens, total, progress)
        with writing(out):
            write_meta(partial, meta)
            _publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def _check(sources: list[str], documents: str, fraction: float, shard_tokens: int) -> None:
    if not sources:
        raise ValueError("no inputs; give at least one file, or 'bundled:austen'")
    for source in sources:
        kind_of(source)
    if documents not in DOCUMENTS:
        raise ValueError(f"documents={documents!r} is not one of {list(DOCUMENTS)}")
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"validation_fraction={fraction} is outside [0, 0.5]")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1")


def _check_out(out: Path, sources: list[str], overwrite: bool) -> None:
    partial = out.with_name(out.name + ".partial")
    for source in sources:
        if not source.startswith("bundled:") and out.resolve() in Path(source).resolve().parents:
            raise ValueError(f"{out}: the input {source} lies inside it; choose another folder")
    if out.exists():
        if not overwrite:
            raise ValueError(f"{out}: exists; give another folder, or --overwrite (overwrite=True) to replace it")
        if any(out.iterdir()) if out.is_dir() else True:
            read_meta(out)  # refuses to replace what prepare did not make
    if partial.exists():
        if not overwrite:
            raise ValueError(
                f"{partial}: exists, so another run is writing it or was killed; "
                "if none is running, remove it or give --overwrite (overwrite=True)"
            )
        shutil.rmtree(partial)


def _survey(pieces: Iterable[Piece]) -> tuple[int, int]:
    """The number of documents and their bytes of UTF-8."""
    count = total = 0
    for text, ends in pieces:
        count += ends
        total += len(text) if text.isascii() else len(text.encode())
    return count, total


def _assign(pieces: Iterable[Piece], held_out: str, fraction: float, total: int) -> Iterator[tuple[str, str, bool]]:
    """Each piece with its split: (split, text, whether the document ends)."""
    if held_out == "tail":
        yield from _assign_tail(pieces, total - max(1, round(total * fraction)))
        return
    split, inside = "train", False
    for text, ends in pieces:
        if held_out == "documents" and not inside:
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            split = "validation" if int.from_bytes(digest, "little") < fraction * 2**64 else "train"
        yield split, text, ends
        inside = not ends


def _assign_tail(pieces: Iterable[Piece], limit: int) -> Iterator[tuple[str, str, bool]]:
    """Train up to the last white space at or before byte ``limit``, validation from there on."""
    seen, inside, split = 0, False, "train"
    for text, ends in pieces:
        data = text.encode()
        if split == "train" and seen + len(data) > limit:
            split = "validation"
            cut = _cut_at(data, limit - seen)
            if cut or inside:
                yield "train", data[:cut].decode(), True
            text = data[cut:].decode()
        yield split, text, ends
        seen += len(data)
        inside = not ends


def _cut_at(data: bytes, limit: int) -> int:
    cut = max(data.rfind(b" ", 0, limit + 1), data.rfind(b"\n", 0, limit + 1))
    if cut >= 0:
        return cut
    while data[limit] & 0xC0 == 0x80:  # text without spaces: at least not inside a character
        limit -= 1
    return limit


def _write(
    folder: Path,
    out: Path,
    assigned: Iterable[tuple[str, str, bool]],
    tokenizer: Tokenizer,
    held_out: str,
    shard_tokens: int,
    total: int,
    progress: Progress | None,
) -> Meta:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    names = ("train",) if held_out == "none" else ("train", "validation")
    with writing(out):
        spec = tokenizer.save(folder)
        writers = {name: ShardWriter(folder, name, dtype, tokenizer, shard_tokens) for name in names}
    try:
        for batch in _batches(assigned):
            arrays = tokenizer.encode_batch([text for _, text, _ in batch])
            with writing(out):
                for (split, text, ends), ids in zip(batch, arrays, strict=True):
                    writers[split].append(ids, ends)
                    writers[split].bytes += len(text) if text.isascii() else len(text.encode())
            if progress:
                progress(sum(w.bytes for w in writers.values()), total)
    finally:
        with writing(out):
            for writer in writers.values():
                writer.close()
    if sum(w.bytes for w in writers.values()) != total:
        raise ValueError("an input changed while it was read; run again when nothing writes to it")
    splits = {name: writer.meta() for name, writer in writers.items()}
    for name, split in splits.items():
        if not split.tokens:
            raise ValueError(f"{total} bytes of text are too few to hold any out: {name} is empty; "
                             "give more text or validation_fraction=0")  # fmt: skip
    about = TokenizerMeta(
        spec=spec,
        name=tokenizer.name,
        hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eos=tokenizer.eos,
        eos_token=getattr(tokenizer, "eos_token", None),
    )
    return Meta(VERSION, about, dtype, held_out, splits["train"], splits.get("validation"))


def _batches(assigned: Iterable[tuple[str, str, bool]]) -> Iterator[list[tuple[str, str, bool]]]:
    batch, size = [], 0
    for item in assigned:
        batch.append(item)
        size += len(item[1]) + 64  # a short document costs more than its characters
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _publish(partial: Path, out: Path) -> None:
    """Rename ``partial`` to ``out``; an earlier ``out`` gives way only once the new one stands beside it."""
    if not out.exists():
        partial.rename(out)
        return
    old = out.with_name(out.name + ".old")
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)
