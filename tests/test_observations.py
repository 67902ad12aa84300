"""Log densities in pieces that stay in the cache, against the plain formulas and autograd."""

import pyro.distributions as dist
import pytest
import torch
from problems import recordings
from pyro import poutine
from torch.distributions import constraints

import pyro_metassm as pm
from pyro_metassm import blocks, native
from pyro_metassm.neurons import NeuronTable, ReadIn
from pyro_metassm.observations import NeuronNormal, SaturatingPoisson, observed
from pyro_metassm.recordings import Batch

SHAPE = (3, 4, 5, 6)  # (R, K, T, N)
DOUBLE = torch.float64


@pytest.fixture(params=[1, 25, 100, 300, 10**6], ids=lambda size: f"pieces of {size}")
def pieces(request, monkeypatch):
    """Pieces of one trial, of some trials, of one recording, of some recordings, of everything."""
    monkeypatch.setattr(blocks, "CACHED", request.param)


def masks() -> dict[str, torch.Tensor]:
    neurons = torch.arange(SHAPE[3]) < torch.tensor(NUMBERS)[:, None]
    steady = neurons[:, None, None, :].expand(SHAPE)
    return {"steady": steady, "missing": steady & (torch.rand(SHAPE) < 0.7)}


NUMBERS = (6, 2, 4)  # of neurons: as the masks say


def gaussian(x, parameter, **known):
    return NeuronNormal(x, parameter.exp()[:, None, None], **known), [x, parameter]


def poisson(x, parameter, **known):
    return SaturatingPoisson(x, parameter.detach()[:, None, None], **known), [x]


def plain_gaussian(x, parameter, y):
    return dist.Normal(x, parameter.exp()[:, None, None]).log_prob(y)


def plain_poisson(x, parameter, y):
    return dist.Poisson(1 / ((-x).exp() + (-parameter[:, None, None]).exp())).log_prob(y)


@pytest.mark.parametrize("known", [{}, {"num_neurons": NUMBERS}], ids=["", "numbers known"])
@pytest.mark.parametrize("kind", ["steady", "missing"])
@pytest.mark.parametrize(
    "family, plain", [(gaussian, plain_gaussian), (poisson, plain_poisson)], ids=["gaussian", "poisson"]
)
def test_sums_over_trials_are_those_of_the_plain_formula_in_value_and_gradient(
    family, plain, kind, known, pieces
):
    torch.manual_seed(0)
    mask = masks()[kind]
    x = torch.randn(SHAPE, dtype=DOUBLE, requires_grad=True)
    parameter = torch.randn(SHAPE[0], SHAPE[3], dtype=DOUBLE, requires_grad=True)
    y = torch.poisson(torch.full(SHAPE, 1.5, dtype=DOUBLE))
    y[0, 0, 0, :3] = torch.tensor([0.0, 256.0, 400.0])  # beyond the table of factorials too
    weight = torch.randn(SHAPE[:2], dtype=DOUBLE)
    made, leaves = family(x, parameter, **known)
    total = observed(made, mask).log_prob(y)
    expected = (plain(x, parameter, y) * mask).sum((-1, -2))
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad((total * weight).sum(), leaves)
    torch.testing.assert_close(
        grads, torch.autograd.grad((expected * weight).sum(), leaves), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("family", [gaussian, poisson])
def test_draws_before_the_recordings_are_scored_one_by_one(family):
    torch.manual_seed(0)
    x, parameter = torch.randn(2, *SHAPE), torch.randn(SHAPE[0], SHAPE[3])
    y, mask = torch.poisson(torch.ones(SHAPE)), masks()["missing"]
    together = observed(family(x, parameter)[0], mask).log_prob(y)
    one_by_one = torch.stack([observed(family(draw, parameter)[0], mask).log_prob(y) for draw in x])
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize("family", [gaussian, poisson])
def test_they_are_distributions_like_any_other(family):
    torch.manual_seed(0)
    x, parameter = torch.randn(SHAPE), torch.randn(SHAPE[0], SHAPE[3])
    made = family(x, parameter)[0]
    y = made.sample((7,))
    assert y.shape == (7, *SHAPE) and made.batch_shape == SHAPE and made.event_shape == ()
    wide = made.expand((7, *SHAPE))
    torch.testing.assert_close(wide.log_prob(y), made.log_prob(y))
    torch.testing.assert_close(wide.mean[3], made.mean)
    whole = observed(made, masks()["missing"])
    assert whole.batch_shape == SHAPE[:2] and whole.event_shape == SHAPE[2:]
    assert whole.expand((7, *SHAPE[:2])).log_prob(y).shape == (7, *SHAPE[:2])


@pytest.mark.parametrize("family", [pm.likelihoods.Gaussian, pm.likelihoods.Poisson])
def test_the_program_scores_its_observations_this_way(family, monkeypatch):
    recs = recordings(counts=True)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=family)
    site = poutine.trace(model).get_trace(recs.batch(model.names)).nodes["observations"]
    made = type(site["fn"].y)
    monkeypatch.setattr(made, "log_prob", lambda *args: pytest.fail("scored one by one"))
    assert site["fn"].log_prob(site["value"]).shape == site["fn"].batch_shape


