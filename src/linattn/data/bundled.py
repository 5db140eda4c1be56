"""Public-domain English text that ships inside the package, for demonstrations and tests without a network.

python -c "from linattn.data import bundled_text; print(bundled_text('mobydick')[:200])"
"""

from __future__ import annotations

import lzma
from importlib.resources import files

# Bytes of UTF-8 after decompression: an archive cut short or swapped in packaging is caught on reading.
_SIZES = {"austen": 4_025_033, "mobydick": 1_204_997, "sotu": 6_488_868}


def bundled_names() -> tuple[str, ...]:
    """The names that `bundled_text` knows. data/texts/README.md says what they are and where they come from."""
    return tuple(_SIZES)


def bundled_text(name: str) -> str:
    """The whole text called ``name``: 1.2 to 6.5 MB.

    Raises:
        ValueError: an unknown name, or a packaged file that is not the size it was published with.
    """
    return bundled_bytes(name).decode("utf-8")


def bundled_bytes(name: str) -> bytes:
    """`bundled_text` as UTF-8 bytes."""
    if name not in _SIZES:
        raise ValueError(f"no bundled text is called {name!r}; there are {', '.join(_SIZES)}")
    packed = files("linattn.data").joinpath("texts", f"{name}.txt.xz").read_bytes()
    try:
        data = lzma.decompress(packed)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"the bundled text {name!r} is damaged ({error}); install linattn again") from error
    if len(data) != _SIZES[name]:
        raise ValueError(
            f"the bundled text {name!r} has {len(data)} bytes and should have {_SIZES[name]}; install linattn again"
        )
    return data
