"""Small NWB files, written by pynwb itself in the layouts of public data sets, and what is in them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pynwb
from pynwb.behavior import Position, SpatialSeries

START = datetime.datetime(2013, 10, 3, tzinfo=datetime.UTC)


class Truth(dict):
    """What was written: `trains` of every unit, `trials` by column, series by path."""


def spike_trains(
    rng: np.random.Generator, num_units: int, end: float, rate: float = 20.0
) -> list[np.ndarray]:
    """Poisson trains on the clock of an acquisition system (30 kHz)."""
    return [
        np.unique(np.round(np.sort(rng.uniform(0.0, end, rng.poisson(rate * end))) * 30_000) / 30_000)
        for _ in range(num_units)
    ]


def new_file(subject: str = "C") -> pynwb.NWBFile:
    return pynwb.NWBFile(
        session_description="reaching",
        identifier="session",
        session_start_time=START,
        subject=pynwb.file.Subject(subject_id=subject, species="Macaca mulatta", age="P5Y", sex="M"),
    )


def add_electrodes(nwb: pynwb.NWBFile, locations: list[str]) -> None:
    device = nwb.create_device(name="array")
    groups = {}
    for location in locations:
        if location not in groups:
            groups[location] = nwb.create_electrode_group(
                name=f"group_{location}", description="Utah array", location=location, device=device
            )
        nwb.add_electrode(location=location, group=groups[location])


def write(nwb: pynwb.NWBFile, path: Path) -> None:
    with pynwb.NWBHDF5IO(path, "w") as io:
        io.write(nwb)


def centre_out(path: Path, seed: int = 0, num_trials: int = 12, num_units: int = 5, **edit: Any) -> Truth:
    """DANDI 000688 (Perich et al.): targets, `Velocity/cursor_vel` with timestamps, electrodes, no obs_intervals."""
    rng, nwb = np.random.default_rng(seed), new_file()
    start = 2.0 + 3.0 * np.arange(num_trials)
    trials = {
        "start_time": start,
        "stop_time": start + 2.5,
        "target_on_time": start + 0.3,
        "go_cue_time": start + 0.8,
        "move_onset_time": np.round(start + 1.0 + rng.uniform(0.0, 0.3, num_trials), 3),
        "target_dir": np.resize(np.arange(4) * np.pi / 2, num_trials),
        "target_id": np.resize(np.arange(4.0), num_trials),
        "result": np.array(["R", "R", "F"] * num_trials)[:num_trials],
    } | edit
    for column in list(trials)[2:]:
        nwb.add_trial_column(name=column, description=column)
    for row in zip(*trials.values(), strict=True):
        nwb.add_trial(**dict(zip(trials, row, strict=True)))
    end = float(start[-1] + 3.0)
    trains = spike_trains(rng, num_units, end)
    add_electrodes(nwb, ["M1", "PMd"] * num_units)
    nwb.add_unit_column(name="quality", description="sorting")
    for number, train in enumerate(trains):
        quality = "good" if number != 1 else "mua"
        nwb.add_unit(spike_times=train, electrodes=[number], quality=quality, id=100 + number)
    times = np.arange(0.0, end, 0.01)
    velocity = np.stack([np.sin(times), np.cos(times)], 1)
    module = nwb.create_processing_module(name="behavior", description="behavior")
    container = pynwb.behavior.BehavioralTimeSeries(name="Velocity")
    container.create_timeseries(name="cursor_vel", data=velocity, timestamps=times, unit="cm/s")
    module.add(container)
    position = Position(name="Position")
    position.add_spatial_series(
        SpatialSeries(name="cursor_pos", data=velocity, timestamps=times, reference_frame="screen")
    )
    module.add(position)
    write(nwb, path)
    return Truth(trains=trains, trials=trials, times=times, velocity=velocity, end=end)


def maze(path: Path, seed: int = 0, num_trials: int = 8, num_units: int = 4) -> Truth:
    """DANDI 000070 (Churchland et al.): `Position/Cursor, Hand, Eye`, `move_begins_time`, ragged target columns."""
    rng, nwb = np.random.default_rng(seed), new_file("Jenkins")
    start = 1.0 + 2.5 * np.arange(num_trials)
    trials = {
        "start_time": start,
        "stop_time": start + 2.2,
        "target_presentation_time": start + 0.3,
        "go_cue_time": start + 0.7,
        "move_begins_time": start + 1.0,
        "move_ends_time": start + 1.4,
        "discard_trial": (np.arange(num_trials) % 4 == 3).astype(float),
        "task_success": np.ones(num_trials),
        "maze_condition": np.arange(num_trials) % 3,
    }
    for column in list(trials)[2:]:
        nwb.add_trial_column(name=column, description=column)
    nwb.add_trial_column(name="target_position", description="each target", index=True)
    nwb.add_trial_column(name="hit_target_position", description="x and y")
    for number, row in enumerate(zip(*trials.values(), strict=True)):
        targets = [[1.0, 2.0]] * (1 + number % 3)
        nwb.add_trial(
            **dict(zip(trials, row, strict=True)),
            target_position=targets,
            hit_target_position=[float(number), 2.0],
        )
    end = float(start[-1] + 2.5)
    trains = spike_trains(rng, num_units, end)
    device = nwb.create_device(name="array")
    group = nwb.create_electrode_group(name="PMd", description="array", location="PMd", device=device)
    for train in trains:
        nwb.add_unit(spike_times=train, electrode_group=group)
    # Sampled in the trials alone, as the published files are.
    times = np.concatenate([np.arange(a, b, 0.001) for a, b in zip(start, start + 2.2, strict=True)])
    module = nwb.create_processing_module(name="behavior", description="behavior")
    position = Position(name="Position")
    series = {}
    for which, name in enumerate(("Cursor", "Hand", "Eye")):
        series[name] = np.stack([times + which, -times], 1)
        position.add_spatial_series(
            SpatialSeries(name=name, data=series[name], timestamps=times, reference_frame="screen")
        )
    module.add(position)
    write(nwb, path)
    return Truth(trains=trains, trials=trials, times=times, end=end, **series)


def benchmark(path: Path, seed: int = 0, num_trials: int = 10, num_units: int = 6) -> Truth:
    """DANDI 000128 and 000140 (MC_Maze): `heldout` units, obs_intervals of trials, splits, series with a rate."""
    rng, nwb = np.random.default_rng(seed), new_file("Jenkins")
    start = 1.0 + 2.0 * np.arange(num_trials)
    trials = {
        "start_time": start,
        "stop_time": start + 1.8,
        "target_on_time": start + 0.3,
        "go_cue_time": start + 0.6,
        "move_onset_time": start + 0.9,
        "trial_type": np.arange(num_trials) % 3,
        "trial_version": np.arange(num_trials) % 2,
        "success": np.ones(num_trials, dtype=bool),
        "split": np.array((["train"] * 3 + ["val"]) * num_trials)[:num_trials],
    }
    for column in list(trials)[2:]:
        nwb.add_trial_column(name=column, description=column)
    for row in zip(*trials.values(), strict=True):
        nwb.add_trial(**dict(zip(trials, row, strict=True)))
    intervals = np.stack([start, start + 1.8], 1)
    trains = []
    nwb.add_unit_column(name="heldout", description="held out")
    device = nwb.create_device(name="array")
    group = nwb.create_electrode_group(name="M1", description="array", location="M1", device=device)
    for number, train in enumerate(spike_trains(rng, num_units, float(start[-1] + 2.0))):
        inside = np.zeros(len(train), dtype=bool)
        for a, b in intervals:
            inside |= (train >= a) & (train < b)
        trains.append(train[inside])
        nwb.add_unit(
            spike_times=train[inside], obs_intervals=intervals, heldout=number >= 4, electrode_group=group
        )
    rate, number = 1000.0, int((start[-1] + 2.0) * 1000)
    times = np.arange(number) / rate
    module = nwb.create_processing_module(name="behavior", description="behavior")
    series = {}
    for which, name in enumerate(("cursor_pos", "eye_pos", "hand_pos", "hand_vel")):
        series[name] = np.stack([np.sin(times + which), times], 1)
        module.add(
            pynwb.TimeSeries(
                name=name,
                data=series[name],
                rate=rate,
                starting_time=0.0,
                unit="mm",
                comments="columns=[x,y]",
            )
        )
    write(nwb, path)
    return Truth(trains=trains, trials=trials, times=times, intervals=intervals, **series)
