"""How many latents, and how large an embedding? Held-out scores of a grid of models, and the smallest that will do."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm._mean_rates import mean_forecasts, mean_rates
from pyro_metassm._scores import gained, ratio
from pyro_metassm._selecting import generator_of
from pyro_metassm.draws import forecast_trials
from pyro_metassm.guides import DKF
from pyro_metassm.likelihoods import Gaussian, Likelihood, Poisson
from pyro_metassm.models import MetaSSM
from pyro_metassm.observations import counted
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.result import Fit
from pyro_metassm.specification import of_recordings
from pyro_metassm.training import fit as train_fit
from pyro_metassm.writing import write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HELD_OUT = 0.25  # of the neurons, where none are marked
SCORES = ("co_smoothing", "forecast")


@dataclass(frozen=True, eq=False)
class Suggestion:
    """What :func:`suggest_dims` found.

    Attributes:
        latent_dim, embedding_dim: the suggestion.
        table: a row for each cell: the dims, and of ``co_smoothing`` and ``forecast`` the mean over recordings of the
            held-out score, its difference from the best cell's and the standard error of that over trials (``_se``);
            ``within``: both differences are within one standard error; ``suggested``.
        unit: of the scores, "bits per spike" or "share of variance".
    """

    latent_dim: int
    embedding_dim: int
    table: pd.DataFrame
    unit: str

    def plot(self, axes: Sequence[Axes] | None = None) -> np.ndarray:
        """Both scores over ``latent_dim``, a line for each ``embedding_dim``; the suggestion is ringed."""
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(1, len(SCORES), figsize=(9, 3.5), layout="constrained")
        for ax, score in zip(axes, SCORES, strict=True):
            for embedding_dim, rows in self.table.groupby("embedding_dim"):
                errors = rows[f"{score}_se"].fillna(0.0)
                ax.errorbar(
                    rows["latent_dim"],
                    rows[score],
                    errors,
                    marker="o",
                    label=f"embedding_dim={embedding_dim}",
                )
            chosen = self.table[self.table["suggested"]]
            ax.plot(chosen["latent_dim"], chosen[score], "o", markersize=14, color="black", fillstyle="none")
            ax.set_xlabel("latent_dim")
            ax.set_ylabel(f"{score.replace('_', '-')} ({self.unit})")
        axes[-1].legend(frameon=False, fontsize="small")
        return np.asarray(axes)


def suggest_dims(
    recs: Recordings,
    *,
    latent_dim: Sequence[int] = (2, 4, 8, 16),
    embedding_dim: Sequence[int] = (1, 2, 3),
    likelihood: type[Likelihood] | None = None,
    context: int | None = None,
    horizon: int | None = None,
    test_fraction: float = 0.25,
    num_samples: int = 25,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Suggestion:
    r"""The smallest model whose held-out scores are within one standard error of the best.

    Every cell of the grid is fitted to the same training trials and scored on the same others: co-smoothing (of neurons
    that the guide does not see; a quarter of each recording's, where none are marked), forecasts of ``horizon`` bins.
    Of the cells that are within one standard error of the best by both (paired, over trials), the one with the fewest
    latents is suggested, then with the smallest embedding; where no cell is, co-smoothing alone decides.

    Args:
        recs: the recordings.
        latent_dim, embedding_dim: the grid; of a single recording only the smallest embedding is tried.
        likelihood: a family; None: Poisson if all are counts, else Gaussian.
        context: bins given to forecasts; None: half of the usual length of a trial.
        horizon: bins forecast; None: up to the usual length.
        test_fraction: share of the trials to score on.
        num_samples: draws behind means.
        folder: keeps a file for each cell: the same call goes on where it was stopped.
        seed: of the split, the held-out neurons and the fits.
        progress: show a progress bar.
        options: of :class:`~pyro_metassm.models.MetaSSM` (``rank``, ``hidden_dim``) and :func:`pyro_metassm.fit`
            (``num_steps``, ...).

    Returns:
        the :class:`Suggestion`: ``latent_dim``, ``embedding_dim``, ``table`` and ``plot()``.

    Raises:
        ValueError: an empty grid, sizes below 1, no held-out neuron that can be scored, a folder of other recordings
            or options.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> options = {"num_steps": 5, "warm_start_steps": 5, "num_samples": 4, "progress": False}
        >>> found = pm.suggest_dims(recs, latent_dim=(1, 2), embedding_dim=(1,), **options)
        >>> len(found.table), found.embedding_dim
        (2, 1)
    """
    for name, grid in (("latent_dim", latent_dim), ("embedding_dim", embedding_dim)):
        if np.ndim(grid) != 1 or not len(grid):
            raise ValueError(f"suggest_dims: needed a list of one or more {name} to try, got {grid!r}")
        checks.integers(1, **{f"{name}[{n}]": size for n, size in enumerate(grid)})
    problem = _Problem.of(recs, likelihood, context, horizon, test_fraction, num_samples, seed, options)
    sizes = sorted(set(embedding_dim))[: None if len(recs) > 1 else 1]
    cells = [(latents, size) for latents in sorted(set(latent_dim)) for size in sizes]
    if folder is not None:
        problem.claim(Path(folder))
    found = {}
    for cell in tqdm(cells, disable=not progress, desc="suggest_dims", dynamic_ncols=True):
        path = None if folder is None else Path(folder) / f"latent-{cell[0]}-embedding-{cell[1]}.json"
        if path is not None and path.is_file():
            found[cell] = json.loads(path.read_text(encoding="utf-8"))
            continue
        found[cell] = problem.scores(latent_dim=cell[0], embedding_dim=cell[1])
        if path is not None:
            write_json(found[cell], path)
    table, (latents, size) = _choose(found)
    counts = {bool(of["counts"]) for of in found.values()}
    return Suggestion(latents, size, table, "bits per spike" if counts == {True} else "share of variance")


def search_objective(
    recs: Recordings,
    *,
    latent_dim: tuple[int, int] = (2, 24),
    embedding_dim: tuple[int, int] = (1, 4),
    rank: tuple[int, int] = (1, 6),
    learning_rate: tuple[float, float] = (1e-3, 2e-2),
    num_steps: tuple[int, int] = (200, 2000),
    likelihood: type[Likelihood] | None = None,
    context: int | None = None,
    horizon: int | None = None,
    test_fraction: float = 0.25,
    num_samples: int = 25,
    seed: int = 0,
    **options: Any,
) -> Callable[[Any], float]:
    """What optuna maximises in a wider search: held-out co-smoothing plus the forecast score, means over recordings.

    ``optuna.create_study(direction="maximize", storage=...).optimize(pm.search_objective(recs), n_trials=50)``; a study
    with a storage resumes. Install it with ``pip install "pyro-metassm[search]"``.

    Args:
        recs: the recordings.
        latent_dim, embedding_dim, rank, learning_rate, num_steps: ranges, both ends included.
        likelihood, context, horizon, test_fraction, num_samples, seed, options: as of :func:`suggest_dims`.

    Returns:
        a function of an optuna trial; the two scores are kept in its ``user_attrs``.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> objective = pm.search_objective(recs, latent_dim=(1, 4), num_steps=(5, 50))
        >>> # study = optuna.create_study(direction="maximize"); study.optimize(objective, n_trials=20)
    """
    problem = _Problem.of(recs, likelihood, context, horizon, test_fraction, num_samples, seed, options)

    def objective(trial: Any) -> float:
        chosen = {
            name: trial.suggest_int(name, *bounds)
            for name, bounds in (("latent_dim", latent_dim), ("embedding_dim", embedding_dim), ("rank", rank))
        }
        chosen["learning_rate"] = trial.suggest_float("learning_rate", *learning_rate, log=True)
        chosen["num_steps"] = trial.suggest_int("num_steps", *num_steps, log=True)
        found = problem.scores(**chosen)
        scores = {score: _mean(found, score) for score in SCORES}
        for score, value in scores.items():
            trial.set_user_attr(score, value)
        return sum(scores.values())

    return objective


@dataclass(frozen=True)
class _Problem:
    """Training and test trials, and what is the same for all models."""

    train: Recordings
    test: Recordings
    likelihood: type[Likelihood]
    context: int
    horizon: int
    num_samples: int
    seed: int
    options: dict[str, Any]

    @classmethod
    def of(cls, recs, likelihood, context, horizon, test_fraction, num_samples, seed, options) -> _Problem:
        marked = Recordings([_with_held_out(recording, seed) for recording in recs.values()])
        if not any(recording.held_out_neurons.any() for recording in marked.values()):
            raise ValueError(
                "suggest_dims: needed a recording of two or more neurons, to hold one out; got none"
            )
        train, test = marked.split(test_fraction, seed)
        usual = min(int(np.median(recording.lengths)) for recording in recs.values())
        context = max(1, usual // 2) if context is None else context
        horizon = max(1, usual - context) if horizon is None else horizon
        checks.integers(1, context=context, horizon=horizon, num_samples=num_samples)
        counts = all(recording.has_counts for recording in recs.values())
        family = likelihood or (Poisson if counts else Gaussian)
        return cls(train, test, family, context, horizon, num_samples, seed, dict(options))

    def claim(self, folder: Path) -> None:
        """Write what decides the scores into the folder, or see that what is there is the same."""
        mine = {
            "train": of_recordings(self.train),
            "test": of_recordings(self.test),
            "likelihood": self.likelihood.__name__,
            "window": [self.context, self.horizon],
            "num_samples": self.num_samples,
            "seed": self.seed,
            "options": {key: repr(value) for key, value in sorted(self.options.items())},
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "problem.json"
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != mine:
            raise ValueError(
                f"{folder}: needed a folder of the same recordings and options, got one of others"
            )
        path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")

    def scores(self, **chosen: Any) -> dict[str, Any]:
        """By score and recording: what every test trial gains, and its size; whether the model has all as counts."""
        fit = self.fit(**chosen)
        counts = {name: bool(counted(fit.model, name).all()) for name in self.test}
        found: dict[str, Any] = {score: {} for score in SCORES} | {"counts": all(counts.values())}
        for name, recording in self.test.items():
            rates = mean_rates(fit, self.test, name, self.num_samples, self.seed)
            unseen = recording.held_out_neurons
            found["co_smoothing"][name] = _gains(
                rates[..., unseen], recording.observations[..., unseen], counts[name]
            )
            with warnings.catch_warnings():  # the same short trials are told of for every cell
                warnings.filterwarnings("ignore", "recording .* trials have no bin after context")
                trials = forecast_trials(self.test, name, self.context, scored=True)
            window = slice(self.context, self.context + self.horizon)
            ahead = mean_forecasts(
                fit, self.test, name, trials, self.context, self.horizon, self.num_samples, self.seed
            )
            seen = recording.observations[trials, window]
            gains = _gains(ahead[:, : seen.shape[1]], seen, counts[name])
            found["forecast"][name] = gains
        return found

    def fit(self, **chosen: Any) -> Fit:
        options = self.options | chosen
        of_model = {key: options.pop(key) for key in ("rank", "hidden_dim") if key in options}
        dims = {key: options.pop(key) for key in ("latent_dim", "embedding_dim")}
        with machine.random_forked():
            torch.manual_seed(self.seed)
            model = MetaSSM(self.train, likelihood=self.likelihood, **dims, **of_model)
            guide = DKF(model)
        return train_fit(model, guide, self.train, seed=self.seed, progress=False, **options)


def _with_held_out(recording: Recording, seed: int) -> Recording:
    if recording.held_out_neurons.any() or recording.num_neurons < 2:
        return recording
    number = max(1, round(HELD_OUT * recording.num_neurons))
    held_out = np.zeros(recording.num_neurons, bool)
    order = generator_of("neurons", recording.name, seed).permutation(recording.num_neurons)
    held_out[order[:number]] = True
    return recording._replace(held_out_neurons=held_out)


def _gains(rates: np.ndarray, y: np.ndarray, counts: bool) -> list[list[float]]:
    """Of every trial: bits gained over mean rates and spikes, or variance explained and variance."""
    if counts:
        nats, spikes = gained(rates, y)
        return [(nats / np.log(2)).tolist(), spikes.tolist()]
    mean = np.nansum(y, (0, 1)) / np.maximum((~np.isnan(y)).sum((0, 1)), 1)
    total = np.nansum((y - mean) ** 2, (1, 2))
    return [(total - np.nansum((y - rates) ** 2, (1, 2))).tolist(), total.tolist()]


def _mean(found: dict, score: str) -> float:
    values = [ratio(*map(np.array, pair))[0] for pair in found[score].values()]
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _choose(found: dict[tuple[int, int], dict]) -> tuple[pd.DataFrame, tuple[int, int]]:
    """The table of all cells, and the smallest within one standard error of the best."""
    rows: dict[tuple[int, int], dict[str, Any]] = {
        cell: dict(zip(("latent_dim", "embedding_dim"), cell, strict=True)) for cell in found
    }
    within: dict[tuple[int, int], dict[str, bool]] = {cell: {} for cell in found}
    for score in SCORES:
        means = {cell: _mean(of, score) for cell, of in found.items()}
        best = max(means, key=means.__getitem__)
        for cell, of in found.items():
            pairs = [
                ratio(np.array(of[score][name][0]) - np.array(top[0]), np.array(top[1]))
                for name, top in found[best][score].items()
            ]
            errors = np.array([error for _, error in pairs])
            error = float(np.sqrt(np.nansum(errors**2)) / max(np.isfinite(errors).sum(), 1))
            difference = means[cell] - means[best]
            rows[cell] |= {score: means[cell], f"{score}_difference": difference, f"{score}_se": error}
            within[cell][score] = difference >= -error
    both = [cell for cell, of in within.items() if all(of.values())]
    chosen = min(both or [cell for cell, of in within.items() if of[SCORES[0]]], default=None)
    if chosen is None:
        raise ValueError(
            "suggest_dims: needed held-out neurons with spikes (or that vary) in the test trials, got none; leave out "
            "silent neurons first, recs.summary() counts them"
        )
    for cell, row in rows.items():
        row |= {"within": all(within[cell].values()), "suggested": cell == chosen}
    return pd.DataFrame(list(rows.values())), chosen
