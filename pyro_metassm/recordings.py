"""Data in, checked once: `Recording` (one session), `Recordings` (many), `Batch` (what a model sees)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm import _summary
from pyro_metassm._batch import Batch, collate
from pyro_metassm._recording import Recording
from pyro_metassm._selecting import generator_of, window_of

__all__ = ["Batch", "Recording", "Recordings", "sample_trials"]


class _Truth(dict[str, xr.Dataset]):
    """What is known of recordings by name; a name that is not there is told with those that are."""

    def __missing__(self, name: str) -> xr.Dataset:
        raise checks.lacking("truth of recording", name, self)


class Recordings(Mapping[str, Recording]):
    """Many recordings, by name and in order.

    Args:
        recordings: The recordings; names must differ, bin widths and the dims of inputs must not.
        truth: For simulations: name -> Dataset of what is known of the recording (dims `trial`, `time`, ...).

    Raises:
        ValueError: No recording, a name twice, another bin width or other inputs than the first recording's.

    Example:
        >>> recs = Recordings([Recording(name, np.ones((8, 50, 3)), bin_width=0.02) for name in "ab"])
        >>> recs.names, recs["a"].num_trials, recs.num_trials
        (('a', 'b'), 8, 16)
    """

    def __init__(
        self, recordings: Iterable[Recording], *, truth: Mapping[str, xr.Dataset] | None = None
    ) -> None:
        recordings = list(recordings)
        if not recordings or not all(isinstance(recording, Recording) for recording in recordings):
            raise ValueError(
                f"recordings: needed at least one Recording, got {recordings!r}; pass a list of pm.Recording"
            )
        self._recordings = {recording.name: recording for recording in recordings}
        names = [recording.name for recording in recordings]
        if len(self._recordings) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise checks.fail(checks.some(twice), "one recording of a name", "several", "rename them")
        first = recordings[0]
        for other in recordings[1:]:
            if not np.isclose(other.bin_width, first.bin_width, rtol=1e-6):
                raise checks.fail(
                    other.name,
                    f"the bin width of {first.name!r} ({first.bin_width:g} s)",
                    f"{other.bin_width:g} s",
                    "bin all recordings alike (dynamics are learned per bin)",
                )
            if other.num_inputs != first.num_inputs:
                raise checks.fail(
                    other.name,
                    f"as many dims of inputs as {first.name!r} has ({first.num_inputs})",
                    f"{other.num_inputs}",
                    "give every recording the same inputs (zeros where there was none)",
                )
        self.truth = _Truth(truth or {})
        for name, dataset in self.truth.items():
            sizes = {"trial": self[name].num_trials, "time": self[name].num_bins}
            if any(dataset.sizes.get(dim, size) != size for dim, size in sizes.items()):
                raise checks.fail(
                    name, f"a truth with {sizes}", f"{dict(dataset.sizes)}", "use the same trials and bins"
                )

    def __getitem__(self, name: str) -> Recording:
        if name not in self._recordings:
            raise checks.lacking("recording", name, self)
        return self._recordings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._recordings)

    def __len__(self) -> int:
        return len(self._recordings)

    def __repr__(self) -> str:
        return "Recordings([\n" + "".join(f"    {recording!r},\n" for recording in self.values()) + "])"

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(self._recordings)

    @property
    def bin_width(self) -> float:
        """The bin width of all recordings, in seconds."""
        return next(iter(self.values())).bin_width

    @property
    def num_trials(self) -> int:
        """Trials of all recordings together."""
        return sum(recording.num_trials for recording in self.values())

    def _with(self, recordings: Iterable[Recording], **isel: Mapping[str, Any]) -> Recordings:
        """Some recordings changed, with the truth cut by `isel` (dim -> name -> indices)."""
        recordings = list(recordings)
        truth = {
            recording.name: self.truth[recording.name].isel(
                {dim: by_name[recording.name] for dim, by_name in isel.items()}, missing_dims="ignore"
            )
            for recording in recordings
            if recording.name in self.truth
        }
        return Recordings(recordings, truth=truth)

    def select(self, names: Iterable[str]) -> Recordings:
        """The recordings of these names, in this order (KeyError for an unknown one).

        Example:
            >>> recs = Recordings([Recording(name, np.ones((8, 50, 3)), bin_width=0.02) for name in "abc"])
            >>> recs.select(["c", "a"]).names, recs.drop(["c"]).names
            (('c', 'a'), ('a', 'b'))
        """
        return self._with(self[name] for name in ([names] if isinstance(names, str) else names))

    def drop(self, names: Iterable[str]) -> Recordings:
        """All recordings but these (KeyError for an unknown one); see `select`."""
        dropped = self.select(names).names
        return self._with(recording for name, recording in self.items() if name not in dropped)

    def take_trials(self, n: int, seed: int = 0) -> Recordings:
        """`n` trials of each recording, drawn at random and kept in their order.

        A recording's trials depend on `seed` and its name alone, and the trials of a smaller `n` are among
        those of a larger one.

        Args:
            n: Trials of each recording.
            seed: Of the draw.

        Returns:
            New recordings.

        Raises:
            ValueError: A recording with fewer trials.

        Example:
            >>> recs = Recordings([Recording(name, np.ones((8, 50, 3)), bin_width=0.02) for name in "ab"])
            >>> recs.take_trials(3).num_trials
            6
        """
        chosen = {}
        for name, recording in self.items():
            if not 1 <= n <= recording.num_trials:
                raise checks.fail(
                    name, f"{n} trials", f"{recording.num_trials}", "ask for at least 1, at most all"
                )
            chosen[name] = np.sort(generator_of("take", name, seed).permutation(recording.num_trials)[:n])
        return self._with((self[name].take(chosen[name]) for name in self), trial=chosen)

    def split(self, test_fraction: float = 0.25, seed: int = 0) -> tuple[Recordings, Recordings]:
        """Training and test trials, split at random within every recording.

        A recording's split depends on `seed`, its name and its number of trials alone.

        Args:
            test_fraction: Share of the trials to test on, between 0 and 1; at least one trial on each side.
            seed: Of the draw.

        Returns:
            `(train, test)`, trials in their order.

        Raises:
            ValueError: A recording of one trial, or a fraction outside (0, 1).

        Example:
            >>> recs = Recordings([Recording(name, np.ones((8, 50, 3)), bin_width=0.02) for name in "ab"])
            >>> train, test = recs.split()
            >>> train["a"].num_trials, test["a"].num_trials
            (6, 2)
        """
        if not 0 < test_fraction < 1:
            raise ValueError(
                f"split: needed a test_fraction between 0 and 1, got {test_fraction}; use such as 0.25"
            )
        train, test = {}, {}
        for name, recording in self.items():
            trials = recording.num_trials
            if trials < 2:
                raise checks.fail(name, "at least 2 trials to split", f"{trials}", "drop the recording first")
            order = generator_of("split", name, seed).permutation(trials)
            num_test = min(max(round(test_fraction * trials), 1), trials - 1)
            test[name], train[name] = np.sort(order[:num_test]), np.sort(order[num_test:])
        first, second = (
            self._with((self[name].take(part[name]) for name in self), trial=part) for part in (train, test)
        )
        return first, second

    def ends(self, share: float = 1 / 3) -> tuple[Recordings, Recordings]:
        """The first and the last trials of every recording, as many of each, in their order.

        Args:
            share: Of the trials at each end, at most a half.

        Returns:
            `(first, last)`.

        Raises:
            ValueError: A share that is not within (0, 0.5], or a recording with too few trials for it.

        Example:
            >>> recs = Recordings([Recording(name, np.ones((9, 50, 3)), bin_width=0.02) for name in "ab"])
            >>> first, last = recs.ends()
            >>> first["a"].num_trials, last["a"].num_trials
            (3, 3)
        """
        if not 0 < share <= 0.5:
            raise ValueError(f"ends: needed a share within (0, 0.5], got {share}; use such as 1/3")
        first, last = {}, {}
        for name, recording in self.items():
            trials = recording.num_trials
            number = int(share * trials + 1e-9)
            if number < 1:
                raise checks.fail(
                    name, f"a trial in {share:.3g} of them", f"{trials} trials", "drop it first"
                )
            first[name], last[name] = np.arange(number), np.arange(trials - number, trials)
        one, other = (
            self._with((self[name].take(part[name]) for name in self), trial=part) for part in (first, last)
        )
        return one, other

    def crop(self, start: int | None, stop: int | None) -> Recordings:
        """All recordings in a window of time bins; see `Recording.crop`.

        Example:
            >>> recs = Recordings([Recording(name, np.ones((8, 50, 3)), bin_width=0.02) for name in "ab"])
            >>> recs.crop(0, 30)["b"].num_bins
            30
        """
        windows = {name: slice(*window_of(name, start, stop, rec.num_bins)) for name, rec in self.items()}
        return self._with((recording.crop(start, stop) for recording in self.values()), time=windows)

    def smooth(self, sd_s: float) -> Recordings:
        """All recordings smoothed over time by a Gaussian of `sd_s` seconds; see `Recording.smooth`.

        Example:
            >>> recs = Recordings([Recording(name, np.ones((8, 50, 3)), bin_width=0.02) for name in "ab"])
            >>> recs.smooth(0.05)["b"].has_counts
            False
        """
        return self._with(recording.smooth(sd_s) for recording in self.values())

    def summary(self) -> xr.Dataset:
        """A table of the recordings, and a warning for each one with something that will hurt a fit.

        Each finding is told in words, with its number and what to do, and nothing is removed: silent (constant or never
        observed) and near-silent neurons (counts below 0.1 Hz), duplicated neurons (correlation of their series above
        0.999), counts that coincide bin by bin (correlation above 0.8, of their changes too), drift of the mean over
        the session or of many neurons, trials out of line with the others, bins too fine (fewer than 0.01 counts
        each), fewer than 10 trials, fewer than 10 bins for each neuron.

        Returns:
            Dataset over `recording`: `num_trials`, `num_neurons`, `bins_min`, `bins_max`, `missing_fraction`,
            `mean_per_bin`, `trials_per_neuron`, `bins_per_neuron`, `silent_neurons`, `rare_neurons`,
            `duplicated_neurons` (copies beyond the first), `coinciding_neurons`, `drift` (change of the mean activity
            from the first to the last trial of a straight line through the trials, as a share of the mean),
            `drift_correlation` (of the activity's rank with the order), `drifting_neurons`, `odd_trials`, and
            `findings`: a line for each.

        Example:
            >>> rng = np.random.default_rng(0)
            >>> recs = Recordings([Recording("a", rng.poisson(1.0, (12, 50, 3)), bin_width=0.02)])
            >>> int(recs.summary()["silent_neurons"].sel(recording="a"))
            0
        """
        return _summary.table(list(self.values()))

    def batch(
        self,
        table: Sequence[str],
        *,
        trials: Mapping[str, Any] | None = None,
        names: Iterable[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Trials of many recordings, padded into the tensors that a model and a guide take.

        Args:
            table: The names that the model knows; a recording's place in it is its row in the model's tables.
            trials: name -> integer indices of its trials; all trials of a recording that is not in it.
            names: The recordings of the batch (all).
            dtype: Of the observations and inputs.
            device: Where to.

        Returns:
            The batch.

        Raises:
            ValueError: A recording that `table` lacks, trials of a recording that is not in the batch, or a
                trial that is not there.

        Example:
            >>> recs = Recordings([Recording(name, np.ones((8, 50, 3)), bin_width=0.02) for name in "ab"])
            >>> recs.batch(recs.names, trials={"a": [0, 1], "b": [3]}).observations.shape
            torch.Size([2, 2, 50, 3])
        """
        return collate(
            self, table, trials=trials or {}, names=names, dtype=dtype, device=torch.device(device)
        )


def sample_trials(
    recs: Recordings,
    trials_per_step: int | None,
    rng: np.random.Generator,
    recordings_per_step: int | None = None,
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Draw recordings and trials for one step of training, uniformly and without replacement.

    Args:
        recs: The training data.
        trials_per_step: Trials of each recording; one with fewer gives all (None: all of every one).
        rng: The source of randomness.
        recordings_per_step: Recordings of the step (None: all).

    Returns:
        The names, in the order of `recs`, and name -> sorted trial indices, as `Recordings.batch` takes both.

    Raises:
        ValueError: Fewer than one trial or recording asked for.

    Example:
        >>> recs = Recordings([Recording(name, np.ones((8, 50, 3)), bin_width=0.02) for name in "ab"])
        >>> names, trials = sample_trials(recs, 4, np.random.default_rng(0))
        >>> recs.batch(recs.names, names=names, trials=trials).trial_scale.flatten()
        tensor([2., 2.])
    """
    for what, number in (("trials_per_step", trials_per_step), ("recordings_per_step", recordings_per_step)):
        if number is not None and number < 1:
            raise ValueError(f"{what}: needed at least 1, got {number}; pass None for all")

    def draw(size: int, number: int | None) -> np.ndarray:
        return (
            np.arange(size)
            if number is None or number >= size
            else np.sort(rng.choice(size, number, replace=False))
        )

    names = tuple(recs.names[i] for i in draw(len(recs), recordings_per_step))
    return names, {name: draw(recs[name].num_trials, trials_per_step) for name in names}
