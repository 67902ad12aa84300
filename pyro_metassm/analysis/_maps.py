"""The noise-free dynamics at draws of embeddings: what everything in this package looks at."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm.draws import global_draws, seeded
from pyro_metassm.dynamics import AdaptedMLP
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit, check_fit

BOUND = 1e6  # of the absolute values of states: what leaves it has left for good
At = str | Sequence[str] | np.ndarray | Tensor | xr.DataArray


class Maps:
    """``z -> E[z' | z, e]`` for draws of one embedding, in float64.

    Args:
        model: a copy that :meth:`Source.maps` made.
        embedding: ``(S, embedding_dim)``.
        row: of the recording in the model's tables; None for an embedding of no recording.
        shared: values of the model's global sites, ``(S, 1, 1, *event)``.
    """

    def __init__(self, model: MetaSSM, embedding: Tensor, row: int | None, shared: Mapping[str, Tensor]):
        self.model, self.shared, self.row, self.num_draws = model, shared, row, len(embedding)
        self.embedding = embedding[:, None, None]  # as the model's plates have it: (S, R = 1, 1, d)
        with torch.no_grad(), model.given(shared):
            if row is None:
                self.dynamics = model.adapt_dynamics(self.embedding)
            else:
                rows = torch.tensor([row], device=embedding.device)
                self.dynamics = model.dynamics_of(self.embedding, rows)
        plain = type(model).transition is MetaSSM.transition
        self.rolls = plain and isinstance(self.dynamics, AdaptedMLP)

    def subset(self, draws: Tensor) -> Maps:
        """Those of some draws, integers ``(C,)`` that may repeat."""
        shared = {name: values[draws] for name, values in self.shared.items()}
        return Maps(self.model, self.embedding[draws, 0, 0], self.row, shared)

    def __call__(self, z: Tensor) -> Tensor:
        """States ``(S, N, latent_dim)`` a bin later."""
        with self._sites():
            return self._next(z)

    def displacement(self, z: Tensor) -> Tensor:
        """``f(z) - z`` of states ``(S, N, latent_dim)``."""
        with torch.no_grad():
            return self(z) - z

    def jacobian(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``f(z)`` and ``df_i / dz_j`` ``(S, N, i, j)``, exact."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            after = self(z)
            if not after.requires_grad:  # a constant
                return after, z.new_zeros(*z.shape, z.shape[-1])
            last = z.shape[-1] - 1
            rows = [
                torch.autograd.grad(after[..., i].sum(), z, retain_graph=i < last)[0] for i in range(last + 1)
            ]
        return after.detach(), torch.stack(rows, -2)

    def path(self, z: Tensor, num_bins: int) -> Tensor:
        """What follows states ``(S, N, latent_dim)``: ``(S, N, num_bins, latent_dim)``."""
        with torch.no_grad():
            if self.rolls:
                return self.dynamics.rollout(z[:, None, :, None], num_bins, BOUND)[:, 0]
            states = []
            with self._sites():
                for _ in range(num_bins):
                    z = self._next(z).clamp(-BOUND, BOUND)
                    states.append(z)
            return torch.stack(states, -2)

    def noisy_path(self, num_trials: int, num_bins: int, first: Tensor | None = None) -> Tensor:
        """Draws of the model's own paths, ``(S, num_trials, num_bins, latent_dim)``, maybe from first states on."""
        with torch.no_grad(), self._sites():
            if first is None:
                z = self.model.initial_state(self.embedding).expand((self.num_draws, 1, num_trials)).sample()
            else:
                z = first.expand(self.num_draws, 1, -1, -1)
            z = z.unsqueeze(-2)
            states = [z]
            for _ in range(num_bins - 1):
                z = self.model.transition(z, self.dynamics).sample().clamp(-BOUND, BOUND)
                states.append(z)
        return torch.cat(states, -2)[:, 0]

    def _next(self, z: Tensor) -> Tensor:
        return self.model.transition(z[:, None, :, None], self.dynamics).mean[:, 0, :, 0]

    @contextmanager
    def _sites(self) -> Iterator[None]:
        """The global sites of these draws; what leaves the finite numbers, as searches may, is no error."""
        with self.model.given(self.shared), pyro.validation_enabled(False):
            yield


@dataclass(frozen=True)
class Place:
    """Draws of one embedding, and their middle.

    Attributes:
        label: the recording's name, or the number of the point.
        row: of the recording in the model's tables; None for an embedding that was given.
        draws: ``(S, embedding_dim)``.
        mean: ``(1, embedding_dim)``.
    """

    label: str | int
    row: int | None
    draws: Tensor
    mean: Tensor


class Source:
    """A fit, what of it was asked for, and its dynamics there.

    Args:
        caller: the function that the user called, for errors.
        fit: the fit.
        at: a recording's name or several; an embedding ``(embedding_dim,)``, draws of it ``(draw, embedding_dim)``, or
            draws at several points ``(point, draw, embedding_dim)``. A DataArray's ``chain`` and ``draw`` are one.
        num_draws: of a recording's posterior, or of the global sites beside a single embedding; 0 for means alone.
        seed: of the draws.

    Raises:
        ValueError: an unknown recording, an embedding of another size, or a model of which the dynamics are no
            function of state and embedding.
    """

    def __init__(self, caller: str, fit: Fit, at: At, num_draws: int = 100, seed: int = 0):
        check_fit(fit)
        checks.integers(least=0, num_draws=num_draws, seed=seed)
        self.caller, self.fit, self.seed = caller, fit, seed
        self.model = _autonomous(caller, fit)
        self.dim, self.places = self._places(at, num_draws)
        self.latent_dim = self.model.latent_dim
        number = max(len(place.draws) for place in self.places)
        self.of_mean = {name: x[None, None, None] for name, x in fit.guide.global_sites.medians().items()}
        self.of_draws = global_draws(fit, number, seed) if number > 1 else self.of_mean
        self.of_mean, self.of_draws = (
            {name: value.detach().double() for name, value in values.items()}
            for values in (self.of_mean, self.of_draws)
        )
        self._check_mean()

    @property
    def num_draws(self) -> int:
        return len(self.places[0].draws)

    @property
    def bin_width(self) -> float:
        """In s."""
        width = self.fit.attrs.get("bin_width")
        if width is None:
            raise ValueError(
                f"{self.caller}: needed the bin width of the fit for times in seconds, got none; set "
                'fit.attrs["bin_width"] = ... (s)'
            )
        return float(width)

    def threads(self) -> AbstractContextManager[None]:
        """The dynamics on all threads, PyTorch's own operations, which are small here, on one."""
        return machine.threads(torch.get_num_threads())

    def maps(self, place: Place) -> Maps:
        """The dynamics at the draws."""
        return Maps(self.model, place.draws, place.row, self.of_draws)

    def maps_of_mean(self, place: Place) -> Maps:
        """The dynamics at the middle of the draws."""
        return Maps(self.model, place.mean, place.row, self.of_mean)

    def stacked(self, parts: Sequence[xr.Dataset], missing: Mapping[str, Any] | None = None) -> xr.Dataset:
        """One Dataset of those of the places, over :attr:`dim` where several were asked for.

        Args:
            parts: of the places.
            missing: what stands where a place has fewer rows than another, by variable; NaN for others.
        """
        if self.dim is None:
            return parts[0]
        labels = xr.IndexVariable(self.dim, [place.label for place in self.places])
        values = {str(name): (missing or {}).get(str(name), np.nan) for name in parts[0].data_vars}
        options: dict[str, Any] = {"join": "outer", "fill_value": values, "data_vars": "all"}
        return xr.concat(parts, labels, combine_attrs="override", **options)

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _places(self, at: At, num_draws: int) -> tuple[str | None, list[Place]]:
        if isinstance(at, str):
            return None, [self._recording(at, num_draws)]
        if isinstance(at, (list, tuple)) and len(at) and all(isinstance(name, str) for name in at):
            return "recording", [self._recording(name, num_draws) for name in at]
        if isinstance(at, xr.DataArray) and {"chain", "draw"} <= set(at.dims):
            at = at.stack(sample=("chain", "draw")).transpose(..., "sample", "embedding_dim")
        try:
            value = checks.as_numpy(at)
            value = value.astype(np.float64) if value.dtype.kind != "c" else np.zeros(())
        except (TypeError, ValueError):
            value = np.zeros(())
        size = self.model.embedding_dim
        if value.ndim not in (1, 2, 3) or value.shape[-1] != size or not value.size:
            raise ValueError(
                f"{self.caller}: needed a recording's name (or a list of them), or an embedding ({size},), draws of "
                f"it (draw, {size}) or points (point, draw, {size}), got "
                + (f"shape {value.shape}" if value.ndim else repr(at))
            )
        if not np.isfinite(value).all():
            raise ValueError(f"{self.caller}: needed finite embeddings, got NaN or infinities")
        of_recordings = type(self.model).dynamics_of is not MetaSSM.dynamics_of
        if of_recordings and not self.model.deviations:  # without these there is a family at any embedding
            raise ValueError(
                f"{self.caller}: needed a recording's name, got an embedding; the dynamics of "
                f"{type(self.model).__name__} depend on more than the embedding"
            )
        points = torch.as_tensor(
            value.reshape(-1, *value.shape[-2:]) if value.ndim > 1 else value[None, None]
        )
        points = points.to(self.fit.device)
        if value.ndim == 1 and num_draws and self.fit.guide.global_sites.medians():
            points = points.expand(-1, num_draws, -1)  # of one embedding the global sites have draws
        places = [Place(k, None, e, e.mean(0, keepdim=True)) for k, e in enumerate(points)]
        return ("point" if value.ndim == 3 else None), places

    def _recording(self, name: str, num_draws: int) -> Place:
        row = row_of(self.caller, self.fit, name)
        with torch.no_grad():
            posterior = self.fit.guide.embedding_posterior(self.fit.statistics[row : row + 1])
            mean = posterior.mean[0].double()
            if not num_draws:
                return Place(name, row, mean, mean)
            with seeded(self.seed, name, self.fit.device):
                draws = posterior.sample((num_draws,))[:, 0, 0].double()
        return Place(name, row, draws, mean)

    def _check_mean(self) -> None:
        """That the transition has a mean, and of the right shape."""
        maps = self.maps_of_mean(self.places[0])
        probe = torch.zeros(1, 2, self.latent_dim, dtype=torch.float64, device=self.fit.device)
        reason = "one that is not finite"
        try:
            with torch.no_grad():
                mean = maps(probe)
            good = mean.shape == probe.shape and bool(mean.isfinite().all())
        except (NotImplementedError, AttributeError) as error:
            good, reason = False, f"none ({type(error).__name__})"
        if not good:
            raise ValueError(
                f"{self.caller}: needed a transition with a mean, the deterministic part of the dynamics, got "
                f"{reason} from {type(self.model).__name__}.transition"
            )


def check_recordings(caller: str, recs: Any) -> None:
    """Raise ``ValueError`` unless ``recs`` are recordings."""
    if not isinstance(recs, Recordings):
        raise ValueError(f"{caller}: needed recs as pm.Recordings([...]), got {type(recs).__name__}")


def row_of(caller: str, fit: Fit, name: str) -> int:
    """The row of a recording whose embedding the fit knows."""
    if name not in fit.names:
        raise ValueError(
            f"{caller}: needed one of the recordings {checks.some(fit.names)} that the fit knows, got {name!r}; "
            "pm.adapt makes a fit that knows it"
        )
    row = fit.names.index(name)
    if not bool(fit.statistics[row].isfinite().all()):
        raise ValueError(
            f"{caller}: needed a recording that the fit was trained on, got {name!r}, whose embedding it has not "
            "inferred; pass an embedding, or use pm.adapt"
        )
    return row


def _autonomous(caller: str, fit: Fit) -> MetaSSM:
    """A copy of the model in float64, without gradients of its parameters."""
    if fit.model.reads_inputs:
        raise ValueError(
            f"{caller}: needed autonomous dynamics, got {type(fit.model).__name__}, whose transition reads inputs; "
            "make a subclass whose transition fixes them"
        )
    model = copy.deepcopy(fit.model).double().eval()
    return model.requires_grad_(False)


def to_numpy(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy()
