"""The run as a person sees it: one live line on a terminal, plain lines anywhere else.

pytest tests/train -k display
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table


class Display:
    """Shows progress while the loop runs; use as a context manager.

    On a terminal the line is redrawn twice a second and metrics scroll above it.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(
        self, step: int, steps: int, fraction: float, seconds: float, loss: float, rate: float, memory: int
    ) -> None:
        """Redraw the live line. ``rate`` is tokens a second, ``memory`` bytes, ``seconds`` those trained so far."""
        if self._live is None:
            return
        row = Table.grid(padding=(0, 2))
        row.add_row(
            f"step {step}/{steps}",
            ProgressBar(total=1.0, completed=fraction, width=24),
            f"loss {loss:.3f}",
            f"{rate:,.0f} tokens/s",
            f"ETA {clock(remaining(fraction, seconds))}",
            f"peak {memory / 2**30:.2f} GiB",
        )
        self._live.update(row)


def remaining(fraction: float, seconds: float) -> float:
    """Seconds left if the rest goes as fast as what is over."""
    return seconds * (1 - fraction) / fraction if fraction > 0 else 0.0


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def line(step: int, steps: int, metrics: dict[str, float], left: float) -> str:
    """A step's metrics as a line of text."""
    parts = [f"step {step}/{steps}", f"loss {metrics['loss']:.4f}"]
    if "masked_loss" in metrics:
        parts.append(f"masked {metrics['masked_loss']:.4f}")
    parts += [
        f"lr {metrics['lr']:.2e}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        f"ETA {clock(left)}",
        f"peak {metrics['peak_memory'] / 2**30:.2f} GiB",
    ]
    return "  ".join(parts)
