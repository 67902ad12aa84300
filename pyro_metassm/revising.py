"""A fit's dynamics with their uncertainty: the last layer of the shared network as a latent, given all recordings."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm.dynamics import AdaptedMLP, ResidualMLP
from pyro_metassm.global_sites import declared
from pyro_metassm.last_layer import information, last_hidden
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.models.revised import Revised, kernel, with_last_layer
from pyro_metassm.observations import of_single_neurons
from pyro_metassm.rebuilding import construct
from pyro_metassm.recordings import Batch, Recordings
from pyro_metassm.result import Fit, check_fit
from pyro_metassm.tempering import tempered
from pyro_metassm.windows import roll_out

HOOKS = (
    "adapt_dynamics", "dynamics_of", "embedding_prior", "embedding_prior_of", "forward", "initial_state", "likelihood",
    "path_prior", "transition", "trial_embedding",
)  # fmt: skip
REACHES = (0.1, 0.3, 1.0, 3.0)  # of the process, over the spread of the embeddings
VARIANCES = 10.0 ** np.arange(-12.0, 3.0, 0.5)  # of a weight
LEAST = 1e-4, 1e-7  # of the largest variance: features and functions below it are left out
HELD_BY, HELD_BINS = 8, 25  # draws and bins of the roll-outs that a revision must not make worse
WORSE = 1.01  # times the error of none is no worse: draws have spread
MOST_DIRECTIONS, MOST_FUNCTIONS, MOST_FEATURES = 1600, 32, 24
Spectrum = tuple[Tensor, Tensor, Tensor]  # of information: eigenvalues, vectors, and the slope along them


@machine.alone()
def revise(fit: Fit, recs: Recordings, *, num_trials: int = 32, num_rounds: int = 2) -> Fit:
    r"""Correct a fit's dynamics by what its recordings say of their last layer, and tell how sure that is.

    Networks are trained to point estimates, and what is wrong with them is in no draw of the embedding. Here the
    dynamics become ``f_e(z) + W(e) [h_e(z); 1]``, ``h_e`` the last hidden layer, with ``W`` a Gaussian process over
    embeddings (:class:`~pyro_metassm.models.Revised`), whose size and reach are those of most evidence. Its posterior
    given all recordings has a closed form once the paths of states are linearised around the likeliest ones, and the
    states themselves are integrated out (:mod:`~pyro_metassm.last_layer`); it is found by Gauss-Newton steps.
    Read-outs, noise, the other layers and the means of the embeddings are taken as they are. Where draws of ``W`` would
    roll out worse than none, its size is less. Counts are seen as more dispersed than a Poisson likelihood has them,
    so that bursts do not decide.

    Args:
        fit: of a :class:`~pyro_metassm.models.MetaSSM`, or of a subclass that names another ``dynamics_class`` and
            has no hooks of its own; or what this function returned, of which ``W`` is then found anew.
        recs: recordings that the fit was trained on or adapted to. Few trials of many recordings say more than many of
            few; between recordings ``W`` is a guess. So adapt a fit first, then revise it: for forecasts of a new
            recording its own trials suffice, for maps of its dynamics (``docs/calibration.md``) take all recordings.
        num_trials: of every recording, spread over it; seconds and certainty grow with it.
        num_rounds: Gauss-Newton steps; paths are smoothed anew in each.

    Returns:
        a fit of :class:`~pyro_metassm.models.Revised`: everything done with a fit draws ``W`` with the rest.
        ``attrs["revision"]``: ``evidence`` (nats above that of the fit as it was), ``reach``, ``sd`` of a weight.

    Raises:
        ValueError: a recording that the fit does not know or has not been trained on, a model with other hooks, a
            likelihood of all neurons together.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> revised = pm.revise(fit, recs)
        >>> pm.analysis.fixed_points(revised, "w=5", num_draws=4)["position"].dims
        ('draw', 'fixed_point', 'latent_dim')
    """
    check_fit(fit)
    checks.integers(num_trials=num_trials, num_rounds=num_rounds)
    base = _base(fit, recs)
    sources = [_Source.of(base, fit, recs, name, num_trials) for name in recs]
    features = _features(sources, base.latent_dim)
    size = features.shape[1], base.latent_dim
    at = torch.stack([s.embedding for s in sources])
    weights = torch.zeros(len(sources), size[0] * size[1]).to(at)
    process: Process | None = None
    seen = tempered(base)  # bursts of counts, taken at their word, send paths astray
    for _ in range(num_rounds):
        found = [
            information(seen, s.dynamics, features, w.unflatten(0, size), s.paths, s.batch)
            for s, w in zip(sources, weights, strict=True)
        ]
        for source, info in zip(sources, found, strict=True):
            source.paths = info.paths.unsqueeze(0)
        matrix = torch.stack([info.matrix for info in found])
        # As from no change: where the parabola has its top does not depend on where it was looked at.
        slope = torch.stack([info.slope.sum(0) for info in found]) + (matrix @ weights.unsqueeze(-1)).squeeze(
            -1
        )
        if process is None:
            process = _likeliest(at, slope, matrix)
        spectrum = process.spectrum(slope, matrix)
        process = _held(process, spectrum, features, sources)
        mean, variances = process.posterior(spectrum)
        weights = process.of_places @ mean.unflatten(0, (-1, size[0] * size[1]))
    assert process is not None
    revised = _revised(fit, features, process, mean, variances, spectrum[1])
    report = {"evidence": process.log_evidence(spectrum), "reach": process.reach, "sd": process.variance**0.5}
    return dataclasses.replace(revised, attrs=fit.attrs | {"revision": report})


@dataclasses.dataclass
class _Source:
    """A recording: some of its trials, its dynamics in double precision, and smoothed paths."""

    batch: Batch
    embedding: Tensor  # (embedding_dim,)
    dynamics: AdaptedMLP
    paths: Tensor  # (1, K, T, latent_dim)
    read_out: Tensor  # (neuron, latent_dim)

    @classmethod
    @torch.no_grad()
    def of(cls, model, fit: Fit, recs: Recordings, name: str, num_trials: int) -> _Source:
        number, row = recs[name].num_trials, fit.names.index(name)
        trials = np.unique(np.linspace(0, number - 1, min(num_trials, number)).round().astype(np.int64))
        batch, rough = (
            recs.batch(fit.names, names=[name], trials={name: trials}, dtype=dtype, device=fit.device)
            for dtype in (torch.float64, fit.dtype)
        )
        e = fit.guide.embedding_posterior(fit.statistics[[row]]).mean.double()
        _, paths, _ = fit.guide.common_space(rough)
        read_out = model.read_out.weight[fit.model.neurons.slice(name)]
        return cls(batch, e[0, 0], model.dynamics_of(e, batch.recording), paths.double(), read_out)


@dataclasses.dataclass(frozen=True)
class Process:
    """Last layers as a Gaussian process over embeddings, ``b(e) = sum_m psi_m(e) c_m``, ``c ~ Normal(0, variance I)``.

    Attributes:
        places: ``(M, embedding_dim)``.
        reach: of its kernel.
        functions: ``(M, F)``: ``psi(e) = k(e, places) functions``, and ``psi(e) psi(e')^T`` is about the kernel.
        of_places: ``psi`` there, ``(M, F)``.
        variance: of a weight.
    """

    places: Tensor
    reach: float
    functions: Tensor
    of_places: Tensor
    variance: float = 1.0

    @classmethod
    def over(cls, places: Tensor, reach: float, most: int) -> Process:
        """With at most so many functions: of the others the kernel is made as well as it can."""
        gram = kernel(places, places, reach)
        values, vectors = torch.linalg.eigh(gram)
        keep = (values > LEAST[1] * values[-1]) & (values >= values[-min(most, len(values))])
        functions = vectors[:, keep] * values[keep].rsqrt()
        return cls(places, reach, functions, gram @ functions)

    def spectrum(self, slope: Tensor, matrix: Tensor) -> Spectrum:
        """What recordings at the places say, ``(M, p)`` and ``(M, p, p)``, of all ``c`` together.

        Information is a small difference of large numbers, the larger the less of the states is observed: as far as
        its eigenvalues are negative, positive ones are no more than rounding, and neither are slopes along them.
        """
        functions, size = self.of_places.shape[1], self.of_places.shape[1] * slope.shape[1]
        total = torch.zeros(functions, slope.shape[1], functions, slope.shape[1]).to(slope)
        for psi, own in zip(self.of_places, matrix, strict=True):
            total += torch.einsum("a,b,pq->apbq", psi, psi, own)
        values, vectors = torch.linalg.eigh(total.reshape(size, size))
        said = values > -values[0].clamp(max=0.0)
        return values * said, vectors, vectors.mT @ (self.of_places.mT @ slope).flatten() * said

    def log_evidence(self, spectrum: Spectrum, variance: float | None = None) -> float:
        """In nats above that of no change; of this variance, or of another."""
        values, _, slope = spectrum
        v = self.variance if variance is None else variance
        return 0.5 * float((v * slope.square() / (1 + v * values) - torch.log1p(v * values)).sum())

    def posterior(self, spectrum: Spectrum) -> tuple[Tensor, Tensor]:
        """Mean of all ``c``, ``(F p,)``, and their variances along the vectors of the spectrum."""
        values, vectors, slope = spectrum
        variances = 1 / (values + 1 / self.variance)
        return vectors @ (variances * slope), variances


def _likeliest(places: Tensor, slope: Tensor, matrix: Tensor) -> Process:
    """The process of most evidence."""
    spread = float((places - places.mean(0)).square().sum(1).mean().sqrt()) or 1.0
    most = min(MOST_FUNCTIONS, max(1, MOST_DIRECTIONS // slope.shape[1]))
    best, process = -np.inf, None
    for reach in REACHES if len(places) > 1 else (1.0,):
        candidate = Process.over(places, reach * spread, most)
        spectrum = candidate.spectrum(slope, matrix)
        for variance in VARIANCES.tolist():
            log_evidence = candidate.log_evidence(spectrum, variance)
            if log_evidence > best:
                best, process = log_evidence, dataclasses.replace(candidate, variance=variance)
    assert process is not None
    return process


def _held(process: Process, spectrum: Spectrum, features: Tensor, sources: list[_Source]) -> Process:
    """The process, its variance so small that draws of its posterior forecast no worse than none.

    What information leaves open may still be unstable: states that observations do not show let evidence be high for
    dynamics that explode.
    """
    functions, directions = process.of_places.shape[1], len(spectrum[0])
    size = functions, directions // functions
    without = _roll_out_error(sources, features, process.of_places.new_zeros(1, len(sources), size[1]))
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(HELD_BY, directions, generator=rng, dtype=torch.float64).to(spectrum[1])
    while process.variance > VARIANCES[0]:
        mean, variances = process.posterior(spectrum)
        draws = (mean + (noise * variances.sqrt()) @ spectrum[1].mT).unflatten(-1, size)
        if _roll_out_error(sources, features, process.of_places @ draws) <= WORSE * without:
            break
        process = dataclasses.replace(process, variance=process.variance / 10)
    return process


def _roll_out_error(sources: list[_Source], features: Tensor, weights: Tensor) -> float:
    """Squared error of predictors of single neurons in noise-free roll-outs of smoothed paths, over their variance.

    Args:
        weights: of last layers, ``(draws, recording, p)``.
    """
    total = 0.0
    for source, own in zip(sources, weights.unbind(1), strict=True):
        length = min(HELD_BINS, source.paths.shape[2] - 1)
        if length < 1:
            continue
        stretches = source.paths[0].unfold(1, length + 1, length).movedim(-1, -2).flatten(0, 1)
        seen = source.batch.time_mask[0].unfold(1, length + 1, length).flatten(0, 1).all(-1)
        z = stretches[seen]  # (V, length + 1, d)
        spread = ((z - z.mean((0, 1))) @ source.read_out.mT).square().mean()
        for change in own:
            dynamics = with_last_layer(
                source.dynamics, (features @ change.unflatten(0, (features.shape[1], -1)))[None, None]
            )
            rolled = roll_out(dynamics, z[None, :, :1], length)[0]
            error = ((rolled - z[:, 1:]) @ source.read_out.mT).square().mean() / spread
            total += float(error.nan_to_num(torch.inf)) / len(own)
    return total


def _features(sources: list[_Source], latent_dim: int) -> Tensor:
    """Principal directions of the last hidden layer on what recordings visit, ``(hidden_dim + 1, F)``."""
    gram = torch.zeros(())
    for source in sources:
        hidden = last_hidden(source.dynamics, source.paths)[source.batch.time_mask]
        gram = gram.to(hidden) + hidden.mT @ hidden / max(1, len(hidden))
    values, vectors = torch.linalg.eigh(gram)
    functions = min(MOST_FUNCTIONS, len(sources))
    most = min(MOST_FEATURES, max(8, MOST_DIRECTIONS // (functions * latent_dim)), len(values))
    keep = (values > LEAST[0] * values[-1]) & (values >= values[-most])
    return vectors[:, keep]


@torch.no_grad()
def _revised(
    fit: Fit, features: Tensor, process: Process, mean: Tensor, variances: Tensor, vectors: Tensor
) -> Fit:
    """The fit with the process: in the vectors of its spectrum, prior and posterior are both independent."""
    sd = process.variance**0.5
    shape = process.functions.shape[1], features.shape[1], fit.model.latent_dim
    config = fit.model.config | {
        "num_places": len(process.places),
        "num_functions": shape[0],
        "num_features": shape[1],
        "family": fit.model.config.get("family", type(fit.model)),
    }
    with machine.random_forked():
        model = construct(Revised, config, fit.model.neurons)
        guide = construct(type(fit.guide), fit.guide.config, model)
    model.to(fit.device, fit.dtype), guide.to(fit.device, fit.dtype)
    own = {
        "places": process.places,
        "reach": torch.tensor(process.reach),
        "functions": process.functions,
        "features": features,
        "directions": (sd * vectors.mT).reshape(-1, *shape),
    }
    model.load_state_dict(model.state_dict() | _but_the_site(fit.model) | own)
    posterior = {
        "global_sites.loc.last_layer": vectors.mT @ mean / sd,
        "global_sites.log_scale.last_layer": 0.5 * (variances / process.variance).clamp(min=1e-12).log(),
    }
    guide.load_state_dict(guide.state_dict() | _but_the_site(fit.guide) | posterior)
    return dataclasses.replace(fit, model=model.eval(), guide=guide.eval())


def _but_the_site(module) -> dict[str, Tensor]:
    mine = ("places", "reach", "functions", "features", "directions", "global_sites.")
    return {key: value for key, value in module.state_dict().items() if not key.startswith(mine)}


def _base(fit: Fit, recs: Recordings) -> MetaSSM:
    """The model without a revision, in double precision, of a fit whose last layer can be revised."""
    model = fit.model
    kind: Any = model.config["family"] if isinstance(model, Revised) else type(model)
    other = [hook for hook in HOOKS if getattr(kind, hook) is not getattr(MetaSSM, hook)]
    if other or (declared(model) and not isinstance(model, Revised)) or model.reads_inputs:
        raise ValueError(
            f"revise: needed a model with the hooks of MetaSSM and no global sites, got {kind.__name__} "
            f"({', '.join(other) or 'with a PyroSample'})"
        )
    if not isinstance(model.dynamics, ResidualMLP):
        raise ValueError(
            f"revise: needed dynamics with a last layer, a ResidualMLP, got {type(model.dynamics).__name__}"
        )
    for name in recs:
        if name not in fit.names or not bool(fit.statistics[fit.names.index(name)].isfinite().all()):
            raise ValueError(
                f"revise: needed recordings that the fit was trained on, of {checks.some(fit.names)}, got {name!r}; "
                "pm.adapt makes a fit that knows it"
            )
    fit.model.neurons.check(recs.names, [r.num_neurons for r in recs.values()])
    some = recs.batch(
        fit.names, names=[recs.names[0]], trials={recs.names[0]: [0]}, dtype=fit.dtype, device=fit.device
    )
    if not of_single_neurons(model, some):
        raise ValueError("revise: needed a likelihood of each neuron, got one of all neurons together")
    base = copy.deepcopy(model).double().requires_grad_(False)
    if isinstance(base, Revised):
        base.num_directions = 0  # its dynamics are then those without a revision
    return base
