"""Stretches of trials, frames on top of them, and roll-outs against them."""

import numpy as np
import pytest
import torch

from pyro_metassm.dynamics import LowRankMLP
from pyro_metassm.windows import FAR, LENGTHS, TiedFrames, Windows, growing, roll_out


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(bins):
    """Coordinates that say where they come from: ``(recording, trial, bin)``."""
    axes = [torch.arange(float(size)) for size in bins.shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def some_bins():
    bins = torch.ones(2, 6, 40, dtype=torch.bool)
    bins[:, :3, 25:] = False  # short trials
    bins[:, 0] = False  # an empty one
    bins[:, 4, 5] = False  # a missing bin
    bins[1, 5, :12] = False  # begins late
    bins[1, 1:4] = False  # half of them empty
    return bins


@pytest.mark.parametrize("length", [1, 10, 24])
def test_windows_lie_where_trials_have_data(length):
    bins = some_bins()
    w, seen = Windows(numbered(bins), bins).draw(4000, length, rng())
    assert w.shape == (2, 4000, length + 1, 3) and seen.shape == w.shape[:-1] and seen.dtype == torch.bool
    recording, trial, time = w.long().unbind(-1)
    assert (recording == torch.arange(2)[:, None, None]).all() and (trial == trial[..., :1]).all()
    assert (time[..., 1:] - time[..., :-1] == 1).all()
    assert torch.equal(seen, bins[recording, trial, time])
    assert seen[..., 0].all()  # a roll-out needs a state to begin with
    assert (seen.sum(-1) >= length).all()  # but for the missing bin all are there
    for r in range(2):
        for k in range(6):
            starts = time[r, trial[r, :, 0] == k, 0]
            last = int(bins[r, k].nonzero().max()) - length if bins[r, k].any() else -1
            possible = [t for t in range(40) if bins[r, k, t] and t <= last]
            assert sorted(set(starts.tolist())) == possible  # all of them, and no others


def leverage(w):
    """How often a window begins at a bin, up to a constant."""
    return 1 + w.square().mean(-1).clamp(max=FAR)


def close(counts, p, number):
    """Within five standard deviations."""
    return bool(((counts / number - p).abs() <= 5 * (p * (1 - p) / number).sqrt() + 1e-6).all())


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0])
def test_windows_begin_anywhere_and_oftener_far_from_rest(scale):
    """From nearly all alike to nearly all at the bound."""
    bins = some_bins()
    w = scale * numbered(bins)
    found, _ = Windows(w, bins).draw(20_000, 10, rng())
    _, trial, time = (found[:, :, 0] / scale).round().long().unbind(-1)
    for r in range(2):
        of_trials = (leverage(w[r]) * bins[r]).sum(-1)
        assert close(torch.bincount(trial[r], minlength=6), of_trials / of_trials.sum(), 20_000)
        for k in of_trials.nonzero().flatten().tolist():
            starts = time[r, trial[r] == k]
            last = int(bins[r, k].nonzero().max()) - 10
            weight = leverage(w[r, k]) * bins[r, k] * (torch.arange(40) <= last)
            assert close(torch.bincount(starts, minlength=40), weight / weight.sum(), len(starts))


def test_no_trial_is_drawn_twice_where_there_are_enough():
    bins = some_bins()
    windows = Windows(numbered(bins), bins)
    for seed in range(10):
        assert len(set(windows.draw(2, 5, rng(seed))[0][1, :, 0, 1].tolist())) == 2


@pytest.mark.parametrize("number", [1, 5, 9])
def test_crops_lie_where_data_are(number):
    bins = some_bins()
    w, seen = Windows(numbered(bins), bins).crops(number, 20, rng())
    assert w.shape == (2, number, 20, 3) and seen.shape == (2, number, 20, 1)
    recording, trial, time = w.long().unbind(-1)
    assert torch.equal(seen.squeeze(-1), bins[recording, trial, time]) and (seen.sum((-1, -2)) >= 19).all()
    assert len(time[:, :, 0].unique()) > 1 or number == 1


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (2, 1, 4)])
def test_stretches_longer_than_the_data_are_cut_and_say_so(shape):
    bins = torch.ones(shape, dtype=torch.bool)
    windows = Windows(numbered(bins), bins)
    assert windows.longest == max(1, shape[2] - 1)
    w, seen = windows.draw(5, 6, rng())
    assert w.shape == (shape[0], 5, 7, 3)
    assert torch.equal(seen.sum(-1), shape[2] - w[..., 0, 2].long())  # up to the end of the trial
    assert not seen[..., shape[2] :].any()


