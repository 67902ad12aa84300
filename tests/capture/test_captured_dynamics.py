"""Roll-outs of dynamics and fits, recorded, against the same without graphs, on an emulation of CUDA graphs."""

import copy

import pytest
import torch
from captured_functions import DOUBLE, gradients
from torch import Tensor, nn

import pyro_metassm as pm
from pyro_metassm import adaptations
from pyro_metassm.adaptations import DeviatingMLP
from pyro_metassm.capture import USES, captures
from pyro_metassm.dynamics import AdaptedMLP, LowRankMLP, Network, ResidualMLP

OTHERS = [c for c in vars(adaptations).values() if isinstance(c, type) and issubclass(c, ResidualMLP)]
KINDS = [kind for kind in dict.fromkeys([LowRankMLP, *OTHERS]) if kind is not ResidualMLP]


def made(kind, recordings: int, **options):
    """Dynamics and what makes them of embeddings: of recordings, too, where they deviate from what they share."""
    if kind is not DeviatingMLP:
        f = kind(2, 3, **options)
        return f.double(), f
    f = kind(recordings, 2, 3, **options)
    return f.double(), lambda e: f(e, torch.arange(recordings))


def rolled(adapted: AdaptedMLP, z: Tensor, steps: int, clamp: float | None) -> Tensor:
    path = []
    for _ in range(steps):
        z = adapted._next(z) if clamp is None else adapted._next(z).clamp(-clamp, clamp)
        path.append(z)
    return torch.cat(path, -2)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", KINDS, ids=lambda c: c.__name__)
def test_roll_outs_of_adapted_dynamics(kind, rank, residual, cuda):
    torch.manual_seed(0)
    f, of = made(kind, 3, rank=rank, hidden_dim=7, residual=residual, activation=torch.tanh)
    size = 0.2 if kind is DeviatingMLP else 0.5  # so that some states reach the clamp and some do not
    with torch.no_grad():
        for p in f.parameters():
            p.add_(size * torch.randn_like(p))
    for call in range(USES + 2):
        torch.manual_seed(call)
        e = torch.randn(3, 1, 3, dtype=DOUBLE, requires_grad=True)
        z = torch.randn(3, 5, 1, 2, dtype=DOUBLE, requires_grad=True)
        leaves = [z, e, *f.parameters()]
        for steps, clamp in ((4, 0.3), (1, None)):
            y, expected = of(e).rollout(z, steps, clamp), rolled(of(e), z, steps, clamp)
            assert y.shape == (3, 5, steps, 2)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            assert clamp is None or 0 < (y.abs() == clamp).double().mean() < 1
            pair = (gradients(x, leaves, allow_unused=True) for x in (y, expected))
            torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)
        with torch.no_grad():  # the parameters' memory is another, as after a load
            for p in f.parameters():
                p.data = p + 0.01
    assert cuda.recorded == 4 and captures(f).known


def test_roll_outs_that_are_taken_step_by_step(cuda):
    class Edited(AdaptedMLP):
        def _next(self, z: Tensor) -> Tensor:
            return 2.0 * super()._next(z)

    torch.manual_seed(0)
    f = LowRankMLP(2, 3, hidden_dim=7).double()
    module = LowRankMLP(2, 3, hidden_dim=7, activation=nn.SiLU()).double()
    hooked = LowRankMLP(2, 3, hidden_dim=7).double()
    hooked.layers[1].register_forward_hook(lambda *_: None)
    e, z = torch.randn(3, 1, 3, dtype=DOUBLE), torch.randn(3, 5, 1, 2, dtype=DOUBLE)
    shared = LowRankMLP(2, 3, rank=0, hidden_dim=7).double()
    free = AdaptedMLP(Network(f.layers, f.activation, True), f(e).updates)  # nobody to keep a graph
    cases = [
        (Edited(f, f(e).updates), z),
        (module(e), z),
        (hooked(e), z),
        (free, z),
        (f(e), torch.randn(4, 3, 5, 1, 2, dtype=DOUBLE)),
        (f(e[:1]), z),
        (f(e[0, 0]), z[0]),
        (shared(e), torch.randn(4, 3, 5, 1, 2, dtype=DOUBLE)),
    ]
    for adapted, start in cases:
        for _ in range(USES + 1):
            torch.testing.assert_close(
                adapted.rollout(start, 3, 2.0), rolled(adapted, start, 3, 2.0), rtol=1e-12, atol=1e-12
            )
    assert cuda.recorded == 0


def test_a_fit_is_the_same_with_graphs_and_without(cuda, monkeypatch):
    recs = pm.simulate.limit_cycles([3.0, 5.0], num_trials=6, num_steps=12, num_neurons=5, seed=1)
    fits = []
    for switch in ("0", "1"):
        monkeypatch.setenv("METASSM_CUDA_GRAPHS", switch)
        torch.manual_seed(0)
        model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=2, hidden_dim=8).double()
        guide = pm.guides.DKF(model, hidden_dim=4).double()
        fits.append(
            pm.fit(model, guide, recs, num_steps=2, warm_start_steps=50, device="cpu", progress=False)
        )
        assert not captures(model.dynamics).known, "a fit trains a copy"
    one, other = (dict(fit.model.named_parameters()) for fit in fits)
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)
    assert cuda.recorded >= 2 and cuda.replays > 60, "most of 2 x 50 passes"
    assert (
        captures(fits[1].model.dynamics).known and not captures(copy.deepcopy(fits[1]).model.dynamics).known
    )
