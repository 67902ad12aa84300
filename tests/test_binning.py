"""Bins: every spike of a window in exactly one, against exact rational arithmetic; means of sampled series."""

from fractions import Fraction

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import pyro_metassm as pm
from pyro_metassm.io import binning


def by_hand(spikes, event, window, width) -> list[int]:
    """Counts in the bins of one event by comparing rationals: the numbers as they are written, nothing rounded."""
    first, step = Fraction(repr(event)) + Fraction(repr(window[0])), Fraction(repr(width))
    number = round((Fraction(repr(window[1])) - Fraction(repr(window[0]))) / step)
    edges = [first + k * step for k in range(number + 1)]
    exact = [Fraction(repr(spike)) for spike in spikes]
    return [sum(a <= spike < b for spike in exact) for a, b in zip(edges[:-1], edges[1:], strict=True)]


@hypothesis.given(
    event=st.integers(-10_000, 10_000_000),
    start=st.integers(-300, 300),
    width=st.sampled_from([1, 2, 5, 7, 10, 20, 25, 100]),
    number=st.integers(1, 30),
    spikes=st.lists(st.integers(-50, 5000), max_size=40),
)
def test_times_on_the_grid_of_a_millisecond(event, start, width, number, spikes):
    """Times that are written with decimals fall where their decimals say, though no double is one of them."""
    window = (start / 1000, (start + number * width) / 1000)
    times = [(event + start + spike) / 1000 for spike in spikes]
    got = pm.bin_spikes([times], [event / 1000], window=window, bin_width=width / 1000)
    assert got[0, :, 0].tolist() == by_hand(times, event / 1000, window, width / 1000)


@hypothesis.given(
    event=st.floats(-1e6, 1e6),
    start=st.floats(-10, 10),
    width=st.floats(1e-3, 1.0),
    number=st.integers(1, 20),
    data=st.data(),
)
def test_any_doubles_and_their_neighbours(event, start, width, number, data):
    """Spikes at the edges, and the doubles just before and after them: each in one bin, which holds it."""
    edges = binning.edges_of([event], start, width, number)[0]
    parts = [Fraction(repr(number)) for number in (event, start, width)]
    assert edges.tolist() == [float(parts[0] + parts[1] + k * parts[2]) for k in range(number + 1)]
    picked = data.draw(st.lists(st.sampled_from(edges.tolist()), max_size=6))
    spikes = [s for edge in picked for s in (np.nextafter(edge, -np.inf), edge, np.nextafter(edge, np.inf))]
    spikes += data.draw(st.lists(st.floats(edges[0] - 1, edges[-1] + 1), max_size=10))
    got = binning.counts(np.sort(np.array(spikes, dtype=float)), edges)
    exact = [Fraction(spike) for spike in spikes]
    bounds = [Fraction(edge) for edge in edges]
    assert got.tolist() == [
        sum(a <= s < b for s in exact) for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    assert got.sum() == sum(bounds[0] <= s < bounds[-1] for s in exact)


@hypothesis.given(first=st.integers(0, 10**6), width=st.sampled_from([0.01, 0.02, 0.1, 0.3]), data=st.data())
def test_windows_that_touch_share_their_edge(first, width, data):
    """Events a window apart: every spike between the first and the last is counted once, none twice."""
    number = data.draw(st.integers(1, 12))
    length = Fraction(repr(width)) * number
    events = [float(Fraction(first, 1000) + k * length) for k in range(4)]
    window = (0.0, float(length))
    edges = binning.edges_of(events, 0.0, width, number)
    np.testing.assert_array_equal(edges[1:, 0], edges[:-1, -1])
    spikes = np.sort(np.concatenate([edges.ravel(), np.nextafter(edges.ravel(), -np.inf)]))
    got = pm.bin_spikes([spikes], events, window=window, bin_width=width)
    assert got.sum() == ((spikes >= edges[0, 0]) & (spikes < edges[-1, -1])).sum()


def test_round_off_that_a_running_sum_would_make():
    assert 3 * 0.1 > 0.3 and 0.1 + 0.7 < 0.8  # what doubles do
    counts = pm.bin_spikes([[0.3, 0.6, 0.7], [0.8]], [0.0, 0.1], window=(0.0, 1.0), bin_width=0.1)
    assert np.flatnonzero(counts[0, :, 0]).tolist() == [3, 6, 7] and counts.shape == (2, 10, 2)
    assert np.flatnonzero(counts[1, :, 1]).tolist() == [7]


def test_spikes_in_any_order_and_more_than_one_at_a_time():
    counts = pm.bin_spikes([[0.5, 0.1, 0.1]], [0.0], window=(0.0, 1.0), bin_width=0.5)
    assert counts[0, :, 0].tolist() == [2, 1]
    assert pm.bin_spikes([[]], [0.0], window=(0.0, 1.0), bin_width=0.5).sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"window": (0.0, 0.05)},
            r"needed a window of whole bins \(0\.02 s\).*2\.5 bins.*use such as \(0, 0\.04\)",
        ),
        ({"window": (1.0, 0.0)}, r"window \(start, stop\)"),
        ({"window": 3.0}, r"window \(start, stop\)"),
        ({"bin_width": 20.0}, "if these are milliseconds, bin_width=0.02"),
        ({"times": [0.0, np.nan]}, "finite times .* 1 that are not finite"),
        ({"times": 0.0}, "finite times"),
        ({"spike_times": []}, "one or more units, got none"),
        ({"spike_times": [["a"]]}, "unit 0: needed spike times"),
        ({"spike_times": [[[0.0]]]}, r"unit 0: needed spike times .* shape \(1, 1\)"),
    ],
)
def test_what_cannot_be_binned(change, message):
    given = {"spike_times": [[0.0]], "times": [0.0], "window": (0.0, 0.04), "bin_width": 0.02} | change
    with pytest.raises(ValueError, match=message):
        pm.bin_spikes(given.pop("spike_times"), given.pop("times"), **given)


def test_spikes_without_a_time_are_counted_in_a_warning():
    with pytest.warns(UserWarning, match="unit 0: 2 of 3 spike times are not finite"):
        counts = pm.bin_spikes([[np.nan, 0.1, np.inf]], [0.0], window=(0.0, 1.0), bin_width=0.5)
    assert counts.sum() == 1


def test_means_of_samples_by_brute_force():
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0, 10, 500))
    values = rng.normal(size=(500, 2))
    values[rng.random((500, 2)) < 0.1] = np.nan
    edges = np.linspace(1.0, 9.0, 41)
    got = binning.bin_means(times, values, edges, 0.02)
    for k, row in enumerate(got):
        inside = (times >= edges[k]) & (times < edges[k + 1])
        assert inside.any()
        np.testing.assert_allclose(row, np.nanmean(values[inside], axis=0), rtol=1e-12)


def test_a_slow_series_is_a_line_between_samples_and_nothing_in_gaps():
    times = np.array([0.0, 0.1, 0.2, 0.3, 1.3, 1.4])
    values = times[:, None] * 2.0
    edges = np.arange(0, 141) / 100
    got = binning.bin_means(times, values, edges, 0.1)[:, 0]
    centres = (edges[:-1] + edges[1:]) / 2
    has_sample = np.isin(np.arange(140), [0, 10, 20, 30, 130])
    line = (centres < 0.3) | (centres > 1.3)
    np.testing.assert_allclose(got[line & ~has_sample], 2 * centres[line & ~has_sample], atol=1e-12)
    np.testing.assert_allclose(got[has_sample], [0.0, 0.2, 0.4, 0.6, 2.6], atol=1e-12)
    assert np.isnan(got[~line & ~has_sample]).all()
