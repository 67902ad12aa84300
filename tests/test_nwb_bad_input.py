"""NWB files that cannot be used, or not in whole: errors that say what there is, warnings that count."""

import sys

import numpy as np
import pytest

pytest.importorskip("pynwb")

import h5py
import nwb_layouts as layouts
import pynwb

import pyro_metassm as pm
from pyro_metassm.io import seconds

CENTRE_OUT = {"align_to": "move_onset_time", "window": (-0.14, 0.56), "bin_width": 0.02}


@pytest.fixture(scope="module")
def centre_out(tmp_path_factory):
    path = tmp_path_factory.mktemp("nwb") / "centre_out.nwb"
    layouts.centre_out(path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"align_to": "moving"},
            r"needed a column 'moving' of the trials, got only go_cue_time, move_onset_time, ",
        ),
        ({"align_to": "result"}, r"needed times \(s\) in the column 'result', got no number in it"),
        (
            {"align_to": "target_dir"},
            "a column of times .* near their trials, to align to 'target_dir', got 1.5708 in a",
        ),
        (
            {"behavior": "hand_vel"},
            "needed a time series 'hand_vel', got only processing/behavior/Position/cursor_pos",
        ),
        ({"where": {"outcome": 1}}, "needed a column 'outcome' of the trials, got only"),
        ({"where": lambda t: t["outcome"] == 1}, "needed a column 'outcome' of the trials, got only"),
        ({"where": {"result": "X"}}, "needed trials with result = 'X', got none: there result is F, R"),
        ({"where": lambda t: t["target_id"] > 9}, "at least one of the 12 trials, got none after the choice"),
        ({"where": lambda t: [0, 1]}, r"returns bools \(12,\), got int64 of shape \(2,\)"),
        (
            {"units": {"quality": "best"}},
            "needed units with quality = 'best', got none: there quality is good, mua",
        ),
        (
            {"units": {"snr": 3}},
            "a column 'snr' of the units, got only electrode_group, id, location, quality",
        ),
        ({"condition": "targets"}, "a column 'targets' of the trials"),
        ({"held_out": "test"}, "a column 'test' of the units"),
        ({"window": (-140, 560)}, r"a window in seconds, got \(-140, 560\).*window=\(-0.14, 0.56\)"),
        ({"lag": 100}, "a lag under 5 s, got 100; pass seconds; if these are milliseconds, 0.1"),
        ({"bin_width": 20}, "milliseconds, bin_width=0.02"),
        ({"window": (-0.14, 0.57)}, "a window of whole bins"),
        ({"window": (0,)}, r"a window \(start, stop\) in s, got \(0,\)"),
        ({"window": 0.5}, r"a window \(start, stop\)"),
        ({"lag": "long"}, "a lag in seconds, got 'long'"),
        ({"behavior": 3}, "as behavior, got 3"),
        ({"behavior": ["cursor_vel", 3]}, "as behavior, got .*3"),
        ({"where": "result"}, "columns of the trials with values, or a function, got 'result'"),
        ({"units": [0]}, r"columns of the units with values, or a function, got \[0\]"),
        ({"overlap": "no"}, 'overlap="warn" or "error"'),
    ],
)
def test_what_is_refused(centre_out, change, message):
    with pytest.raises(ValueError, match=message):
        pm.read_nwb(centre_out, **(CENTRE_OUT | change))


