"""What is measured of a fit, recording by recording: forecasts beside their ceilings, flow, embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_metassm import metrics
from pyro_metassm._aligning import align, displacement
from pyro_metassm.experiments import oracle
from pyro_metassm.posterior import forecast, posterior
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit
from pyro_metassm.trees import part

FLOW_TRIALS, FLOW_DRAWS = 16, 10  # of the test trials that the flow is compared on


@dataclass(frozen=True)
class Scoring:
    """How forecasts are scored.

    Attributes:
        context, horizon: bins given, bins forecast.
        k: bins ahead that tables report; None: one Lyapunov time, which the truth then holds.
        num_samples: draws behind a forecast.
    """

    context: int = 50
    horizon: int = 50
    k: int | None = 30
    num_samples: int = 20

    def step(self, recs: Recordings, name: str) -> int:
        """Bins ahead that tables report of a recording."""
        if self.k is not None:
            return min(self.k, self.horizon)
        time = float(recs.truth[name].attrs["lyapunov_time"])
        return min(max(round(time / recs.bin_width), 1), self.horizon)


def rows(
    fit: Fit, test: Recordings, scoring: Scoring, *, counts: bool, embeds: bool, seed: int
) -> list[dict[str, Any]]:
    """A row for every recording of ``test``, which the fit knows.

    Its keys: ``recording``; ``r2``, ``ceiling`` and ``k`` of the forecasts (lists over 1 to ``horizon`` steps, and the
    step that tables report); ``flow_r2`` and ``alignment_r2`` (:func:`flow_scores`); ``embedding`` and
    ``embedding_sd`` (lists; None where the embedding has no meaning); ``rollout_error`` as :func:`pyro_metassm.adapt`
    reports it (None where it did not).
    """
    test = test.crop(0, scoring.context + scoring.horizon)
    curves = forecasts(fit, test, scoring, counts=counts, seed=seed)
    ceilings = oracle.ceilings(test, context=scoring.context, horizon=scoring.horizon, counts=counts)
    reports = fit.attrs.get("adaptation", {})
    found = []
    for name in test.names:
        loc, variance = fit.statistics[fit.names.index(name)].double().chunk(2)
        flow_r2, alignment_r2 = flow_scores(fit, test.select([name]), seed)
        found.append(
            {
                "recording": name,
                "k": scoring.step(test, name),
                "r2": curves[name],
                "ceiling": ceilings[name],
                "flow_r2": flow_r2,
                "alignment_r2": alignment_r2,
                "embedding": loc.tolist() if embeds else None,
                "embedding_sd": variance.sqrt().tolist() if embeds else None,
                "rollout_error": reports.get(name, {}).get("rollout_error"),
            }
        )
    return found


def forecasts(
    fit: Fit, test: Recordings, scoring: Scoring, *, counts: bool, seed: int
) -> dict[str, list[float]]:
    """By recording, variance explained 1 to ``horizon`` steps ahead: of observations, or of the log rates of counts.

    A recording whose forecasts leave the finite numbers, as those of a plain recipe may, scores minus infinity.
    """
    given: dict[str, Any] = {"context": scoring.context, "horizon": scoring.horizon}
    given |= {"num_samples": scoring.num_samples, "seed": seed}
    curve = _log_rates_explained if counts else _explained
    found = {}
    for name in test.names:
        try:
            found[name] = _finite(curve(fit, test.select([name]), given))
        except FloatingPointError:
            found[name] = [-np.inf] * scoring.horizon
    return found


def _explained(fit: Fit, one: Recordings, given: dict[str, Any]) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return metrics.forecast_r2(fit, one, **given).values[0]


def _log_rates_explained(fit: Fit, one: Recordings, given: dict[str, Any]) -> np.ndarray:
    (name,) = one.names
    rates = part(forecast(fit, one, **given), name, "predictions")["rates"].values[0]
    log_rates = np.log(np.maximum(rates.astype(np.float64), 1e-12)).mean(0)
    target = oracle.targets(one, name, given["context"], given["horizon"], counts=True)
    return np.array(oracle.curve(target, log_rates))


def flow_scores(fit: Fit, test: Recordings, seed: int) -> tuple[float, float]:
    """How well the flow of one recording is learned, and how well its latents are.

    The flow is compared in the coordinates of the truth, at the true states of test trials: the share of the variance
    of the noise-free displacements in a bin that the learned ones explain. The map between the latents is the best
    affine one (:func:`pyro_metassm.plots.align`), whose own share of explained variance comes second.
    """
    (name,) = test.names
    some = test.take_trials(min(FLOW_TRIALS, test[name].num_trials))
    try:
        known = align(posterior(fit, some, num_samples=FLOW_DRAWS, seed=seed), name)
    except (np.linalg.LinAlgError, FloatingPointError):  # they do not vary, or leave the finite numbers
        return -np.inf, -np.inf
    truth = some.truth[name]
    states = truth["latents"].values.reshape(-1, truth.sizes["latent_dim"])
    true = oracle.advance(states, truth.attrs, some.bin_width, 1)[:, 0] - states
    learned = displacement(fit, name, known.to_latents(states)) @ known.matrix
    error = np.square(learned - true).sum() / np.square(true - true.mean(0)).sum()
    return _finite(np.array([1 - error]))[0], known.r2


def _finite(values: np.ndarray) -> list[float]:
    return np.where(np.isfinite(values), values, -np.inf).tolist()
