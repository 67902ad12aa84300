"""Recordings with as little as possible and with all there is, and what it means for two to be the same."""

import numpy as np

from pyro_metassm.recordings import Recording

LENGTHS = (5, 9, 7)


def array(trials: int = 6, time: int = 8, neurons: int = 3) -> np.ndarray:
    return (
        np.random.default_rng([trials, time, neurons]).normal(size=(trials, time, neurons)).astype(np.float32)
    )


def plain(name: str = "x", trials: int = 6, time: int = 8, neurons: int = 3, **more) -> Recording:
    return Recording(name, array(trials, time, neurons), bin_width=0.02, **more)


def full(name: str = "full", seed: int = 0) -> Recording:
    """A recording with all there is: unequal lengths, missing bins and neurons, every optional field."""
    rng = np.random.default_rng(seed)
    observations = [rng.poisson(1.0, (time, 4)).astype(np.float64) for time in LENGTHS]
    observations[0][2] = np.nan
    observations[1][:, 3] = np.nan
    return Recording(
        name,
        observations,
        bin_width=0.01,
        mask=[np.arange(time) != 1 for time in LENGTHS],
        inputs=[rng.normal(size=(time, 2)) for time in LENGTHS],
        behavior=[np.where(rng.random((time, 2)) < 0.2, np.nan, 1.5) for time in LENGTHS],
        condition=["left", "", "rechts ü"],
        neuron_ids=np.array(["a", "bb", "c", "d"], dtype=object),
        held_out_neurons=[1],
        attrs={
            "behavior_names": ["x", "y"],
            "area": np.array(["V1", "M1", "V1", "PMd"]),
            "depth": np.array([0.1, np.nan, 3.0, 4.0], dtype=np.float32),
            "nested": {"none": None, "tiny": 1e-300, "pair": (1, True)},
            "trials": {"reaction": np.array([0.3, np.nan, 0.5])},
        },
    )


def same(a: Recording, b: Recording) -> bool:
    one, two = a.to_xarray(), b.to_xarray()
    dtypes = all(one[key].dtype == two[key].dtype for key in one.variables)
    return one.identical(two) and dtypes and a.lengths.tolist() == b.lengths.tolist()
