"""RolloutPath against products of its factors, plain loops and finite differences."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from linear_chain import MU, PATTERNS, SIGMA, A, B, D, Q, T, chain, check_moments, encoder, step
from torch.autograd import gradcheck

from pyro_metassm.distributions import (
    RolloutPath,
    _runs,
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rollout_path_density_is_the_product_of_its_factors(pattern):
    loc, scale = encoder(3)
    mask = torch.arange(T) < torch.tensor([5, 4, 2])[:, None]
    rollout = PATTERNS[pattern]
    q = RolloutPath(loc, scale, chain(mask=mask), None if rollout is None else rollout.expand(3, T))
    z = q.rsample((6,))
    assert z.shape == (6, 3, T, D)
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for s in range(6):
        for k in range(3):
            for t in range(T):
                if mask[k, t]:
                    own = dist.Normal(loc[k, t], scale[k, t]).to_event(1)
                    factor = step(z[s, k, t - 1]) if rollout is not None and t > 0 and rollout[t] else own
                    expected[s, k] += factor.log_prob(z[s, k, t])
    torch.testing.assert_close(q.log_prob(z), expected, rtol=1e-12, atol=0)
    changed = torch.where(mask[..., None], z, 1e6)
    assert torch.equal(q.log_prob(changed), q.log_prob(z))


@pytest.mark.parametrize("sample_shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("probability", [0.2, 0.7, 1.0])
def test_rollouts_by_depth_are_the_plain_loop(probability, sample_shape):
    num_steps, batch = 12, (3, 2)
    still = lambda z: dist.Normal(torch.tanh(z @ A.mT) + B, torch.full_like(Q, 1e-300)).to_event(1)
    prior = chain(num_steps, batch=batch, transition=still)
    loc, scale = encoder(*batch, num_steps=num_steps)
    torch.manual_seed(0)
    rollout = torch.rand(*batch, num_steps) < probability
    kept = rollout.clone()
    torch.manual_seed(1)
    z = RolloutPath(loc, scale, prior, rollout).rsample(sample_shape)
    assert torch.equal(rollout, kept)  # the argument is not changed
    torch.manual_seed(1)
    expected = RolloutPath(loc, scale, prior).rsample(sample_shape).clone()
    for t in range(1, num_steps):
        moved = torch.tanh(expected[..., t - 1, :] @ A.mT) + B
        expected[..., t, :] = torch.where(rollout[..., t, None], moved, expected[..., t, :])
    torch.testing.assert_close(z, expected, rtol=1e-13, atol=1e-14)
    encoded = ~rollout | (torch.arange(num_steps) == 0)
    assert torch.equal(z[..., encoded, :], expected[..., encoded, :])  # the others: to the bit
    assert 0 < encoded.sum() < encoded.numel()


def test_rollouts_take_one_pass_a_depth():
    calls = []

    def transition(z):
        calls.append(z.shape[-2])
        return step(z)

    rollout = torch.tensor([[0, 1, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0, 1]]).bool()
    loc, scale = encoder(2, num_steps=7)
    RolloutPath(loc, scale, chain(7, batch=(2,), transition=transition), rollout).rsample()
    # One state to see whether it tells the trials apart; depth 1: four bins of both trials; depth 2: two; depth 3: one.
    assert calls == [1, 4, 2, 1]


TELLS_APART = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).view(3, 2, 1, 1)  # (recording, trial, 1, 1)
TRIALS = {
    "in the mean": lambda z: dist.Normal(torch.tanh(z) + TELLS_APART, 1e-300 + 0 * z),
    "in the scale": lambda z: dist.Normal(torch.tanh(z), 1e-300 * (2 + TELLS_APART)),
    "and insists on them": lambda z: dist.Normal(
        torch.tanh(z) + TELLS_APART.expand(*z.shape[:-1], 1), torch.full_like(z, 1e-300)
    ),
    "of a recording only": lambda z: dist.Normal(
        torch.tanh(z) + TELLS_APART[:, :1], torch.full_like(z, 1e-300)
    ),
}


@pytest.mark.parametrize("sample_shape", [(), (2,)])
@pytest.mark.parametrize("trials", TRIALS)
def test_rollouts_of_a_transition_that_tells_trials_apart(trials, sample_shape):
    move = TRIALS[trials]
    prior = chain(9, batch=(3, 2), transition=lambda z: move(z).to_event(1))
    torch.manual_seed(0)
    rollout = torch.rand(3, 2, 9) < 0.6
    z = RolloutPath(*encoder(3, 2, num_steps=9), prior, rollout).rsample(sample_shape)
    for t in range(1, 9):
        moved = move(z[..., t - 1 : t, :]).mean[..., 0, :]
        torch.testing.assert_close(z[..., t, :][..., rollout[..., t], :], moved[..., rollout[..., t], :])


@pytest.mark.parametrize(
    "rollout, widths",
    [
        ([[[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 0, 1, 0], [1, 0, 1, 0]]], [2, 2, 2]),  # trials end in runs
        ([[[0, 1, 0, 1], [0, 0, 0, 0]], [[0, 1, 1, 0], [0, 0, 0, 1]]], [2, 1]),
        ([[[0, 1, 0, 1]], [[0, 1, 1, 1]]], [2, 1, 1]),
        ([[[0, 0, 0, 0]] * 2] * 2, []),
    ],
    ids=["to the end", "ragged", "one trial", "none"],
)
def test_rollouts_of_all_trials_of_a_recording_are_side_by_side(rollout, widths):
    """So that no pass has more rows than the recording that needs most."""
    shapes = []

    def transition(z):
        shapes.append(z.shape[:-1])
        return step(z)

    rollout = torch.tensor(rollout).bool()
    loc, scale = encoder(*rollout.shape[:2], num_steps=4)
    prior = chain(4, batch=rollout.shape[:2], transition=transition)
    assert RolloutPath(loc, scale, prior, rollout).rsample().shape == loc.shape
    assert shapes == [(2, 1, 1), *((2, 1, width) for width in widths)]


@pytest.mark.parametrize("shape", [(20, 11), (2, 3, 6), (1, 2), (4, 1), (7,)])
def test_runs_side_by_side_are_those_of_a_plain_loop(shape):
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = False
    runs, size = _runs(mask), shape[-1]
    assert runs.source.shape == shape and runs.before.shape[:-1] == shape[:-1]
    rows = []
    for row in mask.reshape(-1, size).tolist():
        starts = [t for t in range(1, size) if row[t] and not row[t - 1]]
        rows.append([(t, [*row[t:], False].index(False)) for t in starts])
    longest = max((length for row in rows for _, length in row), default=0)
    most = [max(sum(length > k for _, length in row) for row in rows) for k in range(longest)]
    assert runs.widths == most
    first = size + np.cumsum([0, *most])
    flat = [x.reshape(len(rows), -1) for x in (mask, runs.before, runs.source)]
    for row, rolled, before, source in zip(rows, *flat, strict=True):
        assert torch.equal(source[~rolled], torch.arange(size)[~rolled])  # the encoder's stay where they are
        columns = []
        for start, length in row:
            columns.append(int(source[start] - size))
            assert before[columns[-1]] == start - 1
            assert source[start : start + length].tolist() == [first[k] + columns[-1] for k in range(length)]
        assert sorted(columns) == list(range(len(row)))
        assert (before[len(row) :] == 0).all()


def test_rollout_bins_have_the_priors_noise():
    """Given the bin before, a roll-out bin is Normal(A z + b, Q), at every depth."""
    torch.manual_seed(0)
    rollout = torch.tensor([False, True, True, False, True])
    loc, scale = encoder()
    num = 20_000
    z = RolloutPath(loc, scale, chain(), rollout).rsample((num,))
    residual = (z[:, 1:] - (z[:, :-1] @ A.mT + B))[:, rollout[1:]] / Q
    check_moments(residual.flatten(1).numpy(), np.zeros(6), np.eye(6))
    own = (z[:, ~rollout] - loc[~rollout]) / scale[~rollout]
    check_moments(own.flatten(1).numpy(), np.zeros(4), np.eye(4))


def test_rollout_path_gradients_agree_with_finite_differences():
    loc, scale = encoder(2)
    loc.requires_grad_(), scale.requires_grad_()
    a = A.clone().requires_grad_()
    mask = torch.tensor([[True] * T, [True] * 3 + [False] * 2])
    rollout = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 1, 0]]).bool()

    def terms(loc, scale, a):
        torch.manual_seed(4)
        move = lambda z: dist.Normal(torch.tanh(z @ a.mT), Q).to_event(1)
        prior = chain(mask=mask, batch=(2,), transition=move)
        q = RolloutPath(loc, scale, prior, rollout)
        z = q.rsample()
        return z, q.log_prob(z), q.kl_given(prior, z)

    assert gradcheck(terms, (loc, scale, a))


def test_rollout_path_of_one_step():
    loc, scale = encoder(2, num_steps=1)
    prior = chain(num_steps=1)
    q = RolloutPath(loc, scale, prior, torch.ones(2, 1, dtype=torch.bool))
    z = q.rsample()
    expected = torch.distributions.kl_divergence(
        dist.Normal(loc[:, 0], scale[:, 0]), dist.Normal(MU, SIGMA)
    ).sum(-1)
    torch.testing.assert_close(q.kl_given(prior, z), expected)
    torch.testing.assert_close(q.log_prob(z), dist.Normal(loc, scale).log_prob(z).sum((-1, -2)))


@pytest.mark.parametrize("rolled", [False, True])
def test_rollout_path_expands(rolled):
    loc, scale = encoder(3)
    prior = chain(mask=torch.ones(3, T, dtype=torch.bool))
    q = RolloutPath(loc, scale, prior, torch.rand(3, T) < 0.5 if rolled else None).expand((4, 3))
    z = q.rsample((2,))
    assert q.batch_shape == (4, 3) and z.shape == (2, 4, 3, T, D)
    assert q.log_prob(z).shape == (2, 4, 3) and q.kl_given(prior.expand((4, 3)), z).shape == (2, 4, 3)
    assert len(torch.unique(z[..., 0, 0])) == 24
    # An encoder without the batch of its prior takes that of the prior.
    assert RolloutPath(loc[0], scale[0], prior).rsample().shape == (3, T, D)
