"""What a summary of recordings finds, and what it keeps quiet about."""

import warnings

import numpy as np
import pytest
from made_recordings import plain

from pyro_metassm.recordings import Recording, Recordings


def summary(recording: Recording) -> tuple[dict, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = Recordings([recording]).summary()
    assert all(entry.category is UserWarning and entry.filename == __file__ for entry in caught)
    return {key: value.item() for key, value in table.data_vars.items()}, [str(w.message) for w in caught]


def counts(
    trials: int = 40, time: int = 50, neurons: int = 20, mean: float = 0.5, seed: int = 0
) -> np.ndarray:
    return np.random.default_rng(seed).poisson(mean, (trials, time, neurons)).astype(np.float32)


def test_summary_counts_and_keeps_quiet_about_sound_data():
    observations = counts()
    observations[3, 30:] = np.nan
    observations[5, 10] = np.nan
    table, messages = summary(Recording("x", observations, bin_width=0.02))
    assert messages == []
    assert table["num_trials"] == 40 and table["num_neurons"] == 20 and table["trials_per_neuron"] == 2
    assert (table["bins_min"], table["bins_max"]) == (30, 50)
    assert table["missing_fraction"] == pytest.approx(1 / (39 * 50 + 30))
    assert table["mean_per_bin"] == pytest.approx(np.nanmean(observations), rel=1e-6)
    assert table["silent_neurons"] == table["duplicated_neurons"] == 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 20, 4)])
def test_summary_of_neurons_that_are_all_silent(shape):
    table, messages = summary(Recording("x", np.zeros(shape), bin_width=0.02))
    assert table["silent_neurons"] == shape[-1] and table["duplicated_neurons"] == 0
    assert f"{shape[-1]} of {shape[-1]} neurons are silent" in messages[0]


def test_summary_finds_silent_and_duplicated_neurons_in_one_warning():
    observations = counts()
    observations[..., 4] = 0
    observations[..., 5] = np.nan
    observations[..., 7] = observations[..., 9] = observations[..., 2]  # one neuron three times
    observations[..., 11] = 2 * observations[..., 10] + 1  # correlation is 1
    observations[..., 13] = observations[..., 12]
    observations[:, ::5, 13] += 1  # correlation is not
    table, messages = summary(Recording("x", observations, bin_width=0.02))
    assert (table["silent_neurons"], table["duplicated_neurons"]) == (2, 3)
    assert len(messages) == 1 and messages[0].startswith(
        "recording 'x': 2 of 20 neurons are silent or constant ("
    )
    assert "3 neurons duplicate another one" in messages[0]


@pytest.mark.parametrize(("noise", "found"), [(0.01, 1), (0.2, 0)])
def test_a_duplicate_is_told_by_its_correlation(noise, found):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 50, 30))
    values[..., 17] = values[..., 3] + noise * rng.normal(size=(20, 50))  # 1 - correlation = noise^2 / 2
    assert summary(Recording("x", values, bin_width=0.02))[0]["duplicated_neurons"] == found


def test_summary_finds_drift_but_not_missing_neurons():
    observations = counts(seed=1)
    drifting = np.random.default_rng(2).poisson(np.linspace(0.2, 0.8, 40)[:, None, None], (40, 50, 20))
    table, messages = summary(Recording("x", drifting, bin_width=0.02))
    assert table["drift"] == pytest.approx(0.6 / 0.5, abs=0.1) and table["drift_correlation"] > 0.9
    assert len(messages) == 1 and "drifts by +1" in messages[0]
    loud = observations.copy()
    loud[..., :10] += 5
    loud[:20, :, :10] = np.nan  # loud neurons come late: no drift of any neuron
    table, messages = summary(Recording("x", loud, bin_width=0.02))
    assert abs(table["drift"]) < 0.1 and messages == []


