"""What happened in every step of a fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

MOST = 32  # recordings of a skipped step, and trials of each, that are looked at by themselves
LOOKED_AT = {"loss": "elbo", "gradient": "gradient_norm"}


@dataclass(frozen=True)
class Skipped:
    """A step that was not taken, since a number of it was not finite.

    Attributes:
        step: counted from 1.
        what: "loss" or "gradient".
        trials: by recording, its trials of the step in whose loss it was; all of the step's where the loss does not
            tell.
    """

    step: int
    what: str
    trials: dict[str, list[int]]

    def __str__(self) -> str:
        listed = [f"{name} (trial {_few(trials)})" for name, trials in self.trials.items()]
        return f"the {self.what} was not finite at step {self.step}, recording(s) {', '.join(listed)}"


class History:
    """Columns of numbers over the steps. Numbers of a step stay on their device until they are settled.

    Asking a GPU for a number waits for all that it has been given to do; so the numbers of many steps are fetched
    together, and looked at then.
    """

    def __init__(self, columns: dict[str, list[float]] | None = None, skipped: list[Skipped] | None = None):
        self.columns: dict[str, list[float]] = columns or {}
        self.skipped = skipped or []
        self.waiting: list[tuple[int, dict[str, Tensor], Tensor, Mapping[str, np.ndarray]]] = []

    @classmethod
    def of_plain(cls, columns: dict[str, list[float]], skipped: list[dict]) -> History:
        """The history of these columns, and of what :meth:`skipped_as_plain` gave."""
        return cls(columns, [Skipped(**entry) for entry in skipped])

    def skipped_as_plain(self) -> list[dict]:
        """What was skipped, as JSON has it."""
        return [dataclasses.asdict(entry) for entry in self.skipped]

    def add(
        self, step: int, values: dict[str, Tensor], finite: Tensor, trials: Mapping[str, np.ndarray]
    ) -> None:
        """Keep the numbers of a step for :meth:`settle`.

        Args:
            step: counted from 1.
            values: numbers on their device.
            finite: which trials' losses are, ``(R, K)`` bool.
            trials: of each recording of the step, in the order of the rows.
        """
        self.waiting.append((step, {k: v.detach() for k, v in values.items()}, finite, trials))

    def settle(self) -> None:
        """Fetch what waits. Where a loss or a gradient is not finite, the step is noted as skipped, its numbers NaN."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        table = torch.stack([torch.stack(list(values.values())) for _, values, _, _ in waiting]).tolist()
        for (step, values, finite, trials), row in zip(waiting, table, strict=True):
            named = dict(zip(values, row, strict=True))
            what = next((what for what, key in LOOKED_AT.items() if not math.isfinite(named[key])), None)
            if what is not None:
                self.skipped.append(Skipped(step, what, _not_finite(finite, trials)))
                named = dict.fromkeys(named, math.nan)
            self.record(step, **named)

    @property
    def skipped_last(self) -> list[Skipped]:
        """The steps skipped since the last one that was taken."""
        last = len(self.columns.get("elbo", ()))
        number = 0
        while number < len(self.skipped) and self.skipped[-1 - number].step == last - number:
            number += 1
        return self.skipped[len(self.skipped) - number :]

    def cut(self, step: int) -> None:
        """Forget this step and those after it."""
        for column in self.columns.values():
            del column[step - 1 :]
        self.skipped = [entry for entry in self.skipped if entry.step < step]

    def record(self, step: int, **values: float) -> None:
        """Write numbers of a step; a column that is new, or has none for earlier steps, has NaN there."""
        for name, value in values.items():
            column = self.columns.setdefault(name, [])
            column.extend([math.nan] * (step - 1 - len(column)))
            column.append(value)

    def recent(self, name: str, number: int) -> float:
        """Mean of the last numbers of a column."""
        last = [value for value in self.columns[name][-number:] if math.isfinite(value)]
        return sum(last) / len(last) if last else math.nan

    def dataset(self, **attrs: float) -> xr.Dataset:
        """All of it, over ``step``."""
        size = max((len(column) for column in self.columns.values()), default=0)
        columns = {
            name: ("step", np.array(column + [math.nan] * (size - len(column))))
            for name, column in self.columns.items()
        }
        attrs |= {"num_skipped": len(self.skipped)}
        return xr.Dataset(columns, coords={"step": np.arange(1, size + 1)}, attrs=attrs)


def narrowed(entry: Skipped, is_finite: Callable[[str, list[int], str], bool]) -> Skipped:
    """A skipped step with those of its recordings and trials that are not finite by themselves; as it is if none are.

    A trial spoils its recording by way of the embedding, and a gradient all of them.

    Args:
        entry: of :class:`History`.
        is_finite: whether the loss, or with "gradient" its gradient, of these trials of a recording is.
    """
    found: dict[str, list[int]] = {}
    bad = [name for name, own in entry.trials.items() if not is_finite(name, own, entry.what)]
    for name in bad[:MOST]:
        alone = [k for k in entry.trials[name][:MOST] if not is_finite(name, [k], entry.what)]
        found[name] = alone or entry.trials[name]
    return dataclasses.replace(entry, trials=found or entry.trials)


def _not_finite(finite: Tensor, trials: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """The trials whose losses are not; all where all are."""
    rows = finite.tolist()
    found = {
        name: [int(k) for k, good in zip(own, row, strict=False) if not good]  # the rest of a row is padding
        for (name, own), row in zip(trials.items(), rows, strict=True)
    }
    some = {name: own for name, own in found.items() if own}
    return some or {name: [int(k) for k in own] for name, own in trials.items()}


def _few(trials: list[int]) -> str:
    return ", ".join(map(str, trials[:8])) + (f" and {len(trials) - 8} more" if len(trials) > 8 else "")
