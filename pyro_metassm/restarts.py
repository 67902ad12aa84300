"""Several fits of one model from different seeds, and one posterior of them all: do restarts agree?"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from tqdm.auto import tqdm

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.guides.base import AmortizedGuide
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.posterior import MAX_GIB, posterior
from pyro_metassm.rebuilding import afresh
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit
from pyro_metassm.training import fit

ALIGNED = ("latents", "embedding")  # what is known up to a map; everything else of a tree stays as it is
DRAWS = 50  # behind the posterior means that maps are chosen from
TRIALS = 32  # of each recording, at most, for the same
PARTICLES = 20  # draws of the held-out ELBO
Map = tuple[np.ndarray, np.ndarray]  # matrix and offset, ``x @ matrix + offset``


@dataclass(frozen=True, eq=False)
class Restarts:
    """The result of :func:`pyro_metassm.fit_restarts`.

    Attributes:
        fits: in the order of their seeds.
        elbo: of the held-out trials, nats, ``(chain,)``: the mean of some draws, embeddings from the training trials.
        agreement: how well the posterior means of every fit, once aligned, meet those of the best: ``r2`` of
            ``latents`` and ``embedding (chain,)``; 1 is the same up to an affine map.
        maps: of every fit, the affine maps ``(matrix, offset)`` of its ``latents`` and ``embedding`` to the best's.
    """

    fits: tuple[Fit, ...]
    elbo: xr.DataArray
    agreement: xr.Dataset
    maps: tuple[dict[str, Map], ...]

    @property
    def best(self) -> Fit:
        """The fit with the highest held-out ELBO."""
        return self.fits[int(self.elbo.argmax("chain"))]

    def posterior(
        self,
        recs: Recordings,
        *,
        num_samples: int = 100,
        predictive: bool = False,
        log_likelihood: bool = False,
        chunk_size: int | None = None,
        max_gib: float = MAX_GIB,
        seed: int = 0,
    ) -> xr.DataTree:
        """Draws of all fits, ``chain`` = restart, latents and embeddings aligned to the best's.

        With it R-hat (``az.rhat``, ``az.summary``) says whether restarts agree. Rates and observations are compared as
        they are. For latents and embeddings it asks for agreement up to one affine map, see
        :func:`pyro_metassm.fit_restarts`.

        Args:
            recs, predictive, log_likelihood, chunk_size: as of :func:`pyro_metassm.posterior`.
            num_samples: draws of each fit.
            max_gib: what may be kept of all fits together, in GiB; each has its share.
            seed: of the draws; restart c takes ``seed + c``.

        Returns:
            the tree of :func:`pyro_metassm.posterior` with as many chains as fits; ``sample_stats`` holds the history
            of each.
        """
        trees = []
        for chain, (one, maps) in enumerate(zip(self.fits, self.maps, strict=True)):
            options: dict[str, Any] = {"log_likelihood": log_likelihood, "chunk_size": chunk_size}
            options |= {"predictive": predictive, "max_gib": max_gib / len(self.fits)}
            tree = posterior(one, recs, num_samples=num_samples, seed=seed + chain, **options)
            trees.append(tree.map_over_datasets(lambda part, maps=maps: _aligned(part, maps)))
        return _as_chains(trees, seed)

    def __repr__(self) -> str:
        best = int(self.elbo.argmax("chain"))
        values = ", ".join(f"{value:.6g}" for value in self.elbo.values)
        return f"Restarts({len(self.fits)} fits, the best {best}; held-out ELBO {values})"


def fit_restarts(
    model: MetaSSM,
    guide: AmortizedGuide,
    recs: Recordings,
    *,
    num_restarts: int = 4,
    validation: Recordings | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Restarts:
    r"""Fit a model from several seeds: which is best, and do they agree?

    Restart c is :func:`pyro_metassm.fit` with seed ``seed + c`` of a model and a guide that are built again from their
    classes and ``config``, with new parameters of that seed; what the ones given have learned is not used. It does not
    depend on the other restarts.

    *What can be compared.* Rates (and forecasts of them) are identified. Latents are known up to an affine map, common
    to all recordings since they share the dynamics; embeddings up to a smooth re-parametrisation. Of either the affine
    part is taken away: with ``x`` the posterior means of a fit, pooled over recordings (trials and bins), and ``b``
    those of the best,

    $$ x \mapsto (x - \bar x)\, S_x^{-1/2}\, Q\, S_b^{1/2} + \bar b, \qquad
       Q = \arg\min_{Q^T Q = I} \lVert \tilde x\, Q - \tilde b \rVert, $$

    whitened coordinates with a tilde (orthogonal Procrustes). Where an affine map exists it is this one, exactly; where
    none does, the fits keep their spread, while a regression would shrink what disagrees towards the mean, and R-hat
    with it. What stays apart are frames that differ between recordings, and embeddings that differ by a bend. At most
    ``embedding_dim + 1`` recordings can always be mapped onto each other: a warning says so.

    Ctrl-C ends the restart that runs, and leaves those after it out.

    Args:
        model, guide: what to fit; left as they are. Parameters that do not require a gradient are kept.
        recs: training recordings.
        num_restarts: number of fits.
        validation: other trials of the same recordings, for the choice of the best; None holds out a quarter of
            ``recs``: ``train, validation = recs.split(seed=seed)``.
        seed: of the first restart.
        checkpoint: folder; each restart saves its state, and is resumed, in ``restart_0``, ``restart_1``, ... of it.
        progress: show progress bars.
        options: of :func:`pyro_metassm.fit`: ``num_steps``, ``warm_start_steps``, ...

    Returns:
        :class:`Restarts`, with ``.best`` and ``.posterior(recs)``.

    Raises:
        ValueError: ``num_restarts < 1``, a validation recording that is not trained on, a recording of one trial
            without ``validation``, a model that cannot be built from its ``config``, or what ``pm.fit`` refuses.
        NonFiniteLossError: of ``pm.fit``; a note says which restart.

    Reference: Vehtari et al., Rank-normalization, folding, and localization: an improved R-hat (Bayesian Analysis
    2021); Schoenemann, A generalized solution of the orthogonal Procrustes problem (Psychometrika 1966).

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.0, 3.0, 4.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> quick = {"num_steps": 3, "warm_start_steps": 3, "progress": False}
        >>> restarts = pm.fit_restarts(model, pm.guides.DKF(model), recs, num_restarts=2, **quick)
        >>> tree = restarts.posterior(recs, num_samples=10)
        >>> dict(tree["posterior"]["embedding"].sizes)
        {'chain': 2, 'draw': 10, 'recording': 3, 'embedding_dim': 1}
    """
    checks.integers(num_restarts=num_restarts)
    if validation is None:
        recs, validation = recs.split(seed=seed)
    if strangers := [name for name in validation if name not in recs]:
        raise ValueError(
            f"fit_restarts: needed validation trials of the recordings trained on, got {strangers} besides"
        )
    fits = []
    for chain in tqdm(range(num_restarts), disable=not progress, desc="restarts", dynamic_ncols=True):
        own = None if checkpoint is None else Path(checkpoint) / f"restart_{chain}"
        given: dict[str, Any] = {"validation": validation, "checkpoint": own, "progress": progress}
        try:
            new_model, new_guide = afresh(model, guide, recs, seed + chain)
            fits.append(fit(new_model, new_guide, recs, seed=seed + chain, **given, **options))
        except Exception as error:
            error.add_note(f"in restart {chain}, seed {seed + chain}")
            raise
        if "interrupted_at" in fits[-1].attrs:  # Ctrl-C was meant for all of them
            break
    elbo = np.array([held_out_elbo(one, validation, seed) for one in fits])
    return together(fits, xr.DataArray(elbo, {"chain": np.arange(len(fits))}, "chain"), recs)


def together(fits: list[Fit], elbo: xr.DataArray, recs: Recordings) -> Restarts:
    """Fits of one model aligned to the one with the highest ``elbo (chain,)``, by trials of all their recordings."""
    means = [_means(one, recs) for one in fits]
    target = means[int(elbo.argmax("chain"))]
    if "embedding" in target and len(target["embedding"]) <= target["embedding"].shape[1] + 1:
        warnings.warn(
            f"fit_restarts: an affine map takes the embeddings of {len(target['embedding'])} recordings in "
            f"{target['embedding'].shape[1]} dimension(s) to any others, so their R-hat tells nothing; compare rates, "
            "or fit more recordings",
            stacklevel=3,
        )
    maps = tuple({key: affine_map(own[key], target[key]) for key in target} for own in means)
    agreement = {
        key: (
            "chain",
            [_r2(apply(of[key], own[key]), target[key]) for own, of in zip(means, maps, strict=True)],
        )
        for key in target
    }
    return Restarts(tuple(fits), elbo, xr.Dataset(agreement, {"chain": elbo["chain"]}), maps)


def held_out_elbo(fit: Fit, recs: Recordings, seed: int = 0) -> float:
    """The ELBO of trials that a fit was not trained on (nats): its embeddings are those of the training trials."""
    batch = recs.batch(fit.names, dtype=fit.dtype, device=fit.device)
    rows = [fit.names.index(name) for name in recs]
    batch = dataclasses.replace(batch, embedding_statistics=fit.statistics[rows])
    with machine.random_forked(fit.device), torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        return -SequentialELBO(num_particles=PARTICLES).loss(fit.model, fit.guide, batch)


def affine_map(x: np.ndarray, target: np.ndarray) -> Map:
    """The affine map of :func:`fit_restarts` from points ``x (number, dim)`` to paired points ``target``.

    It gives ``x`` the mean and covariance of ``target``, and of all maps that do the one nearest to it where both are
    white. Directions in which ``x`` does not vary are dropped.
    """
    (whiten, _), (back, root) = _roots(x), _roots(target)
    left, _, right = np.linalg.svd(whiten.T @ (x - x.mean(0)).T @ (target - target.mean(0)) @ back)
    matrix = whiten @ left @ right @ root
    return matrix, target.mean(0) - x.mean(0) @ matrix


def apply(map_: Map, x: np.ndarray) -> np.ndarray:
    """``x @ matrix + offset``."""
    return x @ map_[0] + map_[1]


def _roots(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The symmetric inverse root and root of the covariance of points ``(number, dim)``."""
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(x, rowvar=False, bias=True)))
    varies = values > 1e-12 * max(values[-1], np.finfo(float).tiny)
    root = np.sqrt(values.clip(min=0.0))
    inverse = np.where(varies, 1.0 / np.where(varies, root, 1.0), 0.0)
    return (vectors * inverse) @ vectors.T, (vectors * root) @ vectors.T


