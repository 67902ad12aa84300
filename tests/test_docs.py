"""What the documentation shows runs: the examples of the docstrings, and the README's from top to bottom."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_metassm as pm

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pm.__path__, "pyro_metassm.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert found.failed == 0


def test_the_readme(tmp_path, monkeypatch):
    """Its code blocks in one namespace, with fewer steps and small data in place of the reader's own."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number, suffix in ((2, "npz"), (3, "nc")):
        recording = pm.Recording(f"monkey_{number}", rng.poisson(0.5, (12, 15, 4)), bin_width=0.02)
        (pm.io.write_npz if suffix == "npz" else pm.io.write_netcdf)(recording, f"monkey_{number}.{suffix}")
    quick = {"num_steps=400": "num_steps=2, warm_start_steps=2, progress=False"}
    quick["limit_cycles([2.5, 3.5, 5.0])"] = "limit_cycles([2.5, 3.5, 5.0], num_trials=8)"
    quick["limit_cycles([4.2])"] = "limit_cycles([4.2], num_trials=40)"
    quick["take_trials(8))"] = "take_trials(8), num_steps=2, num_starts=8, search_steps=6, progress=False)"
    namespace = {"spikes": rng.poisson(0.5, (12, 15, 5))}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        for long, short in quick.items():
            block = block.replace(long, short)
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["score"].dims == ("recording", "horizon_step")
    assert pm.load("my_fit").names == namespace["fit"].names
    assert namespace["adapted"].names == (*namespace["fit"].names, "w=4.2")
    edited = pm.fit(namespace["model"], pm.guides.DKF(namespace["model"]), namespace["recs"], num_steps=2,
                    warm_start_steps=2, progress=False)  # fmt: skip
    assert np.isfinite(edited.history["elbo"]).all()


def test_the_edits(monkeypatch):
    """docs/edits.md, in one namespace, with fewer steps and draws, and smaller data."""
    quick = {
        "num_steps=400": "num_steps=2, warm_start_steps=2, progress=False",
        "num_trials=16": "num_trials=4",
    }
    quick |= {"* 8, attrs": "* 2, attrs", "torch.rand(16, 40, 1)": "torch.rand(4, 12, 1)"}
    quick |= {
        "num_steps=40)": "num_steps=12)",
        "context=20, horizon=10": "context=6, horizon=3, num_samples=3",
    }
    quick |= {"pm.posterior(fit, recs)": "pm.posterior(fit, recs, num_samples=3)"}
    quick |= {"pm.guides.DKF(model)": "pm.guides.DKF(model, hidden_dim=6)"}
    quick |= {'"embedding_dim": 2}': '"embedding_dim": 2, "hidden_dim": 6}'}
    text = (ROOT / "docs" / "edits.md").read_text()
    assert all(long in text for long in quick)
    namespace, trees, checked = {}, [], []
    monkeypatch.setattr(pm, "posterior", kept(pm.posterior, trees))
    monkeypatch.setattr(pm, "forecast", kept(pm.forecast, trees))
    monkeypatch.setattr(pm.guides, "check", kept(pm.guides.check, checked))
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for long, short in quick.items():
            block = block.replace(long, short)
        exec(compile(block, "edits.md", "exec"), namespace)
    edits = {
        kind for kind in namespace.values() if isinstance(kind, type) and issubclass(kind, pm.models.MetaSSM)
    }
    assert len(checked) == len(edits) == 14 and checked == [[]] * 14 and len(trees) == 28
    for tree in trees:
        for node in tree.subtree:
            if node.name in ("posterior", "predictions"):
                assert all(np.isfinite(values).all() for values in node.data_vars.values()), node.path
    assert namespace["by_subject"].sizes == {"chain": 1, "draw": 3, "embedding_dim": 2}
    assert namespace["weights"].dims == ("chain", "draw", "neuron_of_all", "latent_dim")


def test_the_loaders(tmp_path, monkeypatch):
    """docs/loading.md, in one namespace: the files of public data sets are small ones of their layouts."""
    pytest.importorskip("pynwb")
    pytest.importorskip("zarr")
    import h5py
    import nwb_layouts as layouts
    from scipy.io import savemat

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    layouts.centre_out(tmp_path / "sub-C_ses-CO-20131003_behavior+ecephys.nwb")
    layouts.maze(tmp_path / "sub-Jenkins_ses-20090912_behavior+ecephys.nwb")
    layouts.benchmark(tmp_path / "sub-Jenkins_ses-full_desc-train_behavior+ecephys.nwb")
    trials = [{"spikes": rng.poisson(1.0, (3, bins)), "hand": np.ones((2, bins))} for bins in (5, 8)]
    savemat("session.mat", {"trials": trials})
    for name, keys in (
        ("train_input", ["train_spikes_heldin", "train_spikes_heldout"]),
        ("eval_input", ["eval_spikes_heldin"]),
        ("target", ["eval_spikes_heldout", "eval_spikes_heldin_forward", "eval_spikes_heldout_forward"]),
    ):
        with h5py.File(f"{name}.h5", "w") as file:
            holder = file.create_group("mc_maze_small_20") if name == "target" else file
            for key in keys:
                holder[key] = rng.poisson(1.0, (4, 5 if "forward" in key else 9, 3))
    text = (ROOT / "docs" / "loading.md").read_text()
    quick = {"num_steps=400": "num_steps=2, warm_start_steps=2, progress=False"}
    assert all(long in text for long in quick)
    namespace: dict = {}
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for long, short in quick.items():
            block = block.replace(long, short)
        exec(compile(block, "loading.md", "exec"), namespace)
    assert namespace["centre_out"].num_bins == 35 and namespace["benchmark"].held_out_neurons.any()
    assert namespace["counts"][0, :, 0].tolist() == [0, 0, 0, 1, 0, 0, 1] and namespace["forward"] == 5
    assert namespace["fit"].names == namespace["recs"].names and namespace["smooth"].num_trials == 48


def kept(function, results):
    def call(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return call
