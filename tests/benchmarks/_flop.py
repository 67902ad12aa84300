"""How much arithmetic a step is, and how fast the machine does arithmetic."""

from __future__ import annotations

import time

import torch
from _cases import Case
from _networks import SET_DIM, TRUNK_DIM


def products(case: Case) -> dict[str, float]:
    """Floating-point operations of the matrix products of one step of SVI, by part, backward pass included.

    A product of ``(m, k)`` and ``(k, n)`` is ``2 m k n``. Its backward pass is two of the same size, one for each
    factor; of the read-in it is one, as data take no gradient. Every recording counts with the neurons that it has:
    what an implementation spends on padding is its own affair. Elementwise work, well below a tenth, is left out.
    Roll-outs are counted at their expected number, as transitions beside those of the KL.
    """
    latent, embedding, width, rank = case.latent_dim, case.embedding_dim, case.hidden_dim, case.rank
    trials = case.num_recordings * case.trials_per_step
    bins, moves = trials * case.num_bins, trials * (case.num_bins - 1)
    neurons = sum(case.num_neurons) * case.trials_per_step * case.num_bins
    recurrent = case.recurrent_dim
    inputs = case.common_dim + latent + embedding
    mlp = latent * width + width * width + width * latent
    updates = rank * (latent + width) + rank * (width + width)
    trunk = TRUNK_DIM * (embedding + updates)
    forward = {
        "read_in": neurons * case.read_in_dim,
        "read_out": neurons * latent,
        "common": bins * case.read_in_dim * case.common_dim,
        "embedding": moves * (2 * latent * SET_DIM + SET_DIM**2) + trials * SET_DIM * 2 * embedding,
        "recurrent": 2 * bins * (inputs + recurrent) * 3 * recurrent,
        "recurrent_out": bins * 2 * recurrent * 2 * latent,
        "hypernetwork": case.num_recordings * trunk,
        "dynamics": moves * (mlp + updates),
        "roll_outs": case.rollout_probability * moves * (mlp + updates),
    }
    return {name: 2.0 * count * (2 if name == "read_in" else 3) for name, count in forward.items()}


def matmul_gflops(device: torch.device | str = "cpu", seconds: float = 0.2) -> float:
    """Rate of float32 matrix products at the present number of threads, 1e9 operations per second: the best of some."""
    device, best = torch.device(device), 0.0
    for size in (256, 512, 1024) if device.type == "cpu" else (1024, 4096, 8192):
        a, b = torch.randn(2, size, size, device=device)
        out = a @ b
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            torch.mm(a, b, out=out)
            synchronize(device)
            best = max(best, 2e-9 * size**3 / (time.perf_counter() - begin))
    return best


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
