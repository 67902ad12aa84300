"""MarkovPath against dense Gaussians, unrolled programs and finite differences."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_chain import MU, SIGMA, A, D, Q, T, chain, check_moments, dense, step
from scipy.stats import multivariate_normal
from torch.autograd import gradcheck

from pyro_metassm.distributions import (
    MarkovPath,
)


def test_markov_path_density_is_the_dense_gaussian():
    mean, cov = dense()
    z = torch.as_tensor(np.random.default_rng(0).normal(size=(20, T, D)) * 2)
    expected = multivariate_normal(mean, cov).logpdf(z.flatten(1).numpy())
    np.testing.assert_allclose(chain().log_prob(z).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("draw", ["rsample", "sample"])
def test_markov_path_samples_are_the_dense_gaussian(draw):
    torch.manual_seed(1)
    samples = getattr(chain(), draw)((20_000,))
    assert not samples.requires_grad
    check_moments(samples.flatten(1).numpy(), *dense())


def unrolled(num_steps=T, batch=4):
    """The same chain as the Pyro tutorial writes it: one site a step."""
    with pyro.plate("trial", batch):
        z = pyro.sample("z0", dist.Normal(MU, SIGMA).expand((batch, D)).to_event(1))
        for t in range(1, num_steps):
            z = pyro.sample(f"z{t}", step(z))


def test_markov_path_is_the_program_of_one_site_a_step():
    def path():
        with pyro.plate("trial", 4):
            return pyro.sample("z", chain())

    torch.manual_seed(2)
    sites = pyro.poutine.trace(unrolled).get_trace()
    torch.manual_seed(2)
    whole = pyro.poutine.trace(path).get_trace()
    z = whole.nodes["z"]["value"]
    assert z.shape == (4, T, D)
    for t in range(T):  # the same noise gives the same path, to the bit
        assert torch.equal(z[:, t], sites.nodes[f"z{t}"]["value"])
    torch.testing.assert_close(whole.log_prob_sum(), sites.log_prob_sum(), rtol=1e-13, atol=0)


def test_markov_path_log_factors_are_the_steps():
    z = torch.randn(3, T, D, dtype=torch.float64)
    factors = chain().log_factors(z)
    assert factors.shape == (3, T)
    torch.testing.assert_close(factors[:, 0], dist.Normal(MU, SIGMA).to_event(1).log_prob(z[:, 0]))
    for t in range(1, T):
        torch.testing.assert_close(factors[:, t], step(z[:, t - 1]).log_prob(z[:, t]))


def test_markov_path_calls_the_transition_once_for_a_density_and_stepwise_for_a_draw():
    seen = []

    def transition(z):
        seen.append(tuple(z.shape))
        return step(z)

    path = chain(transition=transition, batch=(3,))
    z = path.rsample()
    assert seen == [(3, 1, D)] * (T - 1)
    seen.clear()
    path.log_prob(z)
    assert seen == [(3, T - 1, D)]


@pytest.mark.parametrize("transition", ["linear", "student"])
def test_markov_path_gradients_agree_with_finite_differences(transition):
    torch.manual_seed(0)
    z = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    a, loc, log_q = (x.clone().requires_grad_() for x in (A, MU, Q.log()))
    mask = torch.tensor([[True] * T, [True] * 3 + [False] * 2])

    def path(a, loc, log_q):
        def move(z):
            if transition == "linear":
                return dist.Normal(z @ a.mT, log_q.exp()).to_event(1)
            return dist.StudentT(4.0, torch.tanh(z @ a.mT), log_q.exp()).to_event(1)

        return MarkovPath(dist.Normal(loc, 1.0).to_event(1), move, T, mask)

    def draw(a, loc, log_q):
        torch.manual_seed(3)
        return path(a, loc, log_q).rsample()

    assert gradcheck(lambda z, *p: path(*p).log_prob(z), (z, a, loc, log_q))
    if transition == "linear":  # Student-t draws divide by random gammas of the backward's own
        assert gradcheck(draw, (a, loc, log_q))


@pytest.mark.parametrize("batch", [(), (3,), (4, 3)])
@pytest.mark.parametrize("sample_shape", [(), (5,), (5, 2)])
def test_markov_path_shapes(batch, sample_shape):
    path = chain().expand(batch)
    assert path.batch_shape == batch and path.event_shape == (T, D)
    z = path.rsample(sample_shape)
    assert z.shape == (*sample_shape, *batch, T, D)
    assert path.log_prob(z).shape == (*sample_shape, *batch)
    # Draws are independent over the batch, not copies of one.
    for t in (0, -1):
        assert len(torch.unique(z[..., t, 0])) == math.prod((*sample_shape, *batch))
    # One path under a batch of chains broadcasts, as with every distribution.
    one = torch.randn(T, D, dtype=torch.float64)
    torch.testing.assert_close(path.log_prob(one), chain().log_prob(one).expand(batch))


def test_markov_path_batches_come_from_initial_mask_or_expand():
    mask = torch.ones(4, 3, T, dtype=torch.bool)
    assert chain(mask=mask).batch_shape == (4, 3)
    assert chain(mask=mask[0], batch=(4, 1)).batch_shape == (4, 3)
    for path in (chain(mask=mask), chain(mask=mask[0], batch=(4, 1))):
        z = path.rsample()
        assert (
            z.shape == (4, 3, T, D)
            and len(torch.unique(z[..., 0, 0])) == len(torch.unique(z[..., -1, 0])) == 12
        )
    expanded = chain(mask=mask).expand((2, 4, 3))
    assert expanded.batch_shape == (2, 4, 3) and expanded.log_prob(expanded.rsample()).shape == (2, 4, 3)
    one = torch.randn(T, D, dtype=torch.float64)
    assert chain(mask=mask).log_prob(one).shape == (4, 3)


def test_markov_path_ends_where_its_mask_ends():
    lengths = torch.tensor([5, 3, 1, 0])
    mask = torch.arange(T) < lengths[:, None]
    z = torch.randn(4, T, D, dtype=torch.float64, requires_grad=True)
    value = chain(mask=mask).log_prob(z)
    for row, length in enumerate(lengths[:3].tolist()):
        torch.testing.assert_close(value[row], chain(num_steps=length).log_prob(z[row, :length]))
    assert value[3] == 0
    value.sum().backward()
    assert (z.grad[~mask] == 0).all() and (z.grad[mask] != 0).all()
    changed = torch.where(mask[..., None], z.detach(), 1e6)
    assert torch.equal(chain(mask=mask).log_prob(changed), value)


def test_markov_path_of_one_step_is_its_initial_distribution():
    def never(z):
        raise AssertionError("a path of one step has no transition")

    path = chain(num_steps=1, transition=never, batch=(3,))
    z = path.rsample((2,))
    assert z.shape == (2, 3, 1, D)
    torch.testing.assert_close(path.log_prob(z), dist.Normal(MU, SIGMA).to_event(1).log_prob(z[..., 0, :]))


def test_markov_path_says_whether_it_can_be_reparametrised():
    assert chain().has_rsample
    assert not MarkovPath(dist.Poisson(torch.ones(2)).to_event(1), step, 3).has_rsample


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: MarkovPath(dist.Normal(MU, SIGMA), step, T), r"event shape \(latent_dim,\).*to_event\(1\)"),
        (lambda: MarkovPath(dist.Normal(torch.zeros(3, 2), 1.0).to_event(2), step, T), "event shape"),
        (lambda: chain(num_steps=0), "num_steps >= 1, got 0"),
        (lambda: chain(mask=torch.ones(4, T + 1, dtype=torch.bool)), r"mask of \(\.\.\., 5\), got \(4, 6\)"),
    ],
)
def test_markov_path_refuses(make, words):
    with pytest.raises(ValueError, match=words):
        make()
