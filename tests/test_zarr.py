"""Zarr stores: what is written comes back, trials are read when a batch has them, damage is found."""

import copy
import pickle
import shutil
import sys
import tracemalloc

import numpy as np
import pytest
import torch

pytest.importorskip("zarr")

from test_io import RECORDINGS, same

import pyro_metassm as pm
from pyro_metassm import warm_start
from pyro_metassm.io import lazy, open_zarr, read, read_zarr, write_zarr
from pyro_metassm.io import zarr as stores
from pyro_metassm.io.lazy import LazyRecording


def pool(num=4, trials=20, bins=12, neurons=5):
    rng = np.random.default_rng(0)
    recordings = []
    for number in range(num):
        y = rng.poisson(1.0, (trials, bins, neurons + number))
        mask = np.ones((trials, bins), dtype=bool)
        mask[1, 8:] = number % 2 == 0
        more = {"condition": np.arange(trials) % 3, "attrs": {"trials": {"rt": rng.normal(size=trials)}}}
        recordings.append(pm.Recording(f"day {number}", y, bin_width=0.02, mask=mask, **more))
    return pm.Recordings(recordings)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "CHUNK", 120)  # two trials of the first recording
    recs = pool()
    write_zarr(recs, tmp_path / "pool.zarr")
    return recs, tmp_path / "pool.zarr"


@pytest.fixture
def reads(monkeypatch):
    """What is read: (recording, array, trials)."""
    found, real = [], LazyRecording._read

    def counting(self, key, rows=None, stop=None):
        found.append((self.name, key, self.num_trials if rows is None else len(rows)))
        return real(self, key, rows, stop)

    monkeypatch.setattr(LazyRecording, "_read", counting)
    return found


@pytest.mark.parametrize("recording", RECORDINGS.values(), ids=RECORDINGS.keys())
def test_what_is_written_comes_back(recording, tmp_path):
    write_zarr(recording, tmp_path / "a.zarr")
    assert same(read(tmp_path / "a.zarr"), recording)
    opened = open_zarr(tmp_path / "a.zarr")[recording.name]
    assert same(opened, recording) and same(opened.load(), recording)
    assert opened.values.dtype == recording.values.dtype and opened.num_inputs == recording.num_inputs
    write_zarr(recording.take([0]), tmp_path / "a.zarr")  # replaces the store
    assert read_zarr(tmp_path / "a.zarr").num_trials == 1


def test_everything_derived_is_as_in_memory(store):
    recs, path = store
    opened = open_zarr(path)
    assert opened.names == recs.names and opened.num_trials == recs.num_trials
    for of in (
        lambda r: r.take_trials(6, seed=1),
        lambda r: r.split(0.25)[1],
        lambda r: r.split(0.25)[0].take_trials(3).crop(2, 7),
        lambda r: r.crop(1, 9),
        lambda r: r.select(["day 2"]),
        lambda r: r.smooth(0.05),
    ):
        expected, got = of(recs), of(opened)
        assert all(same(got[name], expected[name]) for name in expected)
        one, other = expected.batch(expected.names), got.batch(got.names)
        for key in ("observations", "mask", "time_mask", "trial_scale"):
            assert torch.equal(getattr(one, key), getattr(other, key))
    one = opened["day 1"]
    assert same(pickle.loads(pickle.dumps(one)), recs["day 1"]) and same(copy.deepcopy(one), recs["day 1"])
    assert one.has_counts and opened["day 0"].complete and not one.complete
    assert "in a store" in repr(one) and same(
        one.only(np.arange(6) < 2), recs["day 1"].only(np.arange(6) < 2)
    )
    assert opened.summary().identical(recs.summary())


def test_a_batch_reads_its_trials_and_no_others(store, reads):
    recs, path = store
    opened = open_zarr(path)
    train, _ = opened.split(0.5)
    train = train.take_trials(8).crop(0, 10)
    reads.clear()
    trials = {"day 1": [5, 2], "day 3": [0]}
    batch = train.batch(train.names, names=["day 1", "day 3"], trials=trials)
    assert sorted(reads) == [
        ("day 1", "mask", 2), ("day 1", "values", 2), ("day 3", "mask", 1), ("day 3", "values", 1),
    ]  # fmt: skip
    expected = recs.split(0.5)[0].take_trials(8).crop(0, 10)
    expected = expected.batch(expected.names, names=["day 1", "day 3"], trials=trials)
    assert torch.equal(batch.observations, expected.observations) and torch.equal(batch.mask, expected.mask)


def test_opening_reads_no_array(store, reads):
    opened = open_zarr(store[1], ["day 2", "day 0"])
    assert opened.names == ("day 2", "day 0") and opened["day 2"].num_neurons == 7
    opened.split(0.5)[0].take_trials(3)
    assert reads == []


