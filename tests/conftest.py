"""What every test stands on: one thread, no display, fixed examples, and a guard on global state."""

import os

# Before torch and matplotlib are imported: both read their environment once.
os.environ["MPLBACKEND"] = "agg"
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyro
import pytest
import torch
from jaxtyping import install_import_hook
from pyro.poutine import runtime

ROOT = Path(__file__).resolve().parents[1]

# Modules whose jaxtyping signatures are checked at every call of the tests: inner ones only, since those that meet
# the user's data answer with a ValueError of their own. It must stand before the package is imported.
install_import_hook(["pyro_metassm.neurons", "pyro_metassm.products"], "beartype.beartype")

from problems import recordings

from pyro_metassm import native
from pyro_metassm.recordings import Recordings

torch.set_num_threads(1)
# The same examples on every machine, and no deadline: the first call of anything in torch is slow.
hypothesis.settings.register_profile("metassm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("metassm")


def _global_state() -> dict[str, Any]:
    """Everything that a call of the library must leave as it was."""
    state: dict[str, Any] = {f"pyro.settings[{key!r}]": value for key, value in pyro.settings.get().items()}
    state["names in Pyro's param store"] = sorted(pyro.get_param_store().keys())
    state["Pyro's effect handlers left on the stack"] = len(runtime._PYRO_STACK)
    state["torch's default dtype"] = torch.get_default_dtype()
    state["torch's default device"] = torch.get_default_device()
    state["torch's number of threads"] = torch.get_num_threads()
    state["the compiled networks' number of threads"] = native.threads
    state["torch's gradient mode"] = torch.is_grad_enabled()
    state["torch's anomaly mode"] = torch.is_anomaly_enabled()
    state["torch's deterministic mode"] = torch.are_deterministic_algorithms_enabled()
    state["torch's matmul precision"] = torch.get_float32_matmul_precision()
    _, keys, position, *gauss = np.random.get_state()
    state["NumPy's global random state (use a Generator; pyro.set_rng_seed touches it too)"] = (
        keys.tobytes(),
        position,
        *gauss,
    )
    return state


def _restore(state: dict[str, Any]) -> None:
    """Put back what could make the next test fail for the fault of this one."""
    pyro.clear_param_store()
    pyro.settings.set(**{k[15:-2]: v for k, v in state.items() if k.startswith("pyro.settings[")})
    runtime._PYRO_STACK.clear()
    torch.set_default_dtype(state["torch's default dtype"])
    torch.set_default_device(None)
    torch.set_num_threads(state["torch's number of threads"])
    native.threads = state["the compiled networks' number of threads"]
    torch.set_grad_enabled(state["torch's gradient mode"])
    torch.autograd.set_detect_anomaly(state["torch's anomaly mode"])
    torch.use_deterministic_algorithms(state["torch's deterministic mode"])
    torch.set_float32_matmul_precision(state["torch's matmul precision"])


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 100 else "another value"


_AT_START = _global_state()


@pytest.fixture(autouse=True)
def global_state_guard() -> Iterator[None]:
    """Fails a test that leaves Pyro's, torch's or NumPy's global state other than it found it."""
    before = _global_state()
    # NumPy's generator may have been drawn from by an import; the rest must be as when the run started.
    imported = {k for k, v in before.items() if not k.startswith("NumPy") and v != _AT_START.get(k, v)}
    if imported:
        _restore(_AT_START)
        pytest.fail(f"changed before this test, by a wider fixture or at import: {sorted(imported)}")
    yield
    after = _global_state()
    leaks = [f"{k}: {_short(v)} became {_short(after[k])}" for k, v in before.items() if after[k] != v]
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    if leaks:
        _restore(_AT_START)
        pytest.fail("this test, or what it called, leaked global state:\n  " + "\n  ".join(leaks))


@pytest.fixture(scope="session")
def recs() -> Recordings:
    """Small recordings that are unequal in every way; tests that need others define ``recs`` for themselves."""
    return recordings()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real recordings beside the repository; tests that want it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder ../shared/data of real recordings is not there")
    return folder
