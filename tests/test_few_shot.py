"""The search for a new recording's frame: its density against plain sums, and a family in which the answer is known."""

import known_family as family
import numpy as np
import pyro
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

import pyro_metassm as pm
from pyro_metassm import few_shot, starts
from pyro_metassm.frames import Frames, canonical_frames
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.read_outs import ReadOutPrior
from pyro_metassm.rebuilding import for_recordings
from pyro_metassm.windows import LENGTHS, roll_out

NUMBERS = (7, 30)  # neurons of the new recordings


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def fit():
    return family.fit_of(dtype=torch.double)


def some_search(fit, *, starts=3, turn=None, rows=None, shift_mean=(0.3, -0.2), concentration=12.0):
    """Random frames in random data; ``turn`` turns the canonical coordinates and all that reads them."""
    generator = rng()

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    w, own = normal(2, 4, 30, 2).cumsum(-2), [normal(number, 3) for number in NUMBERS]
    rows = own if rows is None else rows
    frame, offset = normal(starts, 2, 2, 2), normal(starts, 2, 2)
    bins = torch.rand(2, 4, 30, generator=generator) < 0.9
    if turn is not None:
        w, frame, offset = w @ turn, frame @ turn, offset @ turn
        rows = [torch.cat([r[:, :2] @ turn, r[:, 2:]], -1) for r in rows]
    found = Frames(torch.zeros(2, 30, 2).double(), torch.zeros(2, 2).double(), w, 0.0)
    prior = ReadOutPrior.of(fit.model)
    spread = prior.shift_covariance + 0.1 * torch.ones(2, 2)  # so that no entry is special
    shift_mean = torch.tensor(shift_mean).double()
    prior = ReadOutPrior(prior.mean, prior.covariance, concentration, shift_mean, spread)
    recording, known = torch.tensor([0, 1]), fit.statistics[:, :1]
    search = few_shot._Search(
        fit.model, fit.guide, found, bins, rows, recording, prior, known, frame=frame, offset=offset
    )
    return search, rows


def test_the_prior_is_a_wishart_of_the_tunings_and_a_normal_of_their_common_shift(fit):
    """Row by row: ``nu (log |F| + mean_n log Normal(F b_n; 0, Sigma))`` up to a constant, and of the regression."""
    search, rows = some_search(fit)
    prior, found = search.prior, search.log_prior()
    tuning = MultivariateNormal(torch.zeros(2).double(), prior.covariance[:2, :2])
    shift_density = MultivariateNormal(prior.shift_mean, prior.shift_covariance)
    expected = torch.zeros(3, 2).double()
    for s in range(3):
        for r, number in enumerate(NUMBERS):
            frame, offset = search.frame[s, r].detach(), search.offset[s, r].detach()
            nu, total, c, d = min(12.0, number), 0.0, [], []
            for b in rows[r]:
                c.append(frame @ b[:2])
                d.append(b[2] + offset @ b[:2])
                total += tuning.log_prob(c[-1])
            expected[s, r] = nu * (torch.linalg.det(frame).abs().log() + total / number)
            c, d = torch.stack(c), torch.stack(d)
            gram = c.mT @ c / number
            gram = gram + 1e-4 * gram.diagonal().mean() * torch.eye(2)  # the ridge of the regression
            expected[s, r] += shift_density.log_prob(torch.linalg.solve(gram, c.mT @ d / number))
    torch.testing.assert_close(found - found[:1], expected - expected[:1])  # a constant for each recording


