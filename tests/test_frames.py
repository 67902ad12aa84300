"""Frames found in the data alone: they do not depend on who observed, and tell noise from signal."""

import numpy as np
import pytest
import torch

from pyro_metassm import frames
from pyro_metassm.guides.encoders import smooth


def spiral(num_trials=40, num_steps=60, seed=0):
    """A rotation whose axes differ in speed, so that its canonical frame is unique."""
    rng = np.random.default_rng(seed)
    step = np.array([[0.95, -0.25], [0.12, 0.97]])
    z = rng.normal(size=(num_trials, 2))
    path = []
    for _ in range(num_steps):
        z = z @ step.T + 0.1 * rng.normal(size=z.shape)
        path.append(z)
    return torch.tensor(np.stack(path, 1))


def whole(x):
    return torch.ones(x.shape[:-1], dtype=torch.bool)


def textbook_frame(x, seen):
    """Bin by bin, with NumPy, in the order of the definition: whiten, then the operator of the white coordinates."""
    x, seen = x.numpy(), seen.numpy()
    points = np.array([x[k, t] for k, t in zip(*np.nonzero(seen), strict=True)])
    values, vectors = np.linalg.eigh(np.cov(points.T, bias=True).reshape(x.shape[-1], -1))
    whiten = vectors / np.sqrt(values + frames.RIDGE * values[-1])
    w = (x - points.mean(0)) @ whiten
    operator, count = np.zeros((x.shape[-1],) * 2), 0
    for k in range(len(x)):
        for t in range(1, x.shape[1] - 1):
            if seen[k, t - 1 : t + 2].all():
                operator += np.outer(w[k, t], w[k, t + 1] - w[k, t - 1]) / 2
                count += 1
    operator /= max(count, 1)
    axes = np.linalg.eigh((operator + operator.T) / 2)[1]
    turn = axes.T @ (operator - operator.T) @ axes
    for axis in range(1, len(turn)):  # so that each pair of neighbouring axes turns the same way
        if turn[axis - 1, axis] < 0:
            axes[:, axis] *= -1
            turn[axis] *= -1
            turn[:, axis] *= -1
    matrix = whiten @ axes
    return matrix, -points.mean(0) @ matrix


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_many_systems_at_once_are_each_as_in_the_textbook(dim):
    """With masks; whatever is where nothing was seen does not matter. The sign of a whole frame is free."""
    rng = torch.Generator().manual_seed(dim)
    x = torch.randn(2, 3, 4, 12, dim, generator=rng, dtype=torch.double).cumsum(-2)
    seen = torch.rand(2, 3, 4, 12, generator=rng) < 0.8
    seen[0, 0, 1] = False  # a trial without data
    matrix, offset = frames.canonical_frame(x, seen)
    assert matrix.shape == (2, 3, dim, dim) and offset.shape == (2, 3, dim)
    rubbish = frames.canonical_frame(torch.where(seen.unsqueeze(-1), x, 1e3), seen)
    for i in range(2):
        for j in range(3):
            expected, shift = textbook_frame(x[i, j], seen[i, j])
            sign = np.sign((expected * matrix[i, j].numpy()).sum())
            np.testing.assert_allclose(matrix[i, j], sign * expected, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(offset[i, j], sign * shift, rtol=1e-8, atol=1e-8)
            for alone in (frames.canonical_frame(x[i, j], seen[i, j]), (rubbish[0][i, j], rubbish[1][i, j])):
                torch.testing.assert_close(alone[0], matrix[i, j], rtol=1e-9, atol=1e-10)
                torch.testing.assert_close(alone[1], offset[i, j], rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("num_bins", [1, 2])
def test_trials_too_short_for_a_flow_are_whitened_still(num_bins):
    x = torch.randn(500, num_bins, 2, dtype=torch.double) @ torch.tensor([[2.0, 1.0], [0.0, 0.5]]).double()
    matrix, offset = frames.canonical_frame(x, whole(x))
    w = (x @ matrix + offset).flatten(0, 1)
    values = torch.linalg.eigvalsh(torch.cov(x.flatten(0, 1).mT, correction=0))
    white = torch.linalg.eigvalsh(w.mT @ w / len(w))
    torch.testing.assert_close(white, values / (values + frames.RIDGE * values[-1]))
    assert w.mean(0).abs().max() < 1e-12


def test_the_frame_does_not_depend_on_the_basis_of_observation():
    z = spiral()
    # Another observer, with another handedness.
    mixing = torch.tensor([[1.3, -0.4], [0.2, 0.9]], dtype=z.dtype)
    mirror = torch.tensor([[-1.0, 0.0], [0.0, 1.0]], dtype=z.dtype)
    found = []
    for observed in (z, z @ mixing + 3.0, z @ mirror @ mixing):
        matrix, offset = frames.canonical_frame(observed, whole(observed))
        found.append(observed @ matrix + offset)
    # Exact but for the ridge on the whitening; the sign of the whole frame is free.
    for other in found[1:]:
        sign = torch.sign((found[0] * other).sum())
        assert (found[0] - sign * other).abs().mean() < 0.08
    assert torch.allclose(found[0].flatten(0, 1).mean(0), torch.zeros(2, dtype=z.dtype), atol=1e-10)
    assert torch.allclose(found[0].flatten(0, 1).var(0), torch.ones(2, dtype=z.dtype), atol=0.05)


def test_scale_shift_rotation_and_the_order_of_trials_change_nothing():
    """Exactly, the ridge included: it is relative to the largest variance."""
    z = spiral()
    angle = torch.tensor(0.7, dtype=z.dtype)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    matrix, offset = frames.canonical_frame(z, whole(z))
    w = z @ matrix + offset
    for expected, other in ((w, 1e3 * z), (w, z - 5.0), (w, z @ turn), (w.flip(0), z.flip(0))):
        matrix, offset = frames.canonical_frame(other, whole(z))
        again = other @ matrix + offset
        sign = torch.sign((expected * again).sum())
        torch.testing.assert_close(sign * again, expected, rtol=1e-7, atol=1e-7)


def test_mirrored_cycles_get_the_same_handedness():
    angle = torch.linspace(0, 20, 200, dtype=torch.double)
    turns = []
    for sign in (1.0, -1.0):
        cycle = torch.stack([angle.cos(), sign * angle.sin()], -1).unsqueeze(0)
        matrix, offset = frames.canonical_frame(cycle, whole(cycle))
        w = cycle @ matrix + offset
        turns.append(float((w[:, :-1, 0] * w[:, 1:, 1] - w[:, :-1, 1] * w[:, 1:, 0]).mean()))
    assert turns[0] * turns[1] > 0


def test_frames_of_recordings_are_affine_in_the_neurons_and_smooth_where_the_data_are_noisy():
    torch.manual_seed(0)
    z = torch.stack([spiral(seed=0), spiral(seed=1)])
    features = z @ torch.randn(2, 1, 2, 9, dtype=torch.double)
    features = features - features.mean((1, 2), keepdim=True)
    features[1, ..., 7:] = 0.0  # fewer neurons
    seen = whole(features)
    seen[0, 3:5, 10:20] = False
    features = features * seen.unsqueeze(-1)
    exact = frames.canonical_frames(features, seen, 2)
    assert exact.smoothing == (0.0, 0.0)
    affine = (features.flatten(1, 2) @ exact.weight).unflatten(1, (40, 60)) + exact.bias[:, None, None]
    torch.testing.assert_close(exact.coordinates, affine)
    for r in range(2):  # as many coordinates as there are latents: nothing of these is lost
        w = exact.coordinates[r][seen[r]]
        design = torch.cat([w, torch.ones_like(w[:, :1])], -1)
        assert torch.linalg.lstsq(design, z[r][seen[r]], driver="gelsd").residuals.max() < 1e-20

    noisy = (features + 0.5 * torch.randn_like(features)) * seen.unsqueeze(-1)
    found = frames.canonical_frames(noisy, seen, 2)
    assert min(found.smoothing) > 0
    affine = (noisy.flatten(1, 2) @ found.weight).unflatten(1, (40, 60))
    expected = smooth(affine, seen.unsqueeze(-1).double(), found.smoothing) + found.bias[:, None, None]
    torch.testing.assert_close(found.coordinates, expected)
    assert frames.canonical_frames(noisy, seen, 2, smoothing=0.0).smoothing == (0.0, 0.0)


def test_the_width_of_the_kernel_is_about_the_best_for_the_truth():
    """Chosen without the truth; its error against it is within 15 % of the best of all widths."""
    torch.manual_seed(0)
    phase = 6.3 * torch.rand(1, 60, 1)
    signal = torch.stack(
        [(0.12 * torch.arange(80) + phase).sin(), (0.12 * torch.arange(80) + phase).cos()], -1
    )
    noisy, weight = signal + 0.7 * torch.randn_like(signal), torch.ones_like(signal[..., :1])
    (width,) = frames.smoothing_widths(noisy, whole(noisy))
    errors = {
        sd: float((smooth(noisy, weight, sd) - signal).square().mean()) for sd in (0.0, *frames.KERNELS)
    }
    assert errors[width] < 1.15 * min(errors.values()) < 0.2 * errors[0.0]
    assert frames.smoothing_widths(signal, whole(signal)) == (0.0,)
    # Nothing to smooth over.
    assert frames.smoothing_widths(noisy[:, :, :2], whole(noisy[:, :, :2])) == (0.0,)


def test_every_recording_of_a_pool_has_the_kernel_about_that_it_has_alone_and_few_bins_that_of_the_others():
    torch.manual_seed(0)
    phase = 6.3 * torch.rand(1, 60, 1)
    signal = torch.stack([(0.12 * torch.arange(80) + phase + turn).sin() for turn in (0.0, 1.57)], -1)
    pool = torch.cat([signal + sd * torch.randn_like(signal) for sd in (0.5, 2.5)])
    alone = [frames.smoothing_widths(x, whole(x))[0] for x in pool.unsqueeze(1)]
    together = frames.smoothing_widths(pool, whole(pool))
    assert alone[0] < alone[1] and together[0] < together[1]
    # To a kernel: what lies together is a little likelier.
    for one, other in zip(alone, together, strict=True):
        assert abs(frames.KERNELS.index(one) - frames.KERNELS.index(other)) <= 1
    few = whole(pool).clone()
    few[0, 0, 3:], few[0, 1:] = False, False  # three bins
    assert frames.smoothing_widths(pool, few) == (together[1], together[1])
    assert frames.smoothing_widths(pool, few, about=4.0)[0] == 4.0
    assert frames.smoothing_widths(pool, whole(pool), about=0.0) == (0.0, 0.0)


def test_lagged_subspace_ignores_noise_that_is_independent_from_bin_to_bin():
    torch.manual_seed(0)
    z = spiral(num_trials=200).float()
    read_out = torch.linalg.qr(torch.randn(20, 2))[0].mT
    # Far louder than the signal, unequal by neuron.
    noise = torch.randn(200, 60, 20) * torch.linspace(0.1, 3.0, 20)
    features = z @ read_out + noise
    features = features - features.mean((0, 1))
    basis = frames.lagged_subspace(features, whole(features), 2)
    alignment = torch.linalg.svdvals(read_out @ basis)  # cosines of the principal angles
    _, pca = torch.linalg.eigh(torch.einsum("ktn,ktm->nm", features, features))
    assert alignment.min() > 0.9
    assert torch.linalg.svdvals(read_out @ pca[:, -2:]).min() < 0.5  # what the plain covariance gives


def test_fewer_neurons_than_latents_leave_zeros():
    features = torch.randn(5, 10, 1)
    basis = frames.lagged_subspace(features, whole(features), 3)
    assert basis.shape == (1, 3) and (basis[:, 1:] == 0).all() and basis[0, 0].abs() == 1


@pytest.mark.parametrize("sd", [0.0, 0.5])
def test_noise_share_of_a_known_mixture(sd):
    torch.manual_seed(0)
    time = torch.arange(400) * 0.1
    phase = 2 * torch.pi * torch.rand(100, 1)
    signal = torch.stack([(time + phase).sin(), (time + phase).cos()], -1)  # variance 1/2 each
    noisy = signal + sd * torch.randn_like(signal)
    share = frames.noise_share(noisy, whole(noisy))
    # 40,000 bins: the standard error of a covariance is about 0.5 / sqrt(40000), four of them enter.
    assert abs(float(share) - sd**2 / (0.5 + sd**2)) < 0.02
