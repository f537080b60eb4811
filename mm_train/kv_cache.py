"""Keys and values of the tokens a model has seen, so that the next token costs one row.

Shapes: B rows, T new columns, S columns so far (new ones included), G key-value heads, C head width. Rows of unequal
length are padded on the left; a row's positions begin at its first real column, so padding changes nothing but cost.
"""

import torch
from torch import Tensor

from mm_train import config


class KVCache:
    """Room for `capacity` columns of each row.

    Attributes: `length` columns filled; `padding_B` columns of padding of each row, or None; `shared` columns that all
    rows have in common lie to the left of it.
    """

    def __init__(
        self,
        model: config.Model,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        padding: list[int] | None = None,
    ) -> None:
        shape = (model.num_hidden_layers, rows, model.num_key_value_heads, capacity, model.head_dim)
        # Not zeroed: pages of memory that no token has reached yet are never touched.
        self._keys = torch.empty(shape, dtype=dtype, device=device).unbind(0)
        self._values = torch.empty(shape, dtype=dtype, device=device).unbind(0)
        self.capacity = capacity
        self.length = self.shared = 0
        self.padding_B = torch.tensor(padding, device=device) if padding and any(padding) else None

    def begin_with(self, prefix: "KVCache") -> None:
        """Fill the first columns of every row with what the one row of `prefix` holds; this cache must be empty."""
        self.length = self.shared = prefix.length
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            keys[:, :, : self.length], values[:, :, : self.length] = prefix.filled(layer)

    def filled(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values so far, [B, G, S, C] views."""
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]

    def append(self, layer: int, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns all of them, [B, G, S, C] views. `advance` ends the step.

        Raises ValueError when they do not fit.
        """
        keys, values = self._keys[layer], self._values[layer]
        end = self.length + k_BGTC.shape[2]
        if end > self.capacity:
            raise ValueError(f"a cache for {self.capacity} tokens cannot take {end}")
        keys[:, :, self.length : end] = k_BGTC
        values[:, :, self.length : end] = v_BGTC
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, columns: int) -> None:
        """Count `columns` that every layer has appended."""
        self.length += columns

    def rewind(self, length: int) -> None:
        """Forget the columns from `length` on."""
        self.length = min(self.length, length)

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all rows but these: finished ones need no more work."""
        self._keys, self._values = (
            tuple(self._selected(tensor, rows) for tensor in tensors) for tensors in (self._keys, self._values)
        )
        if self.padding_B is not None:
            self.padding_B = self.padding_B[rows]

    def _selected(self, tensor: Tensor, rows: list[int]) -> Tensor:
        kept = tensor.new_empty(len(rows), *tensor.shape[1:])
        kept[:, :, : self.length] = tensor[rows, :, : self.length]
        return kept

    def positions(self, columns: int, device: torch.device) -> Tensor:
        """Positions of the next `columns`: [T], or [B, T] when rows are padded (0 on padding)."""
        position_T = torch.arange(self.length, self.length + columns, device=device)
        return position_T if self.padding_B is None else (position_T - self.padding_B[:, None]).clamp(min=0)

    def mask(self, columns: int, device: torch.device) -> Tensor | None:
        """Where the next `columns` may look, bool [1 or B, T, S]; None where plain attention does the same."""
        if self.padding_B is None and (columns == 1 or self.length == 0):
            return None
        key_S = torch.arange(self.length + columns, device=device)
        query_T1 = key_S[self.length :, None]
        mask_BTS = (key_S <= query_T1)[None]
        if self.padding_B is not None:
            # A padding column sees itself: attention over nothing would be NaN and spread.
            padding_B11 = self.padding_B[:, None, None] + self.shared
            mask_BTS = mask_BTS & ((key_S < self.shared) | (key_S >= padding_B11) | (key_S == query_T1))
        return mask_BTS