def test_files_that_are_none_or_cut_short(centre_out, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        pm.read_nwb(tmp_path / "none.nwb", **CENTRE_OUT)
    whole = centre_out.read_bytes()
    for name, data in (
        ("text", b"no file of this kind"),
        ("short", whole[: len(whole) // 2]),
        ("empty", b""),
    ):
        (tmp_path / f"{name}.nwb").write_bytes(data)
        with pytest.raises(ValueError, match=r"\.nwb: no NWB file that can be read .* cut short"):
            pm.read_nwb(tmp_path / f"{name}.nwb", **CENTRE_OUT)
    with h5py.File(tmp_path / "other.nwb", "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match="no NWB file that can be read"):
        pm.read_nwb(tmp_path / "other.nwb", **CENTRE_OUT)
    layouts.write(layouts.new_file(), tmp_path / "bare.nwb")
    with pytest.raises(ValueError, match="needed a table of trials, got none"):
        pm.read_nwb(tmp_path / "bare.nwb", **CENTRE_OUT)
    nwb = layouts.new_file()
    nwb.add_trial(start_time=0.0, stop_time=1.0)
    layouts.write(nwb, tmp_path / "bare.nwb")
    with pytest.raises(ValueError, match="needed units with spike_times, got none"):
        pm.read_nwb(tmp_path / "bare.nwb", **CENTRE_OUT)


def test_trials_without_the_event_and_windows_that_overlap_are_counted(tmp_path):
    onset = np.array([3.2, np.nan, 8.8, 9.1])
    truth = layouts.centre_out(tmp_path / "a.nwb", num_trials=4, move_onset_time=onset)
    with pytest.warns(UserWarning) as caught:
        rec = pm.read_nwb(tmp_path / "a.nwb", **CENTRE_OUT)
    messages = [str(entry.message) for entry in caught]
    both = sum(((train >= 8.96) & (train < 9.36)).sum() for train in truth["trains"])
    assert messages == [
        "recording 'a': 1 of 4 trials have no move_onset_time, and are left out (1)",
        f"recording 'a': 1 of 3 windows begin before an earlier one has ended: {both} spikes stand in two trials or "
        "more",
    ]
    assert rec.num_trials == 3 and rec.attrs["trials"]["target_id"].tolist() == [0, 2, 3]
    keep = {"where": lambda t: t["move_onset_time"].notna()}
    with pytest.raises(ValueError, match=r"needed windows that do not overlap, got 1 of 3 windows"):
        pm.read_nwb(tmp_path / "a.nwb", **CENTRE_OUT, overlap="error", **keep)


def test_times_far_from_their_trials_are_counted(tmp_path):
    layouts.centre_out(tmp_path / "a.nwb", num_trials=4, move_onset_time=np.array([3.0, 6.0, 3.9, 12.0]))
    with pytest.warns(UserWarning, match="1 of 4 times of move_onset_time lie far outside of their trials"):
        pm.read_nwb(tmp_path / "a.nwb", align_to="move_onset_time", window=(0.0, 0.2), bin_width=0.1)


def test_behavior_with_gaps_silent_units_and_empty_labels_are_counted(tmp_path):
    path = tmp_path / "a.nwb"
    nwb = layouts.new_file()
    nwb.add_unit_column(name="quality", description="")
    for unit, quality in enumerate(("good", "", "good")):
        nwb.add_unit(spike_times=[] if unit == 2 else np.arange(-0.05, 20.0, 0.01), quality=quality)
    for start in (1.0, 5.0, 25.0):
        nwb.add_trial(start_time=start, stop_time=start + 1.0)
    velocity = np.arange(600.0)
    velocity[110:131] = np.nan
    nwb.add_acquisition(
        pynwb.TimeSeries(name="speed", data=velocity, rate=100.0, unit="m/s", conversion=0.01)
    )
    layouts.write(nwb, path)
    with pytest.warns(UserWarning) as caught:
        rec = pm.read_nwb(
            path, window=(0.0, 1.0), bin_width=0.05, behavior="acquisition/speed", units={"quality": "good"},
            where=lambda t: t["start_time"] < 20,
        )  # fmt: skip
    messages = [str(entry.message) for entry in caught]
    assert messages == [
        "recording 'a': quality is empty for 1 of 3 units, which are left out",
        "recording 'a': 1 of 2 units have no spikes (2)",
        "recording 'a': 5 spikes lie outside of the session (before its time 0)",
        "recording 'a': behavior is missing (NaN) in 4 of 40 bins",
    ]
    assert np.isnan(rec.behavior[0, :, 0]).nonzero()[0].tolist() == [2, 3, 4, 5]
    assert rec.behavior[0, 0, 0] == pytest.approx(0.01 * np.arange(100, 105).mean())  # in m/s
    with pynwb.NWBHDF5IO(path, "a") as io:
        nwb = io.read()
        nwb.add_invalid_time_interval(start_time=22.0, stop_time=40.0)
        io.write(nwb)
    unseen = r"1 of 3 trials lie where no unit was observed, and are left out \(2\)"
    with pytest.warns(UserWarning, match="spikes lie outside"), pytest.warns(UserWarning, match=unseen):
        rec = pm.read_nwb(path, window=(0.0, 1.0), bin_width=0.05, units={"id": [0]})
    assert rec.num_trials == 2


def test_spikes_outside_of_the_session_and_of_the_intervals_are_counted(tmp_path):
    nwb = layouts.new_file()
    train = np.array([-3.0, 0.5, 1.5, 2.5, 3.5, 4.5, 12.0, 13.0])
    nwb.add_unit(spike_times=train, obs_intervals=[[0.0, 2.0], [2.0, 3.0], [4.0, 10.0]])
    nwb.add_trial(start_time=0.0, stop_time=5.0)
    layouts.write(nwb, tmp_path / "a.nwb")
    with pytest.warns(UserWarning) as caught:
        rec = pm.read_nwb(tmp_path / "a.nwb", bin_width=1.0)
    assert [str(entry.message) for entry in caught] == [
        "recording 'a': 3 spikes lie outside of the session",
        "recording 'a': 1 spikes in the windows lie where their unit was not observed, and are missing",
    ]
    assert rec.mask[0, :, 0].tolist() == [True, True, True, False, True]  # intervals that touch are one
    assert rec.values[0, :, 0].tolist() == [1, 1, 1, 0, 1]


@pytest.mark.parametrize(("module", "path"), [("pynwb", "a.nwb"), ("fsspec", "memory://a.nwb")])
def test_libraries_that_are_not_installed(module, path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}.*pip install "pyro-metassm\[nwb\]"'):
        pm.read_nwb(path, **CENTRE_OUT)


def test_a_clock_that_is_set_back_and_a_series_cut_short(tmp_path):
    nwb = layouts.new_file()
    nwb.add_unit(spike_times=np.arange(0.0, 20.0, 0.05))
    nwb.add_trial(start_time=1.0, stop_time=2.0)
    times = np.concatenate([np.arange(0, 5, 0.1), np.arange(3, 6, 0.1)])
    nwb.add_acquisition(pynwb.TimeSeries(name="back", data=times, timestamps=times, unit="m"))
    nwb.add_acquisition(
        pynwb.TimeSeries(name="late", data=times + 50, rate=10.0, starting_time=60.0, unit="m")
    )
    nwb.add_acquisition(pynwb.TimeSeries(name="short", data=times[:3], rate=10.0, unit="m"))
    layouts.write(nwb, tmp_path / "a.nwb")
    how = {"window": (0.0, 1.0), "bin_width": 0.1}
    with pytest.raises(ValueError, match=r"ascending timestamps, got 4\.9 s and then 3 s \(1 times so\)"):
        pm.read_nwb(tmp_path / "a.nwb", **how, behavior="back")
    for name in ("late", "short"):
        with pytest.raises(
            ValueError, match=r"behavior in the windows, got none \(acquisition/.*windows: 1 to 2 s"
        ):
            pm.read_nwb(tmp_path / "a.nwb", **how, behavior=name)


def test_times_in_milliseconds(tmp_path):
    rng = np.random.default_rng(0)
    nwb = layouts.new_file()
    for train in layouts.spike_trains(rng, 3, 120.0):
        nwb.add_unit(spike_times=train * 1000)
    for start in range(0, 100, 10):
        nwb.add_trial(start_time=start * 1000.0, stop_time=start * 1000.0 + 2000.0)
    layouts.write(nwb, tmp_path / "a.nwb")
    with pytest.raises(ValueError, match=r"needed times in seconds, got .* these are milliseconds: divide"):
        pm.read_nwb(tmp_path / "a.nwb", window=(0.0, 1.0), bin_width=0.02)
    nwb = layouts.new_file()
    for train in layouts.spike_trains(rng, 3, 120.0):
        nwb.add_unit(spike_times=train)
    nwb.add_trial(start_time=10_000.0, stop_time=12_000.0)
    layouts.write(nwb, tmp_path / "a.nwb")
    with pytest.raises(
        ValueError, match=r"needed spikes in the windows, got none .*in milliseconds, or on another"
    ):
        pm.read_nwb(tmp_path / "a.nwb", window=(0.0, 1.0), bin_width=0.02)


def test_a_slow_session_is_not_taken_for_milliseconds():
    """One spike in 20 s from the fastest unit, over an hour of usual trials: odd, but possible in seconds."""
    import pandas as pd

    trials = pd.DataFrame({"start_time": [0.0, 10.0], "stop_time": [5.0, 15.0]})
    seconds.check("a", [np.arange(0.0, 3600.0, 20.0)], trials, (0.0, 1.0), 0.0)
