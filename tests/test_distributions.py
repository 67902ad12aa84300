"""Path distributions against dense Gaussians, unrolled programs, plain loops, quadrature and finite differences."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import multivariate_normal
from torch.autograd import gradcheck

from pyro_metassm.distributions import (
    MarkovPath,
    RolloutPath,
    _runs,
    conditional_kl,
)

A = torch.tensor([[0.9, 0.5], [-0.4, 0.7]], dtype=torch.float64)
B = torch.tensor([0.3, -0.2], dtype=torch.float64)
Q = torch.tensor([0.5, 0.2], dtype=torch.float64)  # sd of a step
MU, SIGMA = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.7, 1.5], dtype=torch.float64)
T, D = 5, 2
SIGMAS = 5.0  # standard errors allowed: 6e-7 a comparison, were the seeds not fixed


def step(z):
    return dist.Normal(z @ A.mT + B, Q).to_event(1)


def bent(z):
    return dist.Normal(torch.tanh(z @ A.mT) + B, Q).to_event(1)


def chain(num_steps=T, mask=None, batch=(), transition=step) -> MarkovPath:
    initial = dist.Normal(MU, SIGMA).expand((*batch, D)).to_event(1)
    return MarkovPath(initial, transition, num_steps, mask)


def dense(num_steps: int = T) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the linear chain's whole path: by its definition, ``z = M (noise) + m``."""
    a, b, q, mu, sigma = (x.numpy() for x in (A, B, Q, MU, SIGMA))
    mean = [mu]
    for _ in range(num_steps - 1):
        mean.append(a @ mean[-1] + b)
    mix = np.zeros((num_steps * D, num_steps * D))
    for t in range(num_steps):
        for s in range(t + 1):
            scale = np.diag(sigma if s == 0 else q)
            mix[t * D : t * D + D, s * D : s * D + D] = np.linalg.matrix_power(a, t - s) @ scale
    return np.concatenate(mean), mix @ mix.T


def check_moments(samples: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> None:
    """Sample moments within standard errors: var(m_i) = C_ii / N, var(S_ij) = (C_ii C_jj + C_ij^2) / N."""
    num = len(samples)
    variance = cov.diagonal()
    assert (np.abs(samples.mean(0) - mean) < SIGMAS * np.sqrt(variance / num)).all()
    error = np.sqrt((np.outer(variance, variance) + cov**2) / num)
    centred = samples - mean
    assert (np.abs(centred.T @ centred / num - cov) < SIGMAS * error).all()


# ---- MarkovPath -------------------------------------------------------------------------------------------------


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


# ---- RolloutPath ------------------------------------------------------------------------------------------------


def encoder(*batch, num_steps=T, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    loc = torch.randn(*batch, num_steps, D, generator=rng, dtype=torch.float64)
    return loc, torch.rand(*batch, num_steps, D, generator=rng, dtype=torch.float64) + 0.3


PATTERNS = {
    "none": None,
    "some": torch.tensor([False, True, False, True, True]),
    "all": torch.tensor([True] * T),
}


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
