"""Keys and values of the tokens a model has seen, so that the next token costs one row.

Shapes: B rows, T new columns, S columns so far (new ones included), G key-value heads, C head width, P columns that all
rows begin with. Rows of unequal length are padded on the left; a row's positions begin at its first real column, so
padding changes nothing but cost.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mm_train import config


class Columns(NamedTuple):
    """All that the new columns of a layer can see: the rows' own keys and values, and those that they begin with."""

    keys_BGSC: Tensor
    values_BGSC: Tensor
    prefix: tuple[Tensor, Tensor] | None = None  # [1, G, P, C] each


class KVCache:
    """Room for `capacity` columns of each row.

    Attributes: `length` columns filled, `shared` of them the same for all rows and kept once; `padding_B` columns of
    padding of each row after these, or None.
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
        self._prefix: KVCache | None = None
        self.padding_B = torch.tensor(padding, device=device) if padding and any(padding) else None

    def begin_with(self, prefix: "KVCache") -> None:
        """Let every row begin with what the one row of `prefix` holds; that must not change then, and this be empty."""
        self._prefix, self.length, self.shared = prefix, prefix.length, prefix.length

    def filled(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's own keys and values so far, [B, G, S, C] views."""
        own = self.length - self.shared
        return self._keys[layer][:, :, :own], self._values[layer][:, :, :own]

    def append(self, layer: int, k_BGTC: Tensor, v_BGTC: Tensor) -> Columns:
        """Store a layer's new keys and values; returns views of all of them. `advance` ends the step.

        Raises ValueError when they do not fit.
        """
        keys, values = self._keys[layer], self._values[layer]
        start = self.length - self.shared
        end = start + k_BGTC.shape[2]
        if end > self.capacity:
            raise ValueError(f"a cache for {self.capacity} tokens cannot take {end}")
        keys[:, :, start:end] = k_BGTC
        values[:, :, start:end] = v_BGTC
        prefix = None if self._prefix is None else self._prefix.filled(layer)
        return Columns(keys[:, :, :end], values[:, :, :end], prefix)

    def advance(self, columns: int) -> None:
        """Count `columns` that every layer has appended."""
        self.length += columns

    def rewind(self, length: int) -> None:
        """Forget the columns from `length` on."""
        self.length = min(self.length, length)

    def keep_rows(self, rows: list[int]) -> list[int]:
        """Drop all rows but these: finished ones need no more work. Returns them in the order that they now have.

        Nothing moves but rows from the end, into the places of dropped ones.
        """
        kept, own = set(rows), self.length - self.shared
        moved = [row for row in rows if row >= len(rows)]
        order = [place if place in kept else moved.pop() for place in range(len(rows))]
        for tensor in (*self._keys, *self._values):
            for place, row in enumerate(order):
                if place != row:
                    tensor[place, :, :own] = tensor[row, :, :own]
        self._keys, self._values = (tuple(t[: len(rows)] for t in ts) for ts in (self._keys, self._values))
        if self.padding_B is not None:
            self.padding_B = self.padding_B[order]
        return order

    def positions(self, columns: int, device: torch.device) -> Tensor:
        """Positions of the next `columns`: [T], or [B, T] when rows are padded (0 on padding)."""
        position_T = torch.arange(self.length, self.length + columns, device=device)
        return position_T if self.padding_B is None else (position_T - self.padding_B[:, None]).clamp(min=0)

    def mask(self, columns: int, device: torch.device) -> Tensor | None:
        """Where the next `columns` may look among their rows' own, bool [1 or B, T, S]; None: at all before them."""
        own = self.length - self.shared
        if self.padding_B is None and (columns == 1 or own == 0):
            return None
        key_S = torch.arange(own + columns, device=device)
        query_T1 = key_S[own:, None]
        mask_BTS = (key_S <= query_T1)[None]
        if self.padding_B is not None:
            # A padding column sees itself: attention over nothing would be NaN and spread.
            mask_BTS = mask_BTS & ((key_S >= self.padding_B[:, None, None]) | (key_S == query_T1))
        return mask_BTS
