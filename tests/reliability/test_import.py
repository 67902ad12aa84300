"""To import the library changes nothing that is everybody's, prints nothing, and takes little time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1.5  # beyond torch and pyro

CODE = """
import json, logging, os, random, signal, sys, threading, time, warnings
import numpy, pyro, torch
from pyro.poutine import runtime

def state():
    found = {
        "warnings": [str(f) for f in warnings.filters], "showwarning": str(warnings.showwarning),
        "environment": dict(os.environ), "folder": os.getcwd(), "path": sys.path,
        "hooks": str((sys.excepthook, sys.displayhook)),
        "recursion": sys.getrecursionlimit(), "threads": threading.active_count(),
        "logging": [(h.__class__.__name__) for h in logging.root.handlers],
        "level": logging.root.level,
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "random": str(random.getstate()), "numpy": str(numpy.random.get_state()),
        "torch": str(torch.get_rng_state().tolist()),
        "numpy errors": numpy.geterr(), "printing": str(numpy.get_printoptions()),
        "dtype": str(torch.get_default_dtype()), "device": str(torch.get_default_device()),
        "num threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(), "torch printing": str(torch._tensor_str.PRINT_OPTS),
        "pyro": str(pyro.settings.get()), "param store": list(pyro.get_param_store().keys()),
        "stack": len(runtime._PYRO_STACK),
        "validation": torch.distributions.Distribution._validate_args,
    }
    if "matplotlib" in sys.modules:
        import matplotlib
        found["matplotlib"] = str(dict(matplotlib.rcParams))
    return found

before = state()
started = time.process_time()
import pyro_metassm
seconds = time.process_time() - started
after = state()
changed = [key for key in before if before[key] != after[key]]
heavy = [name for name in ("matplotlib", "arviz", "arviz_base", "pynwb", "zarr", "hdmf", "sklearn", "seaborn",
                           "IPython", "beartype", "scipy.stats") if name in sys.modules]
sys.stderr.flush()
print(json.dumps({"changed": changed, "seconds": seconds, "heavy": heavy}))
"""


def imported() -> dict:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-W", "error", "-W", "ignore::FutureWarning", "-c", CODE]
    ran = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "" and len(ran.stdout.splitlines()) == 1, "it prints"
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def found() -> dict:
    return imported()


def test_no_setting_is_changed(found):
    assert found["changed"] == []


def test_what_not_everybody_uses_is_not_imported(found):
    assert found["heavy"] == []


def test_the_time(found):
    """Of the processor; the best of three, since the first may have files to read."""
    seconds = [found["seconds"]]
    while min(seconds) > SECONDS and len(seconds) < 3:
        seconds.append(imported()["seconds"])
    assert min(seconds) < SECONDS
