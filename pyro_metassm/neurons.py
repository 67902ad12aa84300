"""Parameters that belong to neurons, kept in one table for all recordings.

Recordings have different numbers of neurons. Every parameter of a neuron (read-in and read-out weights, noise) is a
row of one flat table over the neurons of *all* recordings; a batch gathers the rows that it needs into a padded
``(recording, neuron, ...)`` tensor, so that every computation runs once for all recordings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int, Shaped
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_metassm import _checks as checks
from pyro_metassm.blocks import everywhere
from pyro_metassm.global_sites import Program
from pyro_metassm.products import centred_product, linear_by_recording
from pyro_metassm.recordings import Batch, Recordings


class NeuronTable(nn.Module):
    """Which rows of a flat table over all neurons belong to which recording.

    Args:
        names: the recordings' names, in the order of the model's rows.
        num_neurons: the number of neurons of each.

    Raises:
        ValueError: without recordings, with a recording without neurons, or with unequal lengths.

    Example:
        >>> table = NeuronTable(["a", "b"], [2, 3])
        >>> table.rows(torch.tensor([1]), width=3)
        tensor([[2, 3, 4]])
    """

    index: Tensor

    def __init__(self, names: Sequence[str], num_neurons: Sequence[int]):
        super().__init__()
        if not names or len(names) != len(num_neurons) or min(num_neurons) < 1:
            raise ValueError(
                "a neuron table needs at least one recording and at least one neuron in each, "
                f"got names {list(names)} with neurons {list(num_neurons)}"
            )
        self.names = tuple(names)
        self.num_neurons = tuple(int(n) for n in num_neurons)
        index = torch.zeros(len(names), max(num_neurons), dtype=torch.long)
        first = 0
        for row, count in enumerate(self.num_neurons):
            index[row, :count] = torch.arange(first, first + count)
            first += count
        # Padding points at row 0: it is finite, and whatever it produces is masked, so it gets no gradient.
        self.register_buffer("index", index, persistent=False)

    @classmethod
    def of(cls, recordings: Recordings) -> NeuronTable:
        """The table of these recordings' neurons."""
        return cls(list(recordings), [recording.num_neurons for recording in recordings.values()])

    def check(self, names: Sequence[str], num_neurons: Sequence[int]) -> None:
        """Raise ``ValueError`` for a recording that the table lacks, or that has another number of neurons there."""
        for name, count in zip(names, num_neurons, strict=True):
            if name not in self.names:
                raise checks.unknown(name, self.names)
            known = self.num_neurons[self.names.index(name)]
            if count != known:
                raise ValueError(
                    f"recording {name!r}: needed its {known} neurons, as the model knows it, got {count}; names "
                    "identify recordings: rename another session, and make the model with it"
                )

    @property
    def total(self) -> int:
        """Neurons in all recordings together."""
        return sum(self.num_neurons)

    def slice(self, name: str) -> slice:
        """The rows of one recording in a flat table."""
        row = self.names.index(name)
        first = sum(self.num_neurons[:row])
        return slice(first, first + self.num_neurons[row])

    def counts(self, recording: Int[Tensor, " R"]) -> tuple[int, ...] | None:
        """Numbers of neurons of these rows, on the host; None where it would have to wait for a device."""
        if recording.device.type != "cpu":
            return None
        return tuple(self.num_neurons[row] for row in recording.tolist())

    def rows(self, recording: Int[Tensor, " R"], width: int) -> Int[Tensor, "R width"]:
        """Rows of the flat table for the first ``width`` neurons of each recording, padded with row 0."""
        return self.index[recording, :width]

    def gather(
        self, parameter: Shaped[Tensor, "total ..."], recording: Int[Tensor, " R"], width: int
    ) -> Tensor:
        """Rows of ``parameter`` as a padded tensor ``(R, width, ...)``."""
        rows = self.rows(recording, width)
        return parameter.index_select(0, rows.reshape(-1)).reshape(*rows.shape, *parameter.shape[1:])


class ReadOut(PyroModule):
    """Affine read-out of every recording, ``predictor = z C_i + d_i`` (eq. 10).

    Args:
        neurons: the table of all neurons.
        latent_dim: number of latents.

    Shape: ``(..., R, K, T, latent_dim) -> (..., R, K, T, neuron)``.
    """

    # A PyroModule, so that weight or bias may be a PyroSample; a part of the model's program, not one of its own.
    __call__ = nn.Module.__call__

    def __init__(self, neurons: NeuronTable, latent_dim: int):
        super().__init__()
        self.neurons = neurons
        self.weight = nn.Parameter(torch.randn(neurons.total, latent_dim) * latent_dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(neurons.total))

    def forward(self, z: Tensor, recording: Tensor, width: int | None = None) -> Tensor:
        width = max(self.neurons.num_neurons) if width is None else width
        if self.weight.dim() > 2 or self.bias.dim() > 1:  # draws of a global site
            rows = self.neurons.rows(recording, width)
            weight, bias = Program.rows(self.weight, rows), Program.rows(self.bias.unsqueeze(-1), rows)
            return torch.matmul(z, weight.mT.unsqueeze(-3)) + bias.squeeze(-1)[..., None, None, :]
        weight = self.neurons.gather(self.weight, recording, width)
        bias = self.neurons.gather(self.bias, recording, width)
        return linear_by_recording(z, weight.transpose(-1, -2), bias, self.neurons.counts(recording))


