"""Simulated activity beside real activity: the states that are visited, the rhythms, and what each latent carries."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr

from pyro_metassm.analysis._maps import Place, Source, check_recordings, to_numpy
from pyro_metassm.analysis._region import trial_draws, trial_latents
from pyro_metassm.draws import seeded
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit

POINTS = 1000  # states that densities are made of


def state_divergence(
    fit: Fit, recs: Recordings, *, num_draws: int = 20, width: float = 0.1, seed: int = 0
) -> xr.Dataset:
    r"""Do the model's own paths visit the states that the recording does? The divergence of their densities.

    ``KL(p || q)`` in nats, ``p`` of the posterior mean latents of the trials and ``q`` of as many paths of the model
    as long as these, with process noise, from their first states. Both densities are mixtures of Gaussians of
    ``width`` standard deviations of the data along their principal axes, one at each of up to 1000 states, and the
    expectation is the mean over as many draws of ``p``.

    Args:
        fit: a fit that knows the recordings.
        recs: trials of them.
        num_draws: of the embeddings; 0 for their means alone.
        width: of the kernels.
        seed: of the draws and paths.

    Returns:
        ``divergence (recording, draw)``: 0 for the same states, some ``1 / width^2`` for others; and ``reference
        (recording)``, the same between the states of one half of the trials and the other (NaN of a single trial):
        what no model is expected to beat.

    Raises:
        ValueError: as :func:`flow_field`; ``width`` that is not above 0.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> pm.analysis.state_divergence(fit, recs, num_draws=2)["divergence"].dims
        ('recording', 'draw')

    References:
        Koppe et al., PLoS Computational Biology 15 (2019), as D_stsp.
    """
    if not (isinstance(width, int | float) and np.isfinite(width) and width > 0):
        raise ValueError(f"state_divergence: needed a width above 0, got {width!r}")
    check_recordings("state_divergence", recs)
    source = Source("state_divergence", fit, list(recs), num_draws, seed)
    parts = []
    for place in source.places:
        trials = trial_latents(fit, recs, str(place.label), seed)
        real = np.concatenate(trials)
        mean, (axes, sd) = real.mean(0), _axes(real)
        whiten = lambda z: (z - mean) @ axes.T / sd / width  # noqa: B023  (used in this turn of the loop)
        paths = _own_paths(source, place, trials)
        rng = np.random.default_rng(seed)
        found = [_divergence(whiten(real), whiten(own), rng) for own in paths]
        halves = (trials[::2], trials[1::2] or trials)
        first, second = (whiten(np.concatenate(half)) for half in halves)
        reference = _divergence(first, second, rng)
        reference = reference if len(trials) > 1 else np.nan
        parts.append(
            xr.Dataset({"divergence": (("draw",), found, {"units": "nat"}), "reference": ((), reference)})
        )
    return source.stacked(parts)


def power_spectra(fit: Fit, recs: Recordings, *, num_draws: int = 20, seed: int = 0) -> xr.Dataset:
    r"""Power spectra of the latents' principal components, of the trials and of the model's own paths.

    Periodograms with a Hann window over the longest stretch that all trials have, of the deviation from each trial's
    mean, averaged over trials, per Hz: their sum over the frequencies times the spacing is the windowed variance.

    Args:
        fit: a fit that knows the recordings.
        recs: trials of them; their shortest has at least 8 bins.
        num_draws: of the embeddings; 0 for their means alone.
        seed: of the draws and paths.

    Returns:
        over ``recording``, ``component`` (principal axes of the posterior mean latents) and ``frequency`` (Hz):
        ``real``; ``simulated (draw)``, of as many paths with process noise from the trials' first states; and
        ``distance (recording, draw, component)``: the Hellinger distance of both, each over its sum, from 0 to 1.

    Raises:
        ValueError: as :func:`flow_field`; trials shorter than 8 bins.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> pm.analysis.power_spectra(fit, recs, num_draws=2)["real"].dims
        ('recording', 'frequency', 'component')
    """
    check_recordings("power_spectra", recs)
    source = Source("power_spectra", fit, list(recs), num_draws, seed)
    length = min(int(r.lengths.min()) for r in recs.values())
    if length < 8:
        raise ValueError(f"power_spectra: needed trials of at least 8 bins, got one of {length}")
    frequency = np.fft.rfftfreq(length, source.bin_width)
    parts = []
    for place in source.places:
        trials = trial_latents(fit, recs, str(place.label), seed)
        axes, _ = _axes(np.concatenate(trials))
        cut = lambda paths: np.stack([z[:length] for z in paths]) @ axes.T  # noqa: B023
        real = _spectrum(cut(trials), source.bin_width)
        own = _own_paths(source, place, trials, together=False)
        simulated = np.stack([_spectrum(cut(paths), source.bin_width) for paths in own])
        share = lambda x: x / np.maximum(x.sum(0), 1e-300)
        apart = 1 - np.sqrt(share(real) * share(simulated.swapaxes(0, 1)).swapaxes(0, 1)).sum(-2)
        parts.append(
            xr.Dataset(
                {
                    "real": (("frequency", "component"), real),
                    "simulated": (("draw", "frequency", "component"), simulated),
                    "distance": (("draw", "component"), np.sqrt(apart.clip(min=0))),
                },
                coords={"frequency": ("frequency", frequency, {"units": "Hz"})},
            )
        )
    return source.stacked(parts)


def variance_explained(fit: Fit, recs: Recordings, *, num_draws: int = 20, seed: int = 0) -> xr.Dataset:
    r"""How much of the read-out's variance each latent direction of a recording carries.

    The predictor ``C z + d`` over a draw of the latents of all trials has the covariance ``C Cov(z) C^T``, whose
    eigenvalues, falling, are the variances of the components: as many as there are latents, each a direction of the
    latents of its own.

    Args:
        fit: a fit that knows the recordings.
        recs: trials of them.
        num_draws: of the latents (and of global sites, such as a read-out with a prior); 0 for the posterior means.
        seed: of the draws.

    Returns:
        over ``recording``, ``draw`` and ``component``: ``share`` of the predictor's variance, ``cumulative``; ``sd``,
        what it moves the predictor by (of counts the log rate) over the bins, root mean square over neurons: next to
        nothing where a latent says nothing; ``direction (latent_dim)``: the latents that go into it, per standard
        deviation of the component; ``of_latent (recording, draw, latent_dim)``: the share that is left out without
        this latent, which need not sum to 1; ``participation (recording, draw)``: the effective number of components,
        ``(sum v)^2 / sum v^2``.

    Raises:
        ValueError: a recording that the fit does not know.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> found = pm.analysis.variance_explained(fit, recs, num_draws=4)
        >>> dict(found["cumulative"].sizes)
        {'recording': 2, 'draw': 4, 'component': 2}
    """
    check_recordings("variance_explained", recs)
    names = list(recs)
    source = Source("variance_explained", fit, names, num_draws, seed)
    parts = []
    for name, place in zip(names, source.places, strict=True):
        if num_draws:
            draws = np.concatenate(trial_draws(fit, recs, name, num_draws, seed), 1)
        else:
            draws = np.concatenate(trial_latents(fit, recs, name, seed))[None]
        weights = _weights(source, place, len(draws))
        found = [_components(z, weight) for z, weight in zip(draws, weights, strict=True)]
        parts.append(xr.concat(found, "draw"))
    return source.stacked(parts)


def _weights(source: Source, place: Place, number: int) -> np.ndarray:
    """The read-out of a recording for every draw, ``(draw, latent_dim, neuron)``: it is affine in the latents."""
    rows = torch.tensor([place.row], device=source.fit.device)
    neurons = source.model.neurons.num_neurons[place.row or 0]
    eye = torch.eye(source.latent_dim, dtype=torch.float64, device=source.fit.device)
    eye = eye.expand(number, 1, 1, -1, -1)
    with torch.no_grad(), source.model.given(source.of_draws):
        read = lambda x: to_numpy(source.model.read_out(x, rows, neurons))[:, 0, 0]
        return read(eye) - read(torch.zeros_like(eye))


def _components(z: np.ndarray, weight: np.ndarray) -> xr.Dataset:
    """What a draw's states ``(bins, latent_dim)`` carry through a read-out ``(latent_dim, neuron)``."""
    size = z.shape[1]
    covariance = np.atleast_2d(np.cov(z.T, bias=True))
    root = np.linalg.cholesky(covariance + 1e-12 * max(np.trace(covariance), 1e-300) * np.eye(size))
    left, value, _ = np.linalg.svd(root.T @ weight, full_matrices=False)
    variance = np.zeros(size)
    variance[: len(value)] = value**2
    direction = np.full((size, size), np.nan)
    direction[: left.shape[1]] = (root @ left).T
    total = max(variance.sum(), 1e-300)
    without = [1 - np.trace(_without(covariance, k) @ weight @ weight.T) / total for k in range(size)]
    return xr.Dataset(
        {
            "share": (("component",), variance / total),
            "cumulative": (("component",), variance.cumsum() / total),
            "sd": (("component",), np.sqrt(variance / weight.shape[1])),
            "direction": (("component", "latent_dim"), direction),
            "of_latent": (("latent_dim",), np.array(without)),
            "participation": ((), variance.sum() ** 2 / max(np.square(variance).sum(), 1e-300)),
        }
    )


