"""Divergences of paths against closed forms, sampled ratios and quadrature."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from linear_chain import MU, PATTERNS, SIGMA, SIGMAS, A, B, D, Q, T, bent, chain, encoder, step

from pyro_metassm.distributions import (
    MarkovPath,
    RolloutPath,
    conditional_kl,
)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("transition", [step, bent])
def test_kl_given_the_states_before_is_unbiased(pattern, transition):
    """E_q[kl_given(z)] = E_q[log q(z) - log p(z)]: the paired difference has mean zero, within its standard error."""
    torch.manual_seed(0)
    num = 20_000
    mask = torch.arange(T) < torch.tensor([5, 3])[:, None]
    prior = chain(mask=mask, transition=transition)
    loc, scale = encoder(2)
    rollout = PATTERNS[pattern]
    q = RolloutPath(loc, scale, prior, None if rollout is None else rollout.expand(2, T))
    z = q.rsample((num,))
    kl, ratio = q.kl_given(prior, z), q.log_prob(z) - prior.log_prob(z)
    assert kl.shape == ratio.shape == (num, 2)
    error = (kl - ratio).std(0) / num**0.5
    assert ((kl - ratio).mean(0).abs() < SIGMAS * error).all()
    assert (kl.mean(0) > 20 * error).all()  # the comparison would see a lost factor
    assert (kl >= 0).all()


def test_expected_kl_of_a_linear_chain_in_closed_form():
    """E_q KL(N(m, S) || N(A z' + b, Q)) with z' ~ N(m', S'): the quadratic form's mean, bin by bin."""
    torch.manual_seed(0)
    loc, scale = encoder()
    q = RolloutPath(loc, scale, chain())
    expected = ((scale[0] ** 2 + (loc[0] - MU) ** 2) / SIGMA**2 - 1 + 2 * (SIGMA / scale[0]).log()).sum()
    for t in range(1, T):
        spread = ((A * scale[t - 1]) ** 2).sum(-1)  # diagonal of A S' A^T
        miss = (loc[t] - A @ loc[t - 1] - B) ** 2 + spread
        expected = expected + ((scale[t] ** 2 + miss) / Q**2 - 1 + 2 * (Q / scale[t]).log()).sum()
    num = 20_000
    kl = q.kl_given(chain(), q.rsample((num,)))
    assert (kl.mean() - expected / 2).abs() < SIGMAS * kl.std() / num**0.5
    assert kl.std() / num**0.5 < 0.01 * expected


@pytest.mark.parametrize("num_steps", [1, 6])
def test_the_divergence_of_normals_is_that_of_torch_in_value_and_gradient(num_steps):
    """Bin by bin by ``torch.distributions``, with a first state and a noise that are the same everywhere or not."""
    torch.manual_seed(0)
    leaves = [
        torch.randn(s, dtype=A.dtype, requires_grad=True)
        for s in ((3, num_steps, 2), (3, num_steps, 2), (2,), (2,), (2, 2))
    ]
    m, log_s, mu, log_q, a = leaves
    z = torch.randn(3, num_steps, 2, dtype=A.dtype)
    for first in (mu, mu.expand(3, 2)):
        initial = dist.Normal(first, 0.7).to_event(1)
        move = lambda z: dist.Normal(z @ a, log_q.exp()).to_event(1)
        prior = MarkovPath(initial, move, num_steps)
        kl = RolloutPath(m, log_s.exp(), prior).kl_given(prior, z)
        bins = [dist.Normal(m[:, t], log_s[:, t].exp()).to_event(1) for t in range(num_steps)]
        before = [initial.expand((3,)), *(move(z[:, t]) for t in range(num_steps - 1))]
        expected = sum(torch.distributions.kl_divergence(q, p) for q, p in zip(bins, before, strict=True))
        torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-12)
        weight = torch.arange(1.0, 4.0, dtype=A.dtype)
        pairs = [torch.autograd.grad((x * weight).sum(), leaves, allow_unused=True) for x in (kl, expected)]
        torch.testing.assert_close(*pairs, rtol=1e-10, atol=1e-12)


def test_rollout_bins_have_no_divergence():
    loc, scale = encoder(3)
    z = torch.randn(3, T, D, dtype=torch.float64)
    first = torch.distributions.kl_divergence(
        dist.Normal(loc[:, 0], scale[:, 0]), dist.Normal(MU, SIGMA)
    ).sum(-1)
    q = RolloutPath(loc, scale, chain(), torch.ones(3, T, dtype=torch.bool))
    torch.testing.assert_close(q.kl_given(chain(), z), first, rtol=1e-13, atol=0)
    # Bin by bin: the divergence of a pattern is that of its other bins, and no bin is counted twice.
    by_bin = [
        RolloutPath(loc, scale, chain(), torch.arange(T).expand(3, T) != t).kl_given(chain(), z) - first
        for t in range(T)
    ]
    full = RolloutPath(loc, scale, chain()).kl_given(chain(), z)
    torch.testing.assert_close(torch.stack(by_bin).sum(0) + first, full, rtol=1e-12, atol=0)


def test_kl_and_density_end_where_the_trial_ends():
    loc, scale = encoder(3)
    mask = torch.arange(T) < torch.tensor([5, 3, 0])[:, None]
    z = torch.randn(3, T, D, dtype=torch.float64)
    prior = chain(mask=mask)
    kl = RolloutPath(loc, scale, prior).kl_given(prior, z)
    for row, length in ((0, 5), (1, 3)):
        short = chain(num_steps=length)
        alone = RolloutPath(loc[row, :length], scale[row, :length], short).kl_given(short, z[row, :length])
        torch.testing.assert_close(kl[row], alone)
    assert kl[2] == 0


# ---- dispatch ---------------------------------------------------------------------------------------------------


def test_student_t_transition_falls_back_to_the_sampled_ratio_and_agrees_with_quadrature():
    """One latent, two bins: E_q[KL] by Gauss-Hermite quadrature over (z_1, z_2), against the mean of kl_given."""
    df, width = 3.0, 0.4
    move = lambda z: dist.StudentT(df, torch.tanh(2 * z), width).to_event(1)
    prior = MarkovPath(dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1), move, 2)
    loc = torch.tensor([[0.4], [1.2]], dtype=torch.float64)
    scale = torch.tensor([[0.6], [0.5]], dtype=torch.float64)
    q = RolloutPath(loc, scale, prior)

    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = torch.as_tensor(weights / weights.sum())
    z1, z2 = (loc[t] + scale[t] * torch.as_tensor(nodes) for t in range(2))
    entropy = (0.5 * math.log(2 * math.pi * math.e) + scale.log()).sum()
    cross = (weights * dist.Normal(0.0, 1.0).log_prob(z1)).sum()
    rest = dist.StudentT(df, torch.tanh(2 * z1[:, None]), width).log_prob(z2[None, :])
    expected = -entropy - cross - (weights[:, None] * weights * rest).sum()

    torch.manual_seed(0)
    num = 40_000
    z = q.rsample((num,))
    kl = q.kl_given(prior, z)
    error = kl.std() / num**0.5
    assert (kl.mean() - expected).abs() < SIGMAS * error
    assert expected > 50 * error
    # The first bin is Normal against Normal: analytic still, the same in every draw.
    sampled = dist.Normal(loc[1], scale[1]).log_prob(z[:, 1]) - move(z[:, 0]).base_dist.log_prob(z[:, 1])
    first = kl - sampled.sum(-1)
    torch.testing.assert_close(first, first[:1].expand(num), rtol=1e-10, atol=1e-12)


def test_conditional_kl_is_analytic_where_it_can_be():
    q, p = dist.Normal(torch.randn(3, 2), 0.5).to_event(1), dist.Normal(torch.zeros(2), 1.0).to_event(1)
    z = q.sample()
    analytic = (0.25 + q.mean**2 - 1 - math.log(0.25)).sum(-1) / 2
    torch.testing.assert_close(conditional_kl(q, p, z), analytic)
    torch.testing.assert_close(conditional_kl(q, p, z + 1), analytic)  # no matter the sample


def test_conditional_kl_falls_back_to_the_sampled_ratio():
    q = dist.Normal(torch.randn(3, 2), 0.5).to_event(1)
    component = dist.Normal(torch.tensor([[-1.0, 0.0], [1.0, 2.0]]), 0.7).to_event(1)
    p = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), component)
    z = q.sample()
    torch.testing.assert_close(conditional_kl(q, p, z), q.log_prob(z) - p.log_prob(z))


def test_conditional_kl_of_paths_is_kl_given():
    loc, scale = encoder(3)
    q = RolloutPath(loc, scale, chain())
    z = q.rsample()
    torch.testing.assert_close(conditional_kl(q, chain(), z), q.kl_given(chain(), z))