class ReadIn(nn.Module):
    """Linear read-in, ``ybar = sqrt(N_i) mean_n ((s(y_n) - m_n) / c_i) W_n + b_i`` over the neurons seen (eq. 14).

    ``s`` is the square root for counts (it evens out their noise) and the identity otherwise; ``m_n`` are the means of
    the neurons and ``c_i`` the scale of the recording, or of each kind of its neurons, both set once by :meth:`start`.
    Missing bins and held-out neurons contribute nothing; a mean over those seen does not shrink when a few are missing.
    The root of the number of neurons keeps weights of order one, so that the same learning rate suits ten neurons and a
    thousand.

    Args:
        neurons: the table of all neurons.
        out_dim: channels of the common space.

    Shape: a batch's ``(R, K, T, neuron)`` to ``(R, K, T, out_dim)``, and the share of neurons seen ``(R, K, T, 1)``.
    """

    center: Tensor
    scale: Tensor
    counts: Tensor
    started: Tensor

    def __init__(self, neurons: NeuronTable, out_dim: int):
        super().__init__()
        self.neurons = neurons
        self.weight = nn.Parameter(torch.randn(neurons.total, out_dim))
        self.bias = nn.Parameter(torch.zeros(len(neurons.names), out_dim))
        self.register_buffer("center", torch.zeros(neurons.total))
        self.register_buffer("scale", torch.ones(neurons.total))
        self.register_buffer("counts", torch.zeros(neurons.total, dtype=torch.bool))
        self.register_buffer("started", torch.tensor(False))

    def start(self, recordings: Recordings, kinds: Tensor | None = None) -> None:
        """Set the transform, the means and the scale of every recording from the data, once.

        Args:
            recordings: with the data.
            kinds: which kind of observations each neuron of the table has, ``(total,)``; default one.
        """
        self.neurons.check(recordings.names, [recording.num_neurons for recording in recordings.values()])
        if self.started:
            return
        for name, recording in recordings.items():
            rows = self.neurons.slice(name)
            its_kinds = np.zeros(recording.num_neurons) if kinds is None else kinds[rows].cpu().numpy()
            for kind in np.unique(its_kinds):
                own = its_kinds == kind
                values, mask = recording.values[..., own], recording.mask[..., own]
                counts = bool((values >= 0).all() and (values == np.round(values)).all())
                features = np.sqrt(values) if counts else values
                ever = mask.any((0, 1))  # a neuron without an observation has no mean, and needs none
                variance = features.var((0, 1), where=mask | ~ever)[ever]
                scale = max(float(np.sqrt(variance.mean())), 1e-6) if len(variance) else 1.0
                chosen = torch.from_numpy(own).to(self.center.device)
                self.counts[rows][chosen] = counts
                self.center[rows][chosen] = torch.as_tensor(features.mean((0, 1), where=mask | ~ever)).to(
                    self.center
                )
                self.scale[rows][chosen] = scale
        self.started.fill_(True)

    def features(self, batch: Batch) -> Tensor:
        """Centred and scaled features of the neurons, zero where not seen, ``(R, K, T, neuron)``."""
        center = self.neurons.gather(self.center, batch.recording, batch.width)[:, None, None, :]
        seen = everywhere(batch.mask) & batch.held_in[:, None, None, :]
        scale = self.neurons.gather(self.scale, batch.recording, batch.width)[:, None, None, :]
        return (self._transformed(batch) - center).mul_(seen).div_(scale)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        shape = (*batch.observations.shape[:3], 1)
        weight = self.neurons.gather(self.weight, batch.recording, batch.width)
        center = self.neurons.gather(self.center, batch.recording, batch.width)
        scale = self.neurons.gather(self.scale, batch.recording, batch.width).unsqueeze(-1)
        steady = everywhere(batch.mask)
        # Held-out neurons and padding have no weight; the mask is needed only where bins are missing.
        weight = weight * (batch.held_in.unsqueeze(-1) / scale)
        y = self._transformed(batch)
        count = (steady & batch.held_in[:, None, None, :]).sum(-1, keepdim=True).to(weight.dtype)
        known = batch.held_in.sum(-1).clamp(min=1)[:, None, None, None].to(weight.dtype)
        bias = self.bias[batch.recording][:, None, None, :] * (count > 0).to(weight.dtype)
        factor = known.sqrt() / count.clamp(min=1)
        if steady is batch.mask:
            product = centred_product(
                y, batch.mask, center, weight, torch.zeros_like(bias[:, 0, 0]), batch.num_neurons
            )
            ybar = torch.addcmul(bias, product, factor)
        else:  # of a recording there is one number seen, and what it does is done to the weights
            ybar = centred_product(
                y, batch.mask, center, weight * factor[:, 0], bias[:, 0, 0], batch.num_neurons
            )
        return ybar, (count / known).expand(shape)

    def _transformed(self, batch: Batch) -> Tensor:
        y = batch.observations
        # On a GPU the root costs less than asking whether it is needed.
        if y.device.type == "cpu" and not self.counts.any():
            return y
        counts = self.neurons.gather(self.counts, batch.recording, batch.width)[:, None, None, :]
        return torch.where(counts, y.clamp(min=0).sqrt(), y)
