"""What happened in every step of a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor


@dataclass(frozen=True)
class Trouble:
    """The first step whose numbers are not finite: which of them, and in which recordings."""

    step: int
    what: str
    names: list[str]


class History:
    """Columns of numbers over the steps. Numbers of a step stay on their device until they are settled.

    Asking a GPU for a number waits for all that it has been given to do; so the numbers of many steps are fetched
    together, and looked at then.
    """

    def __init__(self, columns: dict[str, list[float]] | None = None):
        self.columns: dict[str, list[float]] = columns or {}
        self.waiting: list[tuple[int, dict[str, Tensor], Tensor, tuple[str, ...]]] = []

    def add(self, step: int, values: dict[str, Tensor], by_recording: Tensor, names: tuple[str, ...]) -> None:
        """Keep the numbers of a step, and the ELBO of each of its recordings, for :meth:`settle`."""
        self.waiting.append((step, {k: v.detach() for k, v in values.items()}, by_recording, names))

    def settle(self) -> Trouble | None:
        """Fetch what waits; the first step with a loss or a gradient that is not finite ends the history before it."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return None
        table = torch.stack([torch.stack(list(values.values())) for _, values, _, _ in waiting]).tolist()
        for (step, values, by_recording, names), row in zip(waiting, table, strict=True):
            named = dict(zip(values, row, strict=True))
            what = [
                w for w, k in (("loss", "elbo"), ("gradient", "gradient_norm")) if not math.isfinite(named[k])
            ]
            if what:
                finite = by_recording.isfinite().tolist()
                bad = [name for name, good in zip(names, finite, strict=True) if not good]
                for column in self.columns.values():
                    del column[step - 1 :]
                return Trouble(step, what[0], bad if what[0] == "loss" else list(names))
            self.record(step, **named)
        return None

    def record(self, step: int, **values: float) -> None:
        """Write numbers of a step; a column that is new, or has none for earlier steps, has NaN there."""
        for name, value in values.items():
            column = self.columns.setdefault(name, [])
            column.extend([math.nan] * (step - 1 - len(column)))
            column.append(value)

    def recent(self, name: str, number: int) -> float:
        """Mean of the last numbers of a column."""
        last = self.columns[name][-number:]
        return sum(last) / len(last)

    def dataset(self, **attrs: float) -> xr.Dataset:
        """All of it, over ``step``."""
        size = max((len(column) for column in self.columns.values()), default=0)
        columns = {
            name: ("step", np.array(column + [math.nan] * (size - len(column))))
            for name, column in self.columns.items()
        }
        return xr.Dataset(columns, coords={"step": np.arange(1, size + 1)}, attrs=attrs)
