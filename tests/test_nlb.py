"""The benchmark's tensors: neurons and forward bins where they belong, what a part lacks missing, what is refused."""

import h5py
import numpy as np
import pytest

import pyro_metassm as pm

SIZES = {"heldin": 5, "heldout": 2}


@pytest.fixture
def files(tmp_path):
    """Train input, evaluation input without held-out neurons, and target, as `nlb_tools` writes them at 20 ms."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, trials in (("train", 6), ("eval", 4)):
        for kind, neurons in SIZES.items():
            arrays[f"{part}_spikes_{kind}"] = rng.poisson(1.0, (trials, 35, neurons)).astype(float)
            arrays[f"{part}_spikes_{kind}_forward"] = rng.poisson(1.0, (trials, 10, neurons)).astype(float)
        arrays[f"{part}_behavior"] = rng.normal(size=(trials, 35, 2))
    arrays["eval_spikes_heldin"][2, 20:] = np.nan  # a shorter trial, padded
    layout = {
        "train": [key for key in arrays if key.startswith("train")],
        "eval": ["eval_spikes_heldin"],
        "target": ["eval_spikes_heldout", "eval_spikes_heldin_forward", "eval_spikes_heldout_forward",
                   "eval_behavior", "train_behavior"],
    }  # fmt: skip
    for name, keys in layout.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            holder = file.create_group("mc_maze_small_20") if name == "target" else file
            for key in keys:
                holder[key] = arrays[key]
            if name == "target":
                holder["psth"] = np.zeros((2, 35, 7))
    return {name: tmp_path / f"{name}.h5" for name in layout}, arrays


def blocks(rec):
    v = rec.observations
    return {
        "heldin": v[:, :35, :5], "heldout": v[:, :35, 5:],
        "heldin_forward": v[:, 35:, :5], "heldout_forward": v[:, 35:, 5:],
    }  # fmt: skip


@pytest.mark.parametrize("part", ["train", "eval"])
def test_neurons_and_bins_are_where_they_belong(files, part):
    paths, arrays = files
    rec = pm.read_nlb(list(paths.values()), part)
    assert rec.name == "mc_maze_small_20" and rec.bin_width == 0.02 and rec.attrs["forward_bins"] == 10
    assert rec.held_out_neurons.tolist() == [False] * 5 + [True] * 2
    for kind, block in blocks(rec).items():
        np.testing.assert_array_equal(block, arrays[f"{part}_spikes_{kind}"])
    np.testing.assert_allclose(rec.behavior[:, :35], arrays[f"{part}_behavior"], rtol=1e-6)
    assert np.isnan(rec.behavior[:, 35:]).all() and (rec.lengths == 45).all()


def test_without_the_target_what_is_not_known_is_missing(files):
    paths, arrays = files
    rec = pm.read_nlb([paths["train"], paths["eval"]], "eval", bin_width=0.02, name="maze")
    assert rec.num_neurons == 7 and rec.num_bins == 45 and rec.held_out_neurons.sum() == 2
    got = blocks(rec)
    np.testing.assert_array_equal(got.pop("heldin"), arrays["eval_spikes_heldin"])
    assert all(np.isnan(block).all() for block in got.values())
    train = pm.read_nlb(paths["train"], bin_width=0.02, name="maze")
    model = pm.models.MetaSSM(
        pm.Recordings([train]), latent_dim=1, embedding_dim=1, likelihood=pm.likelihoods.Poisson
    )
    assert pm.Recordings([rec]).batch(model.names).observations.shape == (1, 4, 45, 7)


def test_one_file_without_forward_bins(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train_spikes_heldin"] = np.ones((3, 8, 4), np.uint8)
        file["train_behavior"] = np.arange(6.0).reshape(3, 2)  # one row a trial, as dmfc_rsg has it
    rec = pm.read_nlb(tmp_path / "a.h5", bin_width=0.005)
    assert (
        rec.observations.shape == (3, 8, 4)
        and rec.attrs["forward_bins"] == 0
        and not rec.held_out_neurons.any()
    )
    assert rec.behavior is None and rec.take([2]).attrs["trials"]["behavior"].tolist() == [[4.0, 5.0]]


def test_what_is_refused(files, tmp_path):
    paths, _ = files
    with pytest.raises(ValueError, match=r"needed a bin_width, got no target file that tells it"):
        pm.read_nlb(paths["train"])
    with pytest.raises(
        ValueError, match=r"needed eval_spikes_heldin .* got only train_behavior, train_spikes_heldin"
    ):
        pm.read_nlb(paths["train"], "eval", bin_width=0.02)
    with pytest.raises(ValueError, match='needed part="train" or "eval"'):
        pm.read_nlb(paths["train"], "test")
    with pytest.raises(FileNotFoundError):
        pm.read_nlb(tmp_path / "none.h5")
    data = paths["train"].read_bytes()
    paths["train"].write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"train\.h5: no tensors of the benchmark"):
        pm.read_nlb(paths["train"], bin_width=0.02)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["train_spikes_heldin"], file["train_spikes_heldout"] = np.ones((3, 8, 4)), np.ones((3, 9, 2))
    with pytest.raises(ValueError, match=r"train_spikes_heldout of shape \(3, 8, 2\), got \(3, 9, 2\)"):
        pm.read_nlb(tmp_path / "b.h5", bin_width=0.02)
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file.create_group("one"), file.create_group("two")
    with pytest.raises(ValueError, match="one data set, got the groups one, two"):
        pm.read_nlb(tmp_path / "b.h5", bin_width=0.02)
