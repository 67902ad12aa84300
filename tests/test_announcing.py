"""What a fit says before it starts, against numbers worked out by hand."""

import numpy as np
import pytest
import torch
from fits import QUICK, parts

import pyro_metassm as pm
from pyro_metassm import announcing


def recs():
    a = pm.Recording("a", [np.ones((n, 3)) for n in (4, 6, 8)], bin_width=0.02)
    b = pm.Recording("b", np.ones((5, 10, 2)), bin_width=0.02)
    return pm.Recordings([a, b])


def test_bins_of_a_step_are_those_of_the_trials_drawn():
    assert announcing.bins_of_step(recs()) == 18 + 50
    assert announcing.bins_of_step(recs(), 4) == 18 + 40  # "a" has three trials, of 6 bins on average
    assert announcing.bins_of_step(recs(), 4, 1) == (18 + 40) / 2  # one of two recordings
    assert announcing.bins_of_step(recs(), 4, 5) == 58


def test_sizes_are_said_at_once_and_the_speed_after_the_first_steps(monkeypatch):
    clock = iter((100.0, 105.0))  # ten steps in five seconds
    monkeypatch.setattr(announcing.time, "perf_counter", lambda: next(clock))
    told = []
    module = torch.nn.Linear(3, 2)  # 8 parameters
    tell = announcing.Announcement(told.append, recs(), [module], 500, 4)
    assert told == ["fit: 2 recordings, 8 trials, 5 neurons, 8 parameters, 500 steps of about 58 bins"]
    for step in range(101, 150):  # resumed after 100 steps
        tell.after_step(step)
    assert told[1:] == ["fit: 116 bins per second, about 3.2 minutes for 380 more steps"]
    assert announcing.minutes(59) == "about 59 seconds"


def test_a_fit_with_progress_says_it_once_and_one_without_says_nothing(capsys):
    data = pm.simulate.limit_cycles([2.0], num_trials=4, num_steps=8, num_neurons=4)
    model, guide = parts(data)
    pm.fit(model, guide, data, **{**QUICK, "num_steps": 25, "progress": True})
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("fit: 1 recordings, 4 trials, 4 neurons, ") == 1
    assert told.err.count(" bins per second, about ") == 1
    pm.fit(model, guide, data, **QUICK)
    assert capsys.readouterr().err == pytest.approx("")