def test_summary_finds_few_counts_and_few_trials():
    table, messages = summary(Recording("x", counts(mean=0.005, trials=60), bin_width=0.02))
    assert table["mean_per_bin"] < 0.01 and len(messages) == 1 and "counts per bin on average" in messages[0]
    _, messages = summary(Recording("x", counts(trials=4), bin_width=0.02))
    assert len(messages) == 1 and messages[0].startswith("recording 'x': only 4 trials (pool it")
    _, messages = summary(Recording("x", counts(trials=1), bin_width=0.02))
    assert len(messages) == 1 and messages[0].startswith("recording 'x': only 1 trials (")
    signed = np.random.default_rng(0).normal(size=(20, 30, 5))  # a mean of zero is nothing to warn of
    assert summary(Recording("x", signed, bin_width=0.02))[1] == []


def found(observations, **more) -> str:
    """What the summary finds, in words; the table's own copy of them is the same."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = Recordings([Recording("x", observations, bin_width=0.02, **more)]).summary()
    told = [str(w.message).removeprefix("recording 'x': ") for w in caught]
    assert told == ([str(table["findings"].item()).replace("\n", "; ")] if told else [])
    return told[0] if told else ""


def test_summary_finds_each_planted_defect_and_no_other():
    """Defects planted one by one in sound counts: the finding with its number, and nothing else."""
    rng = np.random.default_rng(5)
    sound = rng.poisson(np.exp(0.5 * rng.normal(size=(60, 50, 1))) * rng.gamma(4.0, 0.2, 20)).astype(
        np.float32
    )
    assert found(sound) == ""
    rare = sound.copy()
    rare[..., 3] = 0
    rare[7, 9, 3] = rare[40, 2, 3] = 1  # 2 spikes in 60 s
    assert found(rare).startswith("1 of 20 neurons fire below 0.1 Hz (") and ";" not in found(rare)
    double = sound.copy()
    double[..., 4] = double[..., 8]
    double[..., 4] += rng.random((60, 50)) < 0.03  # the same unit with spikes of its own
    assert found(double).startswith("1 neurons share their spikes with another one (") and ";" not in found(
        double
    )
    broken = sound.copy()
    broken[[13, 31]] = 0
    assert found(broken).startswith("2 of 60 trials are out of line with the others (13, 31: ")
    swapped = sound.copy()
    swapped[:, :, 0] += 3
    swapped[22] = swapped[22][:, ::-1] * 4 * (np.arange(20) % 2)  # other neurons, the same activity about
    assert "(22: " in found(swapped)
    fading = sound * np.where(np.arange(60)[:, None, None] < 30, 1, np.arange(20) >= 6)
    assert found(fading).startswith("6 of 20 neurons drift by more than 100%")
    fine = (rng.random((60, 50, 20)) < 0.008).astype(np.float32)
    assert "make them up to 7 times as wide" in found(fine)
    few = rng.poisson(1.0, (12, 5, 20)).astype(np.float32)
    assert found(few).startswith("only 3 bins for each of 20 neurons in 12 trials (")


@pytest.mark.parametrize("seed", range(6))
def test_summary_has_nothing_to_say_of_simulated_recordings(seed):
    """Latents that trials share, conditions, slow rates and strong ones: none of it is a defect."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 2 * np.pi, 60)
    phase = rng.uniform(0, 2 * np.pi, (80, 1))
    latents = np.stack([np.sin(time + phase), np.cos(2 * time + phase)], -1)
    log_rate = latents @ rng.normal(size=(2, 15)) + rng.normal(-0.5, 0.7, 15)
    assert found(rng.poisson(np.exp(log_rate))) == ""
    assert found(log_rate + 0.05 * rng.normal(size=log_rate.shape)) == ""  # smooth, and nearly noiseless


def test_summary_warns_once_for_each_recording():
    recs = Recordings([plain("a", 4), plain("b", 20), plain("c", 3)])
    with pytest.warns(UserWarning) as caught:
        table = recs.summary()
    assert [str(entry.message).split(":")[0] for entry in caught] == ["recording 'a'", "recording 'c'"]
    assert table["recording"].values.tolist() == ["a", "b", "c"] and table.attrs["bin_width"] == 0.02
