"""Several families of observations in one model: by recording, and by neuron."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm.likelihoods.base import Likelihood, is_family
from pyro_metassm.likelihoods.side_by_side import Part, SideBySide, of_rows
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.recordings import Recording, Recordings

Families = Mapping[str, "type[Likelihood] | Mapping[str, type[Likelihood]]"]


class Mixed(Likelihood):
    """Spikes here, calcium or field potentials there: each recording, or each neuron, has a family of its own.

    ``families`` says which: from names of recordings, or patterns of names (``*`` is anything; the exact name, else the
    first pattern that matches, decides), to a family, or to another such mapping from ``neuron_ids`` to families. A
    recording that is adapted to later is told by its name as well (``"spikes*"`` leaves room for it), or by
    ``pm.adapt(..., likelihood=)``.

    :meth:`of` makes the class to pass on; a subclass with the class attribute ``families`` does the same.

    Neurons of different families share the latents and nothing else. What is compared between neurons (the scale of the
    read-in, the size of read-outs) is compared within a family.

    Raises:
        ValueError: a recording or a neuron that no name or pattern matches, neurons to be told by ids in a recording
            without ``neuron_ids``, or data that their family cannot have produced.

    Example:
        >>> import pyro_metassm as pm
        >>> from pyro_metassm.likelihoods import Gamma, Gaussian, Mixed, Poisson
        >>> family = Mixed.of({"calcium*": Gamma, "probe": {"unit*": Poisson, "lfp*": Gaussian}, "*": Poisson})
        >>> counts = np.ones((4, 10, 3))
        >>> recs = pm.Recordings([
        ...     pm.Recording("spikes", counts, bin_width=0.02),
        ...     pm.Recording("probe", counts, bin_width=0.02, neuron_ids=["unit1", "unit2", "lfp1"]),
        ...     pm.Recording("calcium 1", 0.3 * counts, bin_width=0.02),
        ... ])
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=family)
        >>> [type(part).__name__ for part in model.observation.parts.values()]
        ['Gamma', 'Poisson', 'Gaussian']
        >>> model.observation.kinds
        tensor([1, 1, 1, 1, 1, 2, 0, 0, 0])
    """

    kind: Tensor
    made_by_of: bool = False
    """Whether the class is one of :meth:`of`: known by its families alone, not by its name."""

    def __init__(self, neurons: NeuronTable):
        super().__init__(neurons)
        families = _families(self.families)
        # Each over all neurons, whosever they are: rows then go by name as those of any table of neurons do.
        self.parts = nn.ModuleDict({family.__name__: family(neurons) for family in families})
        self.register_buffer("kind", torch.zeros(neurons.total, dtype=torch.long))

    @property
    @abstractmethod
    def families(self) -> Families:
        """From names or patterns of recordings to families, or to mappings from neurons' to families."""

    @classmethod
    def of(cls, families: Families) -> type[Mixed]:
        """The class of these families.

        Args:
            families: as the attribute.

        Raises:
            ValueError: what is no such mapping, or a family that is a distribution over several neurons at once.
        """
        names = ", ".join(family.__name__ for family in _families(families))
        entries = {"families": dict(families), "made_by_of": True, "__module__": cls.__module__}
        return type(f"{cls.__name__}({names})", (cls,), entries)

    @property
    def kinds(self) -> Tensor:
        return self.kind

    @property
    def num_kinds(self) -> int:
        return len(self.parts)

    @property
    def _kinds(self) -> list[Likelihood]:
        return cast(list[Likelihood], list(self.parts.values()))

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        width = predictor.shape[-1]
        kinds = self.neurons.gather(self.kind, recording, width)
        numbers = self.neurons.counts(recording)
        real = kinds >= 0
        if numbers is not None:
            real = torch.arange(width) < torch.tensor(numbers).unsqueeze(-1)
        parts = []
        for kind, family in enumerate(self._kinds):
            own, rows = (kinds == kind) & real, None
            if numbers is not None:  # else the host would have to wait for a device: all recordings then
                if torch.equal(own, real):
                    return family(predictor, recording)
                rows = own.any(-1).nonzero().squeeze(-1)
                if len(rows) == 0:
                    continue
                rows = None if len(rows) == len(own) else rows
            own = own[:, None, None, :]
            # What is not its own may be anything: exp(x) infinite, and gradients NaN.
            x = torch.where(of_rows(own, rows), of_rows(predictor, rows), 0.0)
            parts.append(Part(family(x, recording if rows is None else recording[rows]), own, rows))
        return SideBySide(parts, predictor.shape)

    def check(self, recording: Recording) -> None:
        for part, own in self._parts_of(recording):
            part.check(recording.only(own))

    def start(self, recordings: Recordings) -> None:
        theirs: dict[Likelihood, list[Recording]] = {}
        for name, recording in recordings.items():
            self.write(self.kind, name, self.kinds_in(recording))
            for part, own in self._parts_of(recording):
                theirs.setdefault(part, []).append(recording.only(own))
        for part, some in theirs.items():
            part.start(Recordings(some))

    def predictor_at(self, mean: Tensor, rows: slice) -> Tensor:
        found = torch.full_like(mean, torch.nan)
        for kind, part in enumerate(self._kinds):
            at = part.predictor_at(mean, rows)
            if at is not None:
                found = torch.where(self.kind[rows] == kind, at, found)
        return found

    def kinds_in(self, recording: Recording) -> np.ndarray:
        """Which of ``parts`` each neuron of a recording has, ``(N,)``."""
        order = [type(part) for part in self._kinds]
        found = _match(recording.name, self.families)
        if found is None:
            raise checks.fail(
                recording.name,
                f"a name that one of the likelihood's names and patterns {list(self.families)} matches",
                repr(recording.name),
                'rename it, or name its family: Mixed.of({..., "spikes*": Poisson}), pm.adapt(..., likelihood=Poisson)',
            )
        if not isinstance(found, Mapping):
            return np.full(recording.num_neurons, order.index(found))
        if recording.neuron_ids is None:
            needed = f"neuron_ids, by which the likelihood tells {list(found)}"
            raise checks.fail(recording.name, needed, "none", "pass pm.Recording(..., neuron_ids=...)")
        families = [_match(str(neuron), found) for neuron in recording.neuron_ids]
        unknown = [n for n, family in zip(recording.neuron_ids, families, strict=True) if family is None]
        if unknown:
            needed = f"neuron_ids that one of the likelihood's names and patterns {list(found)} matches"
            raise checks.fail(
                recording.name, needed, checks.some(unknown), "rename them, or name their family"
            )
        return np.array([order.index(family) for family in families])

    def _parts_of(self, recording: Recording) -> Iterator[tuple[Likelihood, np.ndarray]]:
        """The families that a recording has, and which of its neurons are theirs."""
        kinds = self.kinds_in(recording)
        for kind, part in enumerate(self._kinds):
            if (kinds == kind).any():
                yield part, kinds == kind


