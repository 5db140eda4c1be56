"""What a model has read, as transformers' cache: one State a layer, of constant size where the model's is.

Not here: crop. A State cannot forget its last tokens, so assisted decoding and prompt lookup are refused.

    pytest tests/hf/test_hf_cache.py
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

from linattn.models import ModelState, map_model_state, model_state_bytes


class LinattnCache(Cache):
    """A `ModelState` and how many columns of tokens it has been given.

    ``state`` is None before the first call; ``state.tokens`` [B] counts the real tokens of each row, and `snapshot` of
    linattn.generate saves it. transformers counts columns, pads included, the same for all rows: `get_seq_length`.

    Args:
        state: go on from here; None from nothing.
        columns: the columns it was given; None where no row had pads.
    """

    def __init__(self, state: ModelState | None = None, columns: int | None = None):
        super().__init__(layers=[])
        if columns is None:
            columns = 0 if state is None else int(state.tokens.max())
        self.state = state
        self.columns = columns

    def advance(self, state: ModelState, columns: int) -> None:
        """Replace the state by the one after ``columns`` more columns."""
        self.state = state
        self.columns += columns

    def nbytes(self) -> int:
        """Bytes of all States."""
        return 0 if self.state is None else model_state_bytes(self.state)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read, pads included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is none."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over all columns and ``query_length`` new ones."""
        return self.columns + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything was read."""
        return self.columns > 0

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows ``indices`` (int64, or bool one a row) in their order."""
        self._map(lambda leaf: leaf[indices.to(leaf.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, side by side."""
        self._map(lambda leaf: leaf.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, but for removing nothing."""
        if tokens_to_remove:
            raise ValueError(
                f"crop({tokens_to_remove}): a State cannot forget tokens; keep a copy.deepcopy of the cache from "
                "before them, and go on from that"
            )

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: only a linattn model writes to this cache."""
        raise ValueError("a LinattnCache holds a linattn model's States and takes no keys and values of other models")

    def _map(self, function: Any) -> None:
        if self.state is not None:
            self.state = map_model_state(function, self.state)

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return -1 if self.state is None else self.state.tokens.shape[0]

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        """False: generate is not to compile by itself, nor to build 4-D masks."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False."""
        return False

    def __repr__(self) -> str:
        return f"LinattnCache(rows={self.batch_size}, columns={self.columns}, bytes={self.nbytes()})"


def check_cache(cache: Any) -> None:
    """ValueError for a cache of another kind."""
    if not isinstance(cache, LinattnCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; linattn models keep States: give a "
            "linattn.hf.LinattnCache(), or use_cache=True and none"
        )
