"""Smoothing: against scipy's filter, sums over observed bins by hand, and refused by what wants counts."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

import pyro_metassm as pm


def ragged():
    rng = np.random.default_rng(0)
    mask = rng.random((4, 30, 3)) > 0.2
    mask[0, 20:] = False
    mask[1, :, 2] = False
    return pm.Recording("a", rng.poisson(2.0, (4, 30, 3)), bin_width=0.02, mask=mask, condition=[1, 2, 3, 4])


@pytest.mark.parametrize("sd", [0.003, 0.03, 0.05, 1.0])
def test_the_weighted_mean_of_the_observed_bins(sd):
    rec = ragged()
    got = rec.smooth(sd)
    np.testing.assert_array_equal(got.mask, rec.mask)
    # scipy's kernel is normalised, which the quotient does not see; beyond the ends it sees zeros.
    options = {"sigma": sd / 0.02, "axis": 1, "mode": "constant", "truncate": 5.0}
    seen = rec.mask.astype(float)
    expected = gaussian_filter1d(rec.values * seen, **options) / gaussian_filter1d(seen, **options).clip(
        1e-12
    )
    # The last weights may be in one kernel and not in the other: exp(-12.5) of the whole.
    np.testing.assert_allclose(got.values[rec.mask], expected[rec.mask], atol=2e-5)
    assert (got.values[~rec.mask] == 0).all() and got.values.dtype == rec.values.dtype
    assert got.condition.tolist() == [1, 2, 3, 4] and (rec.values == np.round(rec.values)).all()


def test_a_constant_stays_one_and_narrow_kernels_change_nothing():
    rec = ragged()
    flat = pm.Recording("flat", np.where(rec.mask, 3.0, np.nan), bin_width=0.02).smooth(0.1)
    np.testing.assert_allclose(flat.values[rec.mask], 3.0, rtol=1e-12)
    np.testing.assert_array_equal(rec.smooth(0.001).values, rec.values)


def test_all_recordings_and_what_belongs_to_them():
    recs = pm.simulate.limit_cycles([2.5], num_trials=3, num_steps=12).smooth(0.05)
    assert recs.truth and recs["w=2.5"].attrs["smoothed_s"] == 0.05


def test_count_likelihoods_refuse_it_and_others_do_not():
    """Even where the result happens to be whole numbers."""
    ones = pm.Recordings([pm.Recording("a", np.ones((4, 8, 2)), bin_width=0.02)])
    smooth = ones.smooth(0.05)
    assert ones["a"].has_counts and not smooth["a"].has_counts
    for family in (pm.likelihoods.Poisson, pm.likelihoods.NegativeBinomial):
        with pytest.raises(
            ValueError, match=r"counts smoothed over 0\.05 s; pass the recording before smooth\(\)"
        ):
            pm.models.MetaSSM(smooth, latent_dim=1, embedding_dim=1, likelihood=family)
    pm.models.MetaSSM(smooth, latent_dim=1, embedding_dim=1)


@pytest.mark.parametrize(
    ("sd", "message"),
    [
        (0.0, "a positive number of seconds, got 0"),
        (np.nan, "a positive number"),
        ("a", "a positive number"),
        (True, "a positive number"),
        (30, "milliseconds, 0.03"),
    ],
)
def test_what_is_no_width(sd, message):
    with pytest.raises(ValueError, match=message):
        ragged().smooth(sd)
    with pytest.raises(ValueError, match=r"one smoothed over 0\.1 s; smooth once"):
        ragged().smooth(0.1).smooth(0.1)