def test_a_value_outside_the_support_is_refused_while_pyro_validates():
    y = -torch.ones(SHAPE)
    made = observed(SaturatingPoisson(torch.zeros(SHAPE), torch.ones(3, 1, 1, 6)), masks()["steady"])
    assert isinstance(made.support, constraints.Constraint)
    made._validate_args = True
    with pytest.raises(ValueError, match="support"):
        made.log_prob(y)


@pytest.mark.parametrize("kind", ["steady", "missing"])
def test_the_read_in_is_its_features_times_its_weights(kind, pieces):
    torch.manual_seed(0)
    num, trials, bins, width = SHAPE
    mask = masks()[kind]
    read_in = ReadIn(NeuronTable(["a", "b", "c"], [6, 2, 4]), 3).double()
    with torch.no_grad():
        read_in.center.normal_(), read_in.scale.uniform_(0.5, 2.0), read_in.counts[6:8].fill_(True)
        read_in.bias.normal_()
    held_in = mask.any(2).any(1)
    held_in[0, 4] = False
    batch = Batch(
        names=("a", "b", "c"),
        recording=torch.arange(num),
        observations=torch.rand(SHAPE, dtype=DOUBLE) * mask,
        mask=mask,
        time_mask=torch.ones(num, trials, bins, dtype=torch.bool),
        held_in=held_in,
        num_neurons=(6, 2, 4),
        trial_scale=torch.ones(num, 1),
        inputs=None,
        num_recordings=num,
    )
    ybar, share = read_in(batch)
    known = held_in.sum(-1)[:, None, None, None].double()
    count = (mask & held_in[:, None, None, :]).sum(-1, keepdim=True)
    weight = read_in.neurons.gather(read_in.weight, batch.recording, width)
    product = (
        torch.einsum("rktn,rnc->rktc", read_in.features(batch), weight) * known.sqrt() / count.clamp(min=1)
    )
    expected = (product + read_in.bias[:, None, None]) * (count > 0)
    torch.testing.assert_close(ybar, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(share, count / known)
    probe = torch.randn_like(ybar)
    leaves = (read_in.weight, read_in.bias)
    for ours, theirs in zip(
        *(torch.autograd.grad((out * probe).sum(), leaves) for out in (ybar, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("threads", [None, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 4, 5, 6), (7, 1, 2, 3), (2, 9, 1, 1)])
def test_blocks_cover_everything_once(shape, threads, pieces, monkeypatch):
    monkeypatch.setattr(blocks, "LARGE", 0)
    monkeypatch.setattr(native, "threads", threads)
    x = torch.zeros(shape, requires_grad=True)
    y = torch.zeros(shape)

    def work(rows: slice, trials: slice, neurons: slice) -> None:
        assert y[rows, trials, :, neurons].is_contiguous() and not torch.is_grad_enabled()
        y[rows, trials, :, neurons] += 1 + x[rows, trials, :, neurons]

    blocks.each_block(x, work)
    assert (y == 1).all() and torch.is_grad_enabled()


def test_blocks_cover_all_neurons_once_and_no_padding_that_is_common_to_them(pieces):
    y, real = torch.zeros(SHAPE), masks()["steady"]

    def work(rows: slice, trials: slice, neurons: slice) -> None:
        assert neurons.stop == max(NUMBERS[rows])
        y[rows, trials, :, neurons] += 1

    blocks.each_block(y, work, NUMBERS)
    assert (y[real] == 1).all() and (y <= 1).all()


@pytest.mark.parametrize("family", [gaussian, poisson])
def test_any_number_of_threads_gives_the_same_numbers(family, monkeypatch):
    monkeypatch.setattr(blocks, "CACHED", 40)
    monkeypatch.setattr(blocks, "LARGE", 0)
    results = []
    for threads in (None, 1, 2, 3):
        monkeypatch.setattr(native, "threads", threads)
        torch.manual_seed(0)
        x, parameter = (torch.randn(s, requires_grad=True) for s in (SHAPE, (SHAPE[0], SHAPE[3])))
        made, leaves = family(x, parameter)
        total = observed(made, masks()["missing"]).log_prob(torch.poisson(torch.ones(SHAPE)))
        results.append([total, *torch.autograd.grad(total.sum(), leaves)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_an_error_in_a_thread_is_raised():
    def work(rows: slice, trials: slice, neurons: slice) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        blocks.each_block(torch.zeros(2, 2, 2, 2), work)