def _without(covariance: np.ndarray, k: int) -> np.ndarray:
    """The covariance of latents of which one is held at its mean."""
    kept = covariance.copy()
    kept[k], kept[:, k] = 0.0, 0.0
    return kept


def _own_paths(source: Source, place, trials: list[np.ndarray], together: bool = True) -> list:
    """Paths of the model as long as these trials, from their first states: of every draw their states, or a list."""
    maps = source.maps(place)
    first = torch.as_tensor(np.stack([z[0] for z in trials]), device=source.fit.device)
    with seeded(source.seed, f"paths {place.label}", source.fit.device):
        paths = to_numpy(maps.noisy_path(len(trials), max(map(len, trials)), first))
    of_draws = [[path[: len(z)] for path, z in zip(draw, trials, strict=True)] for draw in paths]
    return [np.concatenate(draw) for draw in of_draws] if together else of_draws


def _axes(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal axes ``(axis, d)`` and the standard deviations along them."""
    value, vector = np.linalg.eigh(np.atleast_2d(np.cov(z.T, bias=True)))
    return vector.T[::-1], np.sqrt(np.maximum(value[::-1], 1e-12 * max(value[-1], 1e-300)))


def _divergence(p: np.ndarray, q: np.ndarray, rng: np.random.Generator) -> float:
    """``KL(p || q)`` of mixtures of standard Normals at states ``(M, d)``."""
    p, q = (x[rng.choice(len(x), POINTS, replace=False)] if len(x) > POINTS else x for x in (p, q))
    at = p[rng.integers(len(p), size=POINTS)] + rng.standard_normal((POINTS, p.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        return float((_log_density(at, p) - _log_density(at, q)).mean())


def _log_density(at: np.ndarray, centers: np.ndarray) -> np.ndarray:
    exponent = -0.5 * (np.square(at).sum(1)[:, None] + np.square(centers).sum(1) - 2 * at @ centers.T)
    top = exponent.max(1, keepdims=True)
    return (top + np.log(np.exp(exponent - top).mean(1, keepdims=True)))[:, 0]


def _spectrum(x: np.ndarray, bin_width: float) -> np.ndarray:
    """Power per Hz of paths ``(trial, time, component)``, ``(frequency, component)``, one-sided."""
    window = np.hanning(x.shape[1] + 2)[1:-1, None]
    transform = np.fft.rfft((x - x.mean(1, keepdims=True)) * window, axis=1)
    power = np.square(np.abs(transform)).mean(0) * bin_width / np.square(window).sum()
    last = -1 if x.shape[1] % 2 == 0 else None
    power[1:last] *= 2
    return power