def test_a_fit_is_the_one_in_memory_bit_by_bit(store, reads):
    recs, path = store
    opened = open_zarr(path)
    options = {
        "num_steps": 4,
        "recordings_per_step": 2,
        "trials_per_step": 3,
        "progress": False,
        "warm_start_steps": 2,
    }
    fits = []
    for data in (recs, opened):
        torch.manual_seed(0)
        model = pm.models.MetaSSM(
            data, latent_dim=2, embedding_dim=1, hidden_dim=4, likelihood=pm.likelihoods.Poisson
        )
        reads.clear()
        fits.append(pm.fit(model, pm.guides.DKF(model, hidden_dim=4), data, **options))
    for one, other in zip(fits[0].model.parameters(), fits[1].model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [entry for entry in reads if entry[2] == 3]


def test_a_pool_larger_than_what_is_kept(tmp_path):
    """Batches of two recordings from a pool of ten: numpy's memory stays far below that of the pool."""
    recordings = (
        pm.Recording(f"r{k}", np.full((64, 50, 64), float(k + 0.5)), bin_width=0.02) for k in range(10)
    )
    write_zarr(recordings, tmp_path / "a.zarr")
    size = 10 * 64 * 50 * 64 * 8
    recs = open_zarr(tmp_path / "a.zarr")
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        for _ in range(5):
            names, trials = pm.recordings.sample_trials(recs, 8, rng, recordings_per_step=2)
            batch = recs.batch(recs.names, names=names, trials=trials)
            assert batch.observations[0, 0, 0, 0] == int(names[0][1:]) + 0.5
        for recording in recs.values():
            recording.values.sum()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.35 * size  # a recording in whole is a tenth, while it is read two


def test_the_start_takes_some_trials_of_what_is_too_large(monkeypatch):
    recs = pool()
    assert warm_start.starting_trials(recs) == {}
    monkeypatch.setattr(warm_start, "NUMBERS", 4 * 12 * 8 * 5)
    chosen = warm_start.starting_trials(recs)
    assert all(trials.tolist() == [0, 5, 10, 14, 19] for trials in chosen.values()) and len(chosen) == 4


def test_writing_goes_on_and_leaves_what_is_complete(store):
    recs, path = store
    more = recs["day 0"].take([0, 1])
    more = pm.Recording("more", more.observations, bin_width=0.02)

    def broken():
        yield more
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_zarr(broken(), path, append=True)
    assert open_zarr(path).names == (*recs.names, "more") and same(open_zarr(path)["more"], more)
    with pytest.raises(ValueError, match="recording 'more': needed one recording of a name"):
        write_zarr([more], path, append=True)
    with pytest.raises(ValueError, match=r"needed one recording, got 5; use pm\.open_zarr"):
        read(path)
    assert same(read_zarr(path, "day 2"), recs["day 2"])


def test_damage_is_found(store, tmp_path):
    _, path = store
    chunks = sorted((path / "r1" / "values" / "c").rglob("*"))
    chunk = next(file for file in chunks if file.is_file())
    kept = chunk.read_bytes()
    for place in range(0, len(kept), 5):  # whatever bit it is: the compression alone would not tell
        chunk.write_bytes(kept[:place] + bytes([kept[place] ^ 4]) + kept[place + 1 :])
        recs = open_zarr(path)
        with pytest.raises(
            ValueError, match=r"recording 'day 1': needed values of trials .* got damaged chunks"
        ):
            recs["day 1"].values.sum()
    assert recs["day 0"].values.sum() > 0
    chunk.write_bytes(kept[:5])
    with pytest.raises(ValueError, match="damaged chunks"):
        open_zarr(path)["day 1"].values.sum()
    chunk.unlink()
    with pytest.raises(
        ValueError, match=r"recording 'day 1': needed all chunks of values, got 1 of 20 missing"
    ):
        open_zarr(path)
    assert open_zarr(path, ["day 0"]).names == ("day 0",)
    shutil.rmtree(path / "r1")
    with pytest.raises(ValueError, match="no recordings in a Zarr store"):
        open_zarr(path)


def test_a_chunk_of_zeros_is_not_taken_for_a_lost_one(tmp_path):
    silent = pm.Recording("a", np.zeros((4, 5, 2)), bin_width=0.02)
    write_zarr(silent, tmp_path / "a.zarr")
    assert same(read(tmp_path / "a.zarr"), silent)


def test_without_zarr(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    for call in (lambda: open_zarr(store[1]), lambda: write_zarr(store[0], store[1])):
        with pytest.raises(ImportError, match=r'pip install "pyro-metassm\[zarr\]"'):
            call()


def test_what_is_no_store(store, tmp_path):
    _, path = store
    with pytest.raises(ValueError, match=r"needed a recording 'x', got only day 0, day 1"):
        open_zarr(path, ["x"])
    with pytest.raises(FileNotFoundError):
        open_zarr(tmp_path / "none.zarr")
    (tmp_path / "text.zarr").mkdir()
    for text in ("", "{", "[]", "{}", '{"attributes": {"format": "other"}}'):
        (tmp_path / "text.zarr" / "zarr.json").write_text(text)
        with pytest.raises(ValueError, match="needed a Zarr store"):
            open_zarr(tmp_path / "text.zarr")
    with pytest.raises(ValueError, match="needed a Zarr store"):  # nor is it replaced
        write_zarr(pool(), tmp_path / "text.zarr")
    with pytest.raises(ValueError, match="needed at least one recording"):
        write_zarr([], tmp_path / "new.zarr")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": np.array([99] * 6)}, "lengths from 1 to 9"),
        ({"dtype": "object"}, "needed float32 or float64"),
        ({"bin_width": 20.0}, "milliseconds"),
        ({"name": "a/b"}, 'a name without "/"'),
        ({"condition": np.arange(3)}, r"condition of shape \(6,\)"),
    ],
)
def test_coordinates_are_checked_when_a_store_is_opened(change, message, tmp_path):
    import zarr

    write_zarr(RECORDINGS["full"], tmp_path / "a.zarr")
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="r+")["r0"]
    about = stores.attributes.from_json(group.attrs["recording"])
    group.attrs["recording"] = stores.attributes.to_json(about | change)
    if "name" in change:
        with pytest.raises(ValueError, match=message):
            lazy.LazyRecording.of(
                about | change, {key: group[key] for key in ("values", "mask")}, lazy.Store()
            )
    else:
        with pytest.raises(ValueError, match=message):
            open_zarr(tmp_path / "a.zarr")