def test_the_likeliest_frame_gives_the_known_tunings(fit):
    """The mode of the Wishart: ``F B F^T`` is the covariance of the known recordings' read-outs."""
    rows = [torch.randn(number, 3, generator=rng(number)).double() for number in NUMBERS]
    for r in rows:  # offsets that no shift explains, so that these say nothing of the frame
        r[:, 2:] -= r[:, :2] @ torch.linalg.lstsq(r[:, :2], r[:, 2:]).solution
    search, _ = some_search(fit, rows=rows, shift_mean=(0.0, 0.0))
    with torch.no_grad():
        search.offset.zero_()
    optimizer = torch.optim.LBFGS(
        [search.frame], max_iter=300, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = -search.log_prior().sum()
        value.backward()
        return value

    optimizer.step(loss)
    frame = search.frame.detach()
    moments = torch.stack([r[:, :2].mT @ r[:, :2] / len(r) for r in rows])
    expected = search.prior.covariance[:2, :2].expand(3, 2, 2, 2)
    torch.testing.assert_close(frame @ moments @ frame.mT, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mirrored", [False, True])
def test_turned_canonical_coordinates_change_nothing(fit, mirrored):
    """Another orthonormal basis of ``w``, with ``F`` and what reads ``w`` turned along: the same density."""
    angle = torch.tensor(0.8).double()
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    turn[1] *= -1.0 if mirrored else 1.0
    results = []
    for search, _ in (some_search(fit), some_search(fit, turn=turn)):
        error, e = search.errors(8, 5, rng(1))
        results.append((error, e, search.log_weight(error, e), search.log_prior()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_the_weight_of_a_start_is_the_sum_of_its_parts(fit):
    """First states in the coordinates of the data (hence ``|F|``), the embedding, the roll-outs, the read-outs."""
    search, _ = some_search(fit, starts=2)
    error, e = torch.rand(2, 2).double(), torch.randn(2, 2, 1).double()
    found = search.log_weight(error, e)
    scale, known = fit.model.initial.scale, fit.statistics[:, :1]
    embedding = MultivariateNormal(
        known.mean(0), known.mT.cov(correction=0).reshape(1, 1) + 0.01 * torch.eye(1)
    )
    w, bins = search.windows.w, search.windows.bins
    assert not bins[:, :, 0].all()  # a trial without its first bin says nothing of first states
    for s in range(2):
        for r in range(2):
            frame, offset = search.frame[s, r], search.offset[s, r]
            expected = embedding.log_prob(e[s, r]) + search.log_prior()[s, r]
            # What the family errs by, independent errors of the latents, as it is seen in canonical coordinates.
            family = (
                torch.linalg.multi_dot([frame.mT, few_shot.FLOOR * torch.eye(2).double(), frame])
                .diagonal()
                .mean()
            )
            expected = expected - 0.5 * bins[r].sum() * 2 / LENGTHS[1] * (error[s, r] + family).log()
            for k in range(4):
                if bins[r, k, 0]:
                    z = torch.linalg.solve(frame.mT, w[r, k, 0] - offset)
                    expected = expected + Normal(0.0, scale).log_prob(z).sum()
                    expected = expected - torch.linalg.det(frame).abs().log()
            torch.testing.assert_close(found[s, r], expected)


def test_the_likeliest_starts_are_kept_in_order_and_broken_ones_are_not(fit):
    search, _ = some_search(fit, starts=30)
    with torch.no_grad():
        search.frame[4, 0] = torch.nan
        search.offset[7, 1] = torch.inf
        search.frame[9, 1] = 0.0
    before = search.frame.detach().clone()
    with pyro.validation_enabled(False):  # as in a search
        weight, error, _ = search.keep(20, rng(2))
    assert (
        search.frame.shape == (20, 2, 2, 2)
        and search.frame.isfinite().all()
        and search.offset.isfinite().all()
    )
    assert (weight[:-1] >= weight[1:]).all()
    again, embedding = search.errors(few_shot.SCREENED, 25, rng(2))
    torch.testing.assert_close(again, error)
    torch.testing.assert_close(search.log_weight(again, embedding), weight)
    for r in range(2):  # each recording has its own
        kept = {tuple(f.flatten().tolist()) for f in search.frame[:, r].detach()}
        assert len(kept) == 20 and kept <= {tuple(f.flatten().tolist()) for f in before[:, r]}


# ---- the whole search ------------------------------------------------------------------------------------


def problem(fit, recs):
    """What the search is given, without a model's regression: read-outs of the canonical coordinates are known."""
    model, guide = for_recordings(fit.model, fit.guide, NeuronTable.of(recs))
    guide.read_in.started.fill_(False)
    guide.read_in.start(recs)
    batch = recs.batch(model.names, dtype=fit.dtype)
    bins = batch.mask.any(-1)
    frames = canonical_frames(guide.read_in.features(batch), bins, 2, smoothing=0.0)
    maps, rows = [], []
    for r, dataset in enumerate(recs.truth.values()):
        w = frames.coordinates[r][bins[r]]
        z = torch.as_tensor(dataset["latents"].values).to(w)
        z = z[bins[r, : len(z)]]
        design = torch.cat([z, torch.ones_like(z[:, :1])], -1)
        solution = torch.linalg.lstsq(design, w).solution  # w = z F + o
        frame, offset = solution[:2], solution[2]
        # y = z C + d = (w - o) F^-1 C + d
        weight = torch.linalg.inv(frame) @ torch.as_tensor(dataset["weight"].values).to(w)
        bias = torch.as_tensor(dataset["bias"].values).to(w) - offset @ weight
        rows.append(torch.cat([weight, bias.unsqueeze(0)]).mT)
        maps.append((frame, offset))
        place = model.neurons.slice(batch.names[r])
        with torch.no_grad():
            model.read_out.weight[place], model.read_out.bias[place] = rows[-1][:, :-1], rows[-1][:, -1]
    return (model, guide, frames, bins, rows, batch), maps


def found_by(fit, recs, **options):
    arguments, maps = problem(fit, recs)
    return searched(fit, arguments, **options), maps


def searched(fit, arguments, *, seed=0, num_starts=64, num_steps=60, on_step=lambda error: None):
    return few_shot.search(
        *arguments,
        prior=ReadOutPrior.of(fit.model),
        embeddings=fit.statistics[:, :1],
        num_starts=num_starts,
        num_steps=num_steps,
        rng=rng(seed),
        on_step=on_step,
    )


def distances(found, maps):
    """Of the frames from the true ones, over the size of these; ``z -> -z`` is a symmetry of the family."""
    result = []
    for r, (frame, _) in enumerate(maps):
        ways = [(sign * found.frame[r] - frame).norm() / frame.norm() for sign in (1.0, -1.0)]
        result.append(float(min(ways)))
    return result


def test_the_true_frames_are_found_up_to_the_symmetries_of_the_family(fit):
    """Two recordings at once, of values of mu between those known, and of unequal neurons, trials and lengths."""
    recs = family.recordings([1.0, 1.7], num_trials=4, seed=1, prefix="new ")
    short = recs["new 1"].observations.copy()
    short[2, 30:] = float("nan")
    short = type(recs["new 1"])("new 1", short[:3, :, :12], bin_width=0.02)
    truth = recs.truth["new 1"].isel(trial=slice(3), neuron=slice(12))
    recs = type(recs)([short, recs["new 1.7"]], truth={"new 1": truth, "new 1.7": recs.truth["new 1.7"]})
    steps = []
    found, maps = found_by(fit, recs, on_step=steps.append)
    assert len(steps) == 60
    # A neuron's noise is a tenth of its signal; 12 and 25 neurons and over 100 bins average it out.
    assert max(distances(found, maps)) < 0.05
    for r, (_, offset) in enumerate(maps):
        assert (found.offset[r] - offset).norm() < 0.1
    # Roll-outs err by the noise of their first states and of their targets, each 0.1^2 / (N / 2) or so.
    assert found.error.max() < 0.03
    assert (found.embedding_spread < 0.1).all()
    untrained, _ = found_by(fit, recs, num_starts=1, num_steps=0)
    assert max(distances(untrained, maps)) > 0.2  # what a search that does nothing gives


def test_a_seed_gives_the_same_frames_whatever_the_memory(fit, monkeypatch):
    """Starts judged a few at a time: other draws, the same answer."""
    recs = family.recordings([1.4], num_trials=3, seed=2, prefix="new ")
    size = {"num_starts": 34, "num_steps": 60}
    arguments, maps = problem(fit, recs)
    one, again = searched(fit, arguments, **size), searched(fit, arguments, **size)
    assert torch.equal(one.frame, again.frame) and torch.equal(one.error, again.error)
    sizes, simulated = [], few_shot.simulated_starts

    def counted(*arguments):
        sizes.append(arguments[4])
        return simulated(*arguments)

    monkeypatch.setattr(few_shot, "simulated_starts", counted)
    monkeypatch.setattr(few_shot, "ELEMENTS", 10 * few_shot.ENCODED * 64)
    other = searched(fit, arguments, **size)
    assert sizes == [10, 10, 10, 4]
    assert max(distances(one, maps) + distances(other, maps)) < 0.05


@pytest.mark.parametrize(("num_starts", "num_steps"), [(1, 0), (3, 1), (30, 3)])
def test_few_starts_and_steps(fit, num_starts, num_steps):
    recs = family.recordings([1.4], num_trials=2, num_bins=20, prefix="new ")
    steps = []
    found, _ = found_by(fit, recs, num_starts=num_starts, num_steps=num_steps, on_step=steps.append)
    assert len(steps) == num_steps
    assert all(x.isfinite().all() for x in (found.frame, found.offset, found.error, found.embedding_spread))
    assert num_starts > 1 or (found.embedding_spread < 2.0).all()


def test_starts_that_lead_nowhere_do_no_harm(fit, monkeypatch):
    recs = family.recordings([1.4], num_trials=2, num_bins=30, prefix="new ")

    def broken(of):
        def starting(*arguments):
            frame, offset = of(*arguments)
            frame[1], frame[4], offset[2] = torch.nan, 0.0, torch.inf
            return frame, offset

        return starting

    monkeypatch.setattr(few_shot, "simulated_starts", broken(few_shot.simulated_starts))
    monkeypatch.setattr(few_shot, "starts_by_read_outs", broken(few_shot.starts_by_read_outs))
    found, _ = found_by(fit, recs, num_starts=6, num_steps=8)
    assert all(x.isfinite().all() for x in (found.frame, found.offset, found.error, found.embedding_spread))


def test_the_last_word_is_the_evidences_where_there_is_any(fit, monkeypatch):
    """Of one recording it prefers the fourth of the last, of the other it has nothing to say."""
    recs = family.recordings([1.4, 1.0], num_trials=2, num_bins=20, prefix="new ")
    arguments, _ = problem(fit, recs)
    given = []

    def evidence(model, guide, frames, tied, bins, batch):
        given.append(tied.frame.detach())
        found = torch.full(tied.frame.shape[:2], -torch.inf).double()
        found[1, 0], found[3, 0], found[2, 0] = 0.0, 1e6, torch.nan
        return found

    with monkeypatch.context() as patch:
        patch.setattr(few_shot, "of_frames", evidence)
        found = searched(fit, arguments, num_starts=9, num_steps=3)
        patch.setattr(few_shot, "of_frames", lambda *_: None)
        without = searched(fit, arguments, num_starts=9, num_steps=3)
    assert torch.equal(found.frame[0], given[0][3, 0]) and found.embedding_spread[0].max() == 0
    assert torch.equal(found.frame[1], without.frame[1]) and torch.equal(found.frame[1], given[0][0, 1])
    assert torch.equal(found.embedding_spread[1], without.embedding_spread[1])
    assert torch.equal(without.frame[0], given[0][0, 0])


def test_without_two_bins_in_a_row_there_is_no_error_to_tell(fit):
    recs = family.recordings([1.4, 1.0], num_trials=2, num_bins=8, prefix="new ")
    alone = recs["new 1"].observations.copy()
    alone[:, 1:] = float("nan")
    alone = type(recs["new 1"])("new 1", alone, bin_width=0.02)
    recs = type(recs)([recs["new 1.4"], alone], truth=recs.truth)
    found, _ = found_by(fit, recs, num_starts=5, num_steps=2)
    assert found.error.isfinite().tolist() == [True, False]
    assert found.frame.isfinite().all() and found.embedding_spread.isfinite().all()


def test_starts_are_canonical_frames_of_the_familys_own_simulations(fit):
    """They whiten other simulations, and half of them turn these as canonical coordinates turn."""
    known = torch.tensor([[0.2]]).double()  # one, so that all starts are of this embedding
    recs = family.recordings([1.2, 1.7], num_trials=20, num_bins=40, prefix="new ")
    (_, _, frames, bins, *_), _ = problem(fit, recs)
    bins = bins.clone()
    bins[1, :17] = False  # as many trials as there are data: three are a poorer guide
    frame, offset = starts.simulated_starts(fit.model, frames.coordinates, bins, known, 100, rng())
    assert frame.shape == (100, 2, 2, 2) and offset.shape == (100, 2, 2)
    z = fit.model.initial_state(known).expand((1, 400)).sample().unsqueeze(-2)
    path = torch.cat([z, roll_out(fit.model.adapt_dynamics(known.unsqueeze(0)), z, 39)], -2)[0]
    w = torch.einsum("ktd,srde->srkte", path, frame) + offset[:, :, None, None]
    flat = w.flatten(2, 3)
    spread = torch.linalg.eigvalsh(flat.mT @ flat / flat.shape[2])  # about the origin
    # 16 trials of about two independent states each: a variance is known to a quarter, their mean to 0.02.
    assert (spread[:, 0].mean((0, -1)) - 1).abs() < 0.1
    assert (spread[:, 1].mean((0, -1)) - 1).abs() > 2 * (spread[:, 0].mean((0, -1)) - 1).abs()
    turn = (w[:, 0, :, :-1, 0] * w[:, 0, :, 1:, 1] - w[:, 0, :, :-1, 1] * w[:, 0, :, 1:, 0]).mean((-1, -2))
    assert (turn[:50] > 0).all() and 5 < (turn[50:] > 0).sum() < 45


# ---- all of pm.adapt -------------------------------------------------------------------------------------


def forecast_error(fit, recs):
    """Mean squared error 8 bins ahead over the variance, of a forecast from 20 bins."""
    tree = pm.forecast(fit, recs, context=20, horizon=8, num_samples=20)
    result = []
    for name, dataset in recs.truth.items():
        expected = np.einsum("ktd,dn->ktn", dataset["latents"].values[:, 27:28], dataset["weight"].values)
        expected = expected + dataset["bias"].values
        found = tree[f"{name}/predictions/rates"].mean(("chain", "draw")).values[:, 7:8]
        result.append(float(((found - expected) ** 2).mean() / expected.var((0, 1)).mean()))
    return result


@pytest.mark.parametrize("num_trials", [1, 5])
def test_new_recordings_find_their_place_in_the_family(num_trials):
    """Read-outs, embeddings and forecasts of recordings of values of mu that lie between the known ones.

    The noise-free forecast errs by what the first states are known to: noise sd 0.1 on 20 neurons. A read-out that is
    wrong by a tenth forecasts with an error of 0.01 at least.
    """
    fit = family.fit_of()
    recs = family.recordings([1.0, 1.7], num_trials=num_trials + 8, num_bins=50, seed=5, prefix="new ")
    new = recs.take_trials(num_trials, seed=1)
    result = pm.adapt(fit, new, num_steps=20, num_starts=96, search_steps=60, progress=False)
    lazy = pm.adapt(fit, new, num_steps=0, num_starts=1, search_steps=0, progress=False)
    assert max(forecast_error(result, recs)) < 0.02 < 0.3 < np.mean(forecast_error(lazy, recs))
    for row, (name, dataset) in enumerate(recs.truth.items()):
        own = result.model.neurons.slice(name)
        weight, truth = result.model.read_out.weight[own].detach().numpy(), dataset["weight"].values.T
        sign = np.sign((weight * truth).sum())
        assert (
            np.abs(sign * weight - truth).mean() < 0.1
            and np.corrcoef(weight[:, 0], truth[:, 0])[0, 1] ** 2 > 0.95
        )
        mu = float(result.statistics[5 + row, 0]) + family.CENTER
        assert abs(mu - dataset.attrs["mu"]) < 0.2
        errors = [of.attrs["adaptation"][name]["rollout_error"] for of in (result, lazy)]
        assert errors[0] < 0.05 < errors[1]