def _match(name: str, table: Mapping[str, Any]) -> Any:
    if name in table:
        return table[name]
    return next((value for pattern, value in table.items() if fnmatchcase(name, pattern)), None)


def _families(given: Any) -> list[type[Likelihood]]:
    """The different families of such a mapping, in their order."""
    what = "Mixed: needed a mapping from names or patterns to families, or to such mappings from neuron ids,"
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{what} got {given!r}")
    entries: list[tuple[Any, Any]] = []
    for name, value in given.items():
        entries += value.items() if isinstance(value, Mapping) and value else [(name, value)]
    found: list[type[Likelihood]] = []
    for name, family in entries:
        if not isinstance(name, str) or not is_family(family) or issubclass(family, Mixed):
            raise ValueError(f"{what} got {name!r}: {family!r}")
        if family in found:
            continue
        if any(family.__name__ == other.__name__ for other in found):
            raise ValueError(f"Mixed: needed families of different names, got two called {family.__name__}")
        with machine.random_forked():
            y = family(NeuronTable(["a"], [1]))(torch.zeros(1, 1, 1, 1), torch.tensor([0]))
        if y.event_shape:
            raise ValueError(
                f"Mixed: needed families of each neuron on its own, got {family.__name__}, a distribution of all "
                "neurons of a bin together; use it for a model of its own"
            )
        found.append(family)
    return found
