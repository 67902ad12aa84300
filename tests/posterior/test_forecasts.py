"""Forecasts: causal to the bit, from the guide's last state, of trials that are long enough."""

import dataclasses

import numpy as np
import pytest
import torch
from drawn_fits import fit_for
from problems import recordings

import pyro_metassm as pm
from pyro_metassm.draws import posterior_chunks
from pyro_metassm.guides.encoders import RecurrentEncoder
from pyro_metassm.recordings import Recording, Recordings


def changed(recording: Recording, k: int, t: int, value: float, neuron=slice(None)) -> Recording:
    """One bin of one trial set to a value (NaN: missing), the trial's length kept."""
    y = recording.observations.copy()
    y[k, t, neuron] = value
    return Recording(recording.name, y, bin_width=recording.bin_width, lengths=recording.lengths)


GUIDES = {
    "set": {},
    "recurrent": {"embedding_encoder": RecurrentEncoder},
    "common": {"common_dim": 5},
    "smoothed": {},
    "counts": {},
}


@pytest.mark.parametrize("kind", GUIDES)
def test_forecasts_are_causal(kind):
    """Whatever stands at or after `context`, of any trial: the forecasts are the same to the bit."""
    context, horizon = 4, 3
    data = recordings(counts=kind == "counts", shapes={"a": (2, (7, 6, 4)), "b": (3, (5,))})
    fit = fit_for(
        data, pm.likelihoods.Poisson if kind == "counts" else pm.likelihoods.Gaussian, **GUIDES[kind]
    )
    if kind == "smoothed":
        fit.guide.smoothing.fill_(2.0)

    def forecast(recording: Recording, **more) -> dict[str, np.ndarray]:
        options = {"context": context, "horizon": horizon, "num_samples": 2, "predictive": True} | more
        tree = pm.forecast(fit, Recordings([recording]), **options)
        return {"embedding": tree["posterior"]["embedding"].values} | dict(tree["a/predictions"].data_vars)

    recording = data["a"]
    expected = forecast(recording)
    for k, length in enumerate(recording.lengths):
        for t in range(context, length):
            for value in (40.0, np.nan):
                for neuron in (slice(None), 1):
                    got = forecast(changed(recording, k, t, value, neuron))
                    assert all(np.array_equal(v, got[name]) for name, v in expected.items()), (k, t, value)
    # All later bins gone altogether, and all of them garbage.
    for other in (recording.crop(0, context), *(everything(recording, context, v) for v in (17.0, np.nan))):
        assert all(np.array_equal(v, forecast(other)[name]) for name, v in expected.items())
    # A chunk of trials at a time: the same guarantee.
    in_chunks = forecast(recording, chunk_size=1)
    got = forecast(changed(recording, 0, 5, 40.0), chunk_size=1)
    assert all(np.array_equal(v, got[name]) for name, v in in_chunks.items())
    # What stands before does reach them: the test would see a leak. (The embedding is of the training trials.)
    for k in range(3):
        moved = forecast(changed(recording, k, context - 1, 6.0))
        assert (moved["latents"] != expected["latents"]).any(
            ("chain", "draw", "time", "latent_dim")
        ).values.tolist() == [other == k for other in range(3)]
        assert np.array_equal(moved["embedding"], expected["embedding"])


def everything(recording: Recording, start: int, value: float) -> Recording:
    y = recording.observations.copy()
    y[:, start:] = np.where(
        np.arange(start, y.shape[1])[:, None] < recording.lengths[:, None, None], value, np.nan
    )
    return Recording(recording.name, y, bin_width=recording.bin_width, lengths=recording.lengths)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_embeddings_of_recordings_not_trained_on_come_from_the_context(recs, fit, chunk_size):
    """From the first bins of all trials that are forecast, whatever the chunks; and nothing later reaches them."""
    known = fit.statistics.clone()
    known[0] = torch.nan
    part = dataclasses.replace(fit, statistics=known)
    context, recording = 4, recs["a"]

    def forecast(recording: Recording) -> dict[str, np.ndarray]:
        data = Recordings([recording])
        tree = pm.forecast(part, data, context=context, horizon=2, num_samples=400, chunk_size=chunk_size)
        return {"embedding": tree["posterior"]["embedding"].values} | dict(tree["a/predictions"].data_vars)

    expected = forecast(recording)
    for k, length in enumerate(recording.lengths):
        for t in range(context, length):
            for value in (40.0, np.nan):
                got = forecast(changed(recording, k, t, value))
                assert all(np.array_equal(v, got[name]) for name, v in expected.items())
    for k in range(3):  # every trial's context does reach the embedding
        got = forecast(changed(recording, k, 1, 3.0))
        assert not np.array_equal(got["embedding"], expected["embedding"])
    # Its moments are what the guide makes of these bins, all trials together.
    batch = Recordings([recording.crop(0, context)]).batch(fit.names)
    _, frame, share = fit.guide.common_space(batch)
    with torch.no_grad():
        mean, variance = fit.guide.embedding_statistics(frame, share, batch)[0].numpy().reshape(2, -1)
    e = expected["embedding"][0, :, 0]
    assert (np.abs(e.mean(0) - mean) < 5 * np.sqrt(variance / 400)).all()
    assert (np.abs(e.var(0) / variance - 1) < 5 * np.sqrt(2 / 400)).all()


def test_forecasts_start_at_the_guides_last_state(recs, fit):
    """The first forecast bin is one step of the model from the guide's draw at bin context - 1."""
    chunks = list(posterior_chunks(fit, recs, "b", 300, seed=0, context=5))
    tree = pm.forecast(fit, recs.select(["b"]), context=5, horizon=2, num_samples=300, seed=0)
    z = tree["b/predictions"]["latents"].values[0]
    last = torch.cat([c.latents[:, :, :, -1:] for c in chunks])
    e = torch.cat([c.embedding for c in chunks])
    assert np.array_equal(e[:, 0, 0].numpy(), tree["posterior"]["embedding"].values[0, :, 0])
    with torch.no_grad():
        dynamics = fit.model.adapt_dynamics(e)
        means = [dynamics(x)[:, 0, :, 0].numpy() for x in (last, torch.as_tensor(z[:, None, :, :1]))]
        scale = fit.model.process_noise().numpy()
    for h, mean in enumerate(means):
        residual = (z[:, :, h] - mean) / scale
        assert abs(residual.mean()) < 5 / residual.size**0.5
        assert abs(residual.var() - 1) < 5 * (2 / residual.size) ** 0.5


def test_trials_shorter_than_the_context_are_left_out_and_counted(recs, fit):
    with pytest.warns(UserWarning) as caught:
        tree = pm.forecast(fit, recs, context=6, horizon=2, num_samples=2)
    assert [str(w.message).split(" trials")[0] for w in caught] == [
        "recording 'a': 1 of 3", "recording 'b': 1 of 2", "recording 'c': 2 of 4",
    ]  # fmt: skip
    assert tree["c/predictions"]["trial"].values.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"recording 'a'.*context = 8 bins to forecast, the longest has 7"):
        pm.forecast(fit, recs, context=8, horizon=2)
