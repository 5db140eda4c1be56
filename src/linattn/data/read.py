"""Documents out of files, a piece at a time: txt and jsonl (plain, .gz, .xz), parquet, and the bundled texts.

Memory is bounded by a piece (128 Ki characters) for txt, by the longest line for jsonl, and by a batch of 256 rows for
parquet. A long document is cut only before a space that follows a character: byte-level BPE's pre-tokenizers cut there
too, so the tokens are those of the whole.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from linattn.data.bundled import bundled_bytes, bundled_names

PIECE = 1 << 17  # characters: a batch of 32 of them keeps every core of an encoder busy
_CHUNK = 1 << 17  # bytes read at a time

DOCUMENTS = {
    "file": None,
    "line": re.compile(r"\r?\n"),
    "paragraph-gap": re.compile(r"\n(?:[ \t\r]*\n){2,}"),
}
_TEXT = (".txt", ".text", ".md")
_JSONL = (".jsonl", ".ndjson")
_PARQUET = (".parquet",)
_PACKED = (".gz", ".xz")

Piece = tuple[str, bool]
"""Some text of a document, and whether the document ends with it."""


def kind_of(source: str) -> str:
    """ "txt", "jsonl" or "parquet" by the name's ending.

    Raises:
        ValueError: no such file, a folder, or an ending that nothing here reads.
    """
    if source.startswith("bundled:"):
        if source.removeprefix("bundled:") not in bundled_names():
            raise ValueError(f"{source}: no such bundled text; there are {', '.join(bundled_names())}")
        return "txt"
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give its files, as in sorted(Path({source!r}).glob('*.txt'))")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    suffixes = [s.lower() for s in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _PACKED
    last = "".join(suffixes[-2:-1] if packed else suffixes[-1:])
    for kind, endings in (("txt", _TEXT), ("jsonl", _JSONL), ("parquet", _PARQUET)):
        if last in endings and not (packed and kind == "parquet"):
            return kind
    raise ValueError(
        f"{path}: unknown ending {''.join(suffixes[-2:]) or '(none)'}; "
        f"known are {', '.join(_TEXT + _JSONL)} (each also with .gz or .xz) and .parquet"
    )


def read_pieces(source: str, documents: str, text_field: str) -> Iterator[Piece]:
    """The documents of one source in order, each as pieces of at most about `PIECE` characters.

    Documents with no text but white space are passed over.

    Raises:
        ValueError: not UTF-8, a bad line, a missing field, a damaged archive, or a source without any text.
    """
    kind = kind_of(source)
    if kind == "txt":
        pieces = _txt(source, DOCUMENTS[documents])
    elif kind == "jsonl":
        pieces = _whole_documents(_jsonl(source, text_field))
    else:
        pieces = _whole_documents(_parquet(source, text_field))
    empty = True
    for piece in pieces:
        empty = False
        yield piece
    if empty:
        raise ValueError(f"{source}: holds no text; leave it out")


@contextmanager
def _opened(source: str) -> Iterator[BinaryIO]:
    if source.startswith("bundled:"):
        yield io.BytesIO(bundled_bytes(source.removeprefix("bundled:")))
        return
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(Path(source).suffix.lower(), open)(source, "rb") as handle:
            yield cast(BinaryIO, handle)
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{source}: a damaged archive ({error}); fetch or compress it again") from error


def _decoded(source: str) -> Iterator[str]:
    """The text of a source, a chunk at a time, without the byte order mark that some editors write first."""
    with _opened(source) as handle:
        offset, held = 0, b""
        while True:
            chunk = handle.read(_CHUNK)
            data = held + chunk
            try:
                text, held = _decode_prefix(data, final=not chunk)
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise ValueError(
                    f"{source}: not UTF-8 at byte {at} (0x{data[error.start]:02x}); "
                    "convert the file, as with `iconv -f latin1 -t utf-8`"
                ) from error
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(data) - len(held)
            if not chunk:
                return


def _decode_prefix(data: bytes, final: bool) -> tuple[str, bytes]:
    """The text of ``data`` and the unfinished character at its end."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        if final or error.end < len(data) or error.reason != "unexpected end of data":
            raise
        return data[: error.start].decode(), data[error.start :]


def _txt(source: str, delimiter: re.Pattern[str] | None) -> Iterator[Piece]:
    buffer, inside = "", False  # inside: the current document has given a piece already
    for text in _decoded(source):
        buffer += text
        start = 0
        for match in delimiter.finditer(buffer) if delimiter else ():
            if match.end() == len(buffer):
                break  # more of the gap may follow in the next chunk
            yield from _pieces(buffer[start : match.start()], inside)
            inside, start = False, match.end()
        buffer = buffer[start:]
        while len(buffer) > 2 * PIECE:
            cut = _cut(buffer)
            yield buffer[:cut], False
            buffer, inside = buffer[cut:], True
    last = re.sub(r"\s*\Z", "", buffer) if delimiter else buffer
    yield from _pieces(last, inside)


def _whole_documents(texts: Iterable[str]) -> Iterator[Piece]:
    for text in texts:
        yield from _pieces(text, False)


def _pieces(text: str, inside: bool) -> Iterator[Piece]:
    """``text`` to its document's end; nothing for a document of white space only."""
    if not inside and not text.strip():
        return
    while len(text) > 2 * PIECE:
        cut = _cut(text)
        yield text[:cut], False
        text = text[cut:]
    yield text, True


def _cut(text: str) -> int:
    """Where to cut the first piece off a text longer than `PIECE`: before a single space if there is one."""
    cut = text.rfind(" ", PIECE // 2, PIECE)
    while cut >= 0 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
        cut = text.rfind(" ", PIECE // 2, cut)
    return cut if cut >= 0 else PIECE


def _jsonl(source: str, field: str) -> Iterator[str]:
    with _opened(source) as handle:
        for number, line in enumerate(handle, start=1):
            where = f"{source}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig").rstrip())
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: not JSON at column {error.colno} ({error.msg}); each line must be one object"
                ) from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: a {type(record).__name__}, not an object with a field {field!r}")
            if field not in record:
                raise ValueError(f"{where}: no field {field!r}; it has {sorted(record)}: set text_field to one of them")
            yield _checked(record[field], where, field)


def _parquet(source: str, field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            f"{source}: reading parquet needs pyarrow; install it with `pip install linattn[data]`"
        ) from error
    import pyarrow

    row = 0
    try:
        with parquet.ParquetFile(source) as table:
            if field not in table.schema_arrow.names:
                names = sorted(table.schema_arrow.names)
                raise ValueError(f"{source}: no column {field!r}; it has {names}: set text_field to one of them")
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield _checked("" if text is None else text, f"{source}, row {row}", field)
                    row += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{source}: not a readable parquet file ({error})") from error


def _checked(text: Any, where: str, field: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} is a {type(text).__name__}, not text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise ValueError(f"{where}: character {error.start} of {field!r} is half a surrogate pair") from error
    return text