def test_a_recording_without_data_has_windows_without_data():
    bins = torch.ones(2, 3, 8, dtype=torch.bool)
    bins[1] = False
    _, seen = Windows(numbered(bins), bins).draw(4, 3, rng())
    assert seen[0].all() and not seen[1].any()


def test_windows_grow_over_the_first_half():
    assert [growing(p, 100) for p in (0.0, 0.25, 0.5, 1.0)] == [5, 15, 25, 25]
    assert growing(1.0, 7) == 7 and growing(0.0, 1) == 1 and LENGTHS == (5, 25)


@pytest.mark.parametrize("lead", [(), (4,)])
def test_frames_lead_to_latents_and_back(lead):
    torch.manual_seed(0)
    frames = TiedFrames(torch.randn(*lead, 3, 2, 2).double(), torch.randn(*lead, 3, 2).double())
    w = torch.randn(3, 5, 7, 2).double()
    z = frames.states(w)
    assert z.shape == (*lead, 3, 5, 7, 2)
    torch.testing.assert_close(frames.coordinates(z), w.expand(*lead, 3, 5, 7, 2))
    index = (*[-1] * len(lead), 1)  # w = z F + o, of one of them
    one = z[index][2, 4] @ frames.frame[index] + frames.offset[index]
    torch.testing.assert_close(one, w[1, 2, 4])
    flat = frames.states(w[:, :, 0])  # any number of dimensions between
    torch.testing.assert_close(flat, z[..., 0, :])


@pytest.mark.parametrize("lead", [(), (2,)])
def test_roll_out_errors_are_a_plain_loops(lead):
    torch.manual_seed(0)
    recordings, windows, length = 2, 3, 4
    frames = TiedFrames(
        torch.randn(*lead, recordings, 2, 2).double(), torch.randn(*lead, recordings, 2).double()
    )
    target = torch.randn(recordings, windows, length + 1, 2).double()
    seen = torch.rand(recordings, windows, length + 1) < 0.7
    seen[0, 0, 0], seen[1] = False, True
    turn = 0.9 * torch.tensor([[0.8, -0.6], [0.6, 0.8]]).double()
    error = frames.roll_out_error(lambda z: z @ turn, target, seen)
    assert error.shape == (*lead, recordings)
    clamped = 0
    for index in np.ndindex(*lead, recordings):
        f, o, r = frames.frame[index].detach(), frames.offset[index].detach(), index[-1]
        total, count = 0.0, 0
        for v in range(windows):
            z = torch.linalg.solve(f.mT, target[r, v, 0] - o)
            for t in range(1, length + 1):
                z = (z @ turn).clamp(-10.0, 10.0)
                if seen[r, v, 0] and seen[r, v, t]:
                    square = float(((z @ f + o - target[r, v, t]) ** 2).mean())
                    clamped += square > 4.0
                    total, count = total + min(square, 4.0), count + 1
        assert abs(float(error[index].detach()) - total / count) < 1e-12
    assert clamped


def test_nothing_to_compare_is_no_error():
    frames = TiedFrames(torch.eye(2).unsqueeze(0), torch.zeros(1, 2))
    error = frames.roll_out_error(
        lambda z: z, torch.randn(1, 3, 2, 2), torch.zeros(1, 3, 2, dtype=torch.bool)
    )
    assert torch.equal(error, torch.zeros(1))


@pytest.mark.parametrize("rank", [0, 2])
def test_roll_outs_of_the_librarys_dynamics_are_those_of_any_callable(rank):
    """In value and gradient; the first states leave the bounds, or do not."""
    torch.manual_seed(0)
    mlp = LowRankMLP(2, 3, rank=rank, hidden_dim=7).double()
    e = torch.randn(2, 1, 3, dtype=torch.double, requires_grad=True)
    z = (2.0 * torch.randn(2, 5, 1, 2, dtype=torch.double)).requires_grad_()
    leaves = [p for p in (z, e, *mlp.parameters()) if p.numel()]
    own, results = mlp(e), []
    for dynamics in (own, lambda z: own(z)):
        path = roll_out(dynamics, z, 9, 3.0)
        gradients = torch.autograd.grad(path.sin().sum(), leaves, allow_unused=True, retain_graph=True)
        results.append([path, *(g for g in gradients if g is not None)])
    assert results[0][0].shape == (2, 5, 9, 2) and (results[0][0].abs() == 3.0).any()
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
