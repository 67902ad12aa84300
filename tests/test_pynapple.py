"""pynapple's spikes and epochs: with the library where it is installed, and with what looks like its objects."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import pyro_metassm as pm

RNG = np.random.default_rng(0)
SPIKES = {3: np.sort(RNG.uniform(0, 100, 900)), 8: np.sort(RNG.uniform(0, 100, 500))}
STARTS = np.array([10.0, 30.0, 50.0, 95.0])
TIMES = np.arange(0.0, 100.0, 0.02)
VALUES = np.stack([np.sin(TIMES), TIMES], 1)
META = {"side": ["l", "r", "l", "r"], "cue": STARTS + 1.0}


class Group(dict):
    """What `from_pynapple` uses of a `TsGroup`."""

    time_support = SimpleNamespace(start=np.array([0.0]), end=np.array([100.0]))
    metadata = pd.DataFrame({"area": ["V1", "M1"], "probe": [1, 2]}, index=[3, 8])


def alike():
    units = Group({key: SimpleNamespace(t=train) for key, train in SPIKES.items()})
    epochs = SimpleNamespace(start=STARTS, end=STARTS + 4.0, metadata=pd.DataFrame(META))
    return units, epochs, SimpleNamespace(t=TIMES, d=VALUES, columns=["x", "y"])


def real():
    nap = pytest.importorskip("pynapple")
    session = nap.IntervalSet(0.0, 100.0)
    units = nap.TsGroup(
        {k: nap.Ts(t) for k, t in SPIKES.items()}, time_support=session, metadata=dict(Group.metadata)
    )
    epochs = nap.IntervalSet(STARTS, STARTS + 4.0, metadata=META)
    return units, epochs, nap.TsdFrame(t=TIMES, d=VALUES, columns=["x", "y"])


@pytest.mark.parametrize("make", [alike, real])
def test_spikes_epochs_and_behavior(make):
    units, epochs, behavior = make()
    rec = pm.from_pynapple(
        units, epochs, name="mouse", bin_width=0.1, align_to="cue", window=(-0.5, 1.5), behavior=behavior, lag=0.05,
        condition="side", where={"side": "l"}, attrs={"subject": "m"},
    )  # fmt: skip
    assert rec.observations.shape == (2, 20, 2) and rec.neuron_ids.tolist() == [3, 8] and rec.mask.all()
    for k, cue in enumerate((11.0, 51.0)):
        for n, train in enumerate(SPIKES.values()):
            np.testing.assert_array_equal(
                rec.values[k, :, n], np.histogram(train, cue - 0.5 + np.arange(21) / 10)[0]
            )
        # Five samples from each edge on: their mean is two sampling intervals later (three samples at round-off).
        np.testing.assert_allclose(rec.behavior[k, :, 1], cue - 0.45 + np.arange(20) / 10 + 0.04, atol=0.0101)
    assert rec.condition.tolist() == ["l", "l"] and rec.attrs["neurons"]["area"].tolist() == ["V1", "M1"]
    assert rec.attrs["behavior_names"] == ["x", "y"] and rec.attrs["subject"] == "m"


@pytest.mark.parametrize("make", [alike, real])
def test_outside_of_the_time_support_is_missing(make):
    units, epochs, _ = make()
    with pytest.warns(UserWarning, match="1 of 4 trials lie where no unit was observed"):
        rec = pm.from_pynapple(
            units, epochs, name="a", bin_width=0.5, align_to="start_time", window=(5.5, 6.5)
        )
    assert rec.num_trials == 3
    rec = pm.from_pynapple(units, epochs, name="a", bin_width=0.5, window=(4.0, 6.0), held_out=None)
    assert rec.mask[..., 0].tolist() == [[True] * 4] * 3 + [[True, True, False, False]]


def test_plain_arrays_do_as_well():
    rec = pm.from_pynapple(SPIKES, np.stack([STARTS, STARTS + 4.0], 1), name="a", bin_width=0.5)
    assert rec.observations.shape == (4, 8, 2) and "neurons" not in rec.attrs
    units, epochs, _ = alike()
    units.metadata = Group.metadata.assign(out=[False, True])
    held = pm.from_pynapple(units, epochs, name="a", bin_width=0.5, held_out="out")
    assert held.held_out_neurons.tolist() == [False, True]


def test_what_is_refused_and_warned_of():
    for units, epochs, message in (
        ({}, [[0.0, 1.0]], "at least one unit"),
        ([[0.1]], [[0.0, 1.0]], "spike times by unit, got list"),
        (SPIKES, [0.0, 1.0], r"epochs \(trials, 2\): starts and ends in s, got shape \(2,\)"),
        (SPIKES, np.zeros((0, 2)), "at least one trial, got no epochs"),
        (SPIKES, [[2.0, 1.0]], "trials that stop after they start"),
        ({1: SPIKES[3] * 1e6}, [[1e7, 2e7]], "these are milliseconds"),
    ):
        with pytest.raises(ValueError, match=message):
            pm.from_pynapple(units, epochs, name="a", bin_width=0.5)
    with pytest.warns(UserWarning, match=r"1 of 3 units have no spikes \(9\)"):
        pm.from_pynapple(SPIKES | {9: np.array([])}, [[1.0, 5.0]], name="a", bin_width=0.5)