def _r2(x: np.ndarray, target: np.ndarray) -> float:
    total = ((target - target.mean(0)) ** 2).sum()
    return float(1.0 - ((x - target) ** 2).sum() / total) if total > 0 else float("nan")


def _means(fit: Fit, recs: Recordings) -> dict[str, np.ndarray]:
    """Posterior means ``(number, dim)`` of latents and embeddings, pooled over all recordings, drawn one by one."""
    found: dict[str, list[np.ndarray]] = {key: [] for key in ALIGNED}
    for name, recording in recs.items():
        some = recs.select([name]).take_trials(min(TRIALS, recording.num_trials))
        for node in posterior(fit, some, num_samples=DRAWS).subtree:
            for key in found if node.name == "posterior" else ():
                if key in node.data_vars:
                    mean = node.data_vars[key].mean(("chain", "draw")).to_numpy().astype(np.float64)
                    found[key].append(mean.reshape(-1, mean.shape[-1]))
    pooled = {key: np.concatenate(parts) for key, parts in found.items() if parts}
    return {key: points[np.isfinite(points).all(1)] for key, points in pooled.items()}


def _aligned(part: xr.Dataset, maps: dict[str, Map]) -> xr.Dataset:
    moved = {key: apply(of, part[key].values).astype(np.float32) for key, of in maps.items() if key in part}
    return part.assign({key: part[key].copy(data=values) for key, values in moved.items()})


def _as_chains(trees: list[xr.DataTree], seed: int) -> xr.DataTree:
    """One tree whose chain c is tree c; what has no chain, the data, is the first's, and histories are stacked."""
    groups = {}
    for path, (node, *others) in xr.group_subtrees(*trees):
        parts = [of.to_dataset(inherit=False) for of in (node, *others)]
        if node.name == "sample_stats" and "chain" not in parts[0].dims:
            parts = [part.expand_dims("chain") for part in parts]
        if "chain" in parts[0].dims:
            how: dict[str, Any] = {"coords": "minimal", "compat": "override", "join": "override"}
            both = xr.concat(parts, "chain", data_vars="minimal", combine_attrs="drop_conflicts", **how)
            parts = [both.assign_coords(chain=np.arange(len(trees)))]
        groups[path] = parts[0]
    result = xr.DataTree.from_dict(groups)
    result.attrs.update(trees[0].attrs | {"seed": seed})
    return result
