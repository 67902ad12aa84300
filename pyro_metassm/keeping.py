"""What is kept of draws: all of them, or statistics of them made while they pass; and what that takes of memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
STATISTICS = ("mean", "sd", "quantiles")
Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]  # name -> dims, values


class Store(ABC):
    """Takes the draws of a recording's variables, some draws of some trials at a time, all float32.

    Args:
        num_samples: draws.
        shape: trials and bins.
        sizes: of each variable ``(draw, trial, time, ...)``, its last dimension.
        trials_at_once: trials that come together.
    """

    def __init__(
        self, num_samples: int, shape: tuple[int, int], sizes: Mapping[str, int], trials_at_once: int = 1
    ):
        self.num_samples, self.shape, self.sizes = num_samples, shape, dict(sizes)
        self.trials_at_once = min(trials_at_once, shape[0])

    @property
    @abstractmethod
    def needed(self) -> int:
        """Bytes that it takes once it is filled; nothing is allocated before the first draws come."""

    @abstractmethod
    def put(
        self, draws: slice, rows: np.ndarray, values: Mapping[str, np.ndarray], exists: np.ndarray | None
    ) -> None:
        """Take ``values (draw, trial, time, ...)``; bins that do not ``exist (trial, time)`` become NaN."""

    @abstractmethod
    def variables(self, names: Iterable[str], dims: Mapping[str, tuple[str, ...]]) -> Variables:
        """What was kept of these variables, whose own dimensions are ``dims``."""

    def _empty(self, num_trials: int) -> dict[str, np.ndarray]:
        shape = (self.num_samples, num_trials, self.shape[1])
        return {name: np.full((*shape, size), np.nan, np.float32) for name, size in self.sizes.items()}


class AllDraws(Store):
    """All draws, ``(chain, draw, ...)``."""

    @property
    def needed(self) -> int:
        return 4 * self.num_samples * math.prod(self.shape) * sum(self.sizes.values())

    def put(self, draws, rows, values, exists):
        if not hasattr(self, "arrays"):
            self.arrays = self._empty(self.shape[0])
        _fill(self.arrays, draws, rows, values, exists)

    def variables(self, names, dims):
        return {name: (("chain", "draw", *dims[name]), self.arrays[name][None]) for name in names}


class Statistics(Store):
    """Mean, standard deviation and quantiles over the draws, of which only those of a few trials are there at a time.

    ``rates`` become ``rates_mean``, ``rates_sd`` and ``rates_quantiles``, which has the dimension ``quantile``.
    """

    def __init__(self, num_samples, shape, sizes, trials_at_once=1, *, keep: Sequence[str]):
        super().__init__(num_samples, shape, sizes, trials_at_once)
        self.keep = keep
        self.results: dict[str, np.ndarray] = {}

    @property
    def needed(self) -> int:
        results = sum(len(QUANTILES) if what == "quantiles" else 1 for what in self.keep)
        drawn = self.num_samples * self.trials_at_once * self.shape[1]
        return 4 * sum(self.sizes.values()) * (drawn + results * math.prod(self.shape))

    def put(self, draws, rows, values, exists):
        if draws.start == 0:
            self.buffer = self._empty(len(rows))
        _fill(self.buffer, draws, np.arange(len(rows)), values, exists)
        if draws.stop == self.num_samples:
            self._reduce(rows)
            del self.buffer

    def _reduce(self, rows) -> None:
        for name, drawn in self.buffer.items():
            for what in self.keep:
                value = _statistic(what, drawn)
                key = f"{name}_{what}"
                if key not in self.results:
                    leading = value.shape[:-3]
                    self.results[key] = np.empty((*leading, *self.shape, value.shape[-1]), np.float32)
                self.results[key][..., rows, :, :] = value

    def variables(self, names, dims):
        leading = {"quantiles": ("quantile",)}
        return {
            f"{name}_{what}": ((*leading.get(what, ()), *dims[name]), self.results[f"{name}_{what}"])
            for name in names
            for what in self.keep
        }


def check(keep: Sequence[str] | None, num_samples: int) -> None:
    """Refuse what is no selection of statistics.

    Raises:
        ValueError: another name, none at all, or a standard deviation of one draw.
    """
    if keep is None:
        return
    if isinstance(keep, str) or not keep or not set(keep) <= set(STATISTICS):
        raise ValueError(f"keep: needed some of {STATISTICS}, or None for the draws, got {keep!r}")
    if "sd" in keep and num_samples < 2:
        raise ValueError(f"keep: needed num_samples of at least 2 for 'sd', got {num_samples}")


def refuse_too_much(stores: Iterable[Store], max_gib: float, *, keep_helps: bool = True) -> None:
    """Refuse what would not fit, before anything is allocated.

    Args:
        stores: of all recordings.
        max_gib: what they may take together.
        keep_helps: whether the statistics can be asked for in place of draws.

    Raises:
        ValueError: how many GiB it would take, and what to ask for instead.
    """
    stores = list(stores)
    needed = sum(store.needed for store in stores) / 2**30
    if needed <= max_gib:
        return
    ask, num_samples = [], stores[0].num_samples
    if isinstance(stores[0], AllDraws):
        if fewer := int(num_samples * max_gib / needed):
            ask.append(f"num_samples={fewer}")
        kept = [Statistics(num_samples, s.shape, s.sizes, s.trials_at_once, keep=STATISTICS) for s in stores]
        size = sum(store.needed for store in kept) / 2**30
        if keep_helps and size <= max_gib:
            ask.append(f"keep={STATISTICS} ({size:.3g} GiB)")
    else:
        ask.append("fewer draws")
    ask.append("fewer recordings or trials at a time (recs.select(names), recs.take_trials(n))")
    raise ValueError(
        f"needed at most max_gib={max_gib:g} GiB for what is kept of the draws, got {needed:.3g} GiB "
        f"({num_samples} draws, recordings: {len(stores)}); ask for {', '.join(ask)}, or a larger max_gib"
    )


def _fill(arrays, draws, rows, values, exists) -> None:
    for name, value in values.items():
        if exists is not None:
            value = np.where(exists[..., None], value, np.float32(np.nan))
        arrays[name][draws, rows, : value.shape[2]] = value


def _statistic(what: str, drawn: np.ndarray) -> np.ndarray:
    match what:
        case "mean":
            return drawn.mean(0, dtype=np.float64)
        case "sd":
            return drawn.std(0, dtype=np.float64, ddof=1)
        case _:
            return np.quantile(drawn, QUANTILES, axis=0)
