"""Imports point one way: no file knows one above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up. A module or a package stands here by the first part of its name within pyro_metassm; names
# with a leading underscore are private parts of the modules of their layer.
LAYERS: tuple[set[str], ...] = (
    {
        "_attributes", "_batch", "_budget", "_checks", "_dataset", "_findings", "_interrupts", "_machine", "_recording",
        "_resting", "_selecting", "_smoothing", "_summary",
        "adaptations", "blocks", "capture", "describing", "dims", "distributions", "dynamics", "global_sites", "hooks",
        "integrating", "io", "likelihoods", "native", "neurons", "observations", "products", "rebuilding", "recordings",
        "simulate", "sites", "specification", "transitions", "writing",
    },
    {"models"},
    {"guides"},
    {
        "adaptation", "adapter", "announcing", "checkpoints", "draws", "elbo", "few_shot", "for_arviz",
        "frame_evidence", "frames", "history", "joining", "keeping", "laplace_smoother", "last_layer",
        "linear_systems", "optimizers", "own_tuning", "posterior", "read_outs", "result", "resuming", "revising",
        "rollouts", "saving", "simulated_trials", "starts", "teaching", "tempering", "trainer", "training", "trees",
        "warm_start", "windows",
    },
    {
        "_aligning", "_by_recording", "_decoding", "_draw_scores",
        "_forecast_scores", "_mean_rates", "_scored_neurons", "_scores", "analysis", "baselines", "calibrating",
        "comparing", "drifting", "leaving_future_out", "metrics", "plots", "reporting", "restarts", "suggesting",
    },
    {"__main__", "cli", "experiments"},
)  # fmt: skip
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
TOP = len(LAYERS) - 1


def _sources() -> dict[str, Path]:
    """Every module by its installed name. The links pyro_metassm/models and /guides are walked once, as folders."""
    folders = {
        "pyro_metassm": ROOT / "pyro_metassm",
        "pyro_metassm.models": ROOT / "models",
        "pyro_metassm.guides": ROOT / "guides",
    }
    found = {}
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            if package == "pyro_metassm" and path.relative_to(folder).parts[0] in ("models", "guides"):
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


SOURCES = _sources()


def _imports(module: str, source: str, is_package: bool) -> list[tuple[int, str]]:
    """The line and the dotted name of everything that a file imports, wherever in the file it does so."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                here = parts[: len(parts) - node.level + is_package]
                base = ".".join([*here, base] if base else here)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def _offences(module: str, source: str, is_package: bool = False) -> list[str]:
    """The imports of a file that point upwards or that use a bare name."""
    own = module.split(".")[1]
    found = []
    for line, target in _imports(module, source, is_package):
        first, _, rest = target.partition(".")
        if first in ("models", "guides"):
            found.append(f"line {line}: {target} under its bare name; write pyro_metassm.{target}")
        if first != "pyro_metassm":
            continue
        name = rest.split(".")[0]
        if name in LAYER:
            if LAYER[name] > LAYER[own]:
                found.append(f"line {line}: {target} is above {own}")
        elif LAYER[own] < TOP:
            what = f"the package (for {name})" if name else "the package"
            found.append(f"line {line}: {what}, which knows everything; import the module that defines it")
    return found


def test_every_module_has_a_layer():
    unknown = {m.split(".")[1] for m in SOURCES if m != "pyro_metassm"} - set(LAYER)
    assert not unknown, (
        f"say in LAYERS of {Path(__file__).name} where these modules belong: {sorted(unknown)}"
    )


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"pyro_metassm"}))
def test_imports_point_one_way(module: str):
    if module.split(".")[1] not in LAYER:
        pytest.skip("has no layer yet")
    path = SOURCES[module]
    found = _offences(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not found, f"{path.relative_to(ROOT)}:\n  " + "\n  ".join(found)


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("pyro_metassm.recordings", "import torch, pyro_metassm.dynamics", False),
        ("pyro_metassm.recordings", "from pyro_metassm import dynamics", False),
        ("pyro_metassm.recordings", "from .dynamics import MLP", False),
        ("pyro_metassm.guides.dkf", "from pyro_metassm.models import MetaSSM", False),
        ("pyro_metassm.guides.dkf", "from .base import Guide", False),
        ("pyro_metassm.cli", "import pyro_metassm as pm", False),
        ("pyro_metassm.cli", "from pyro_metassm import fit", False),
        ("pyro_metassm.models.meta_ssm", "from pyro_metassm.guides.base import Guide", True),
        ("pyro_metassm.models.meta_ssm", "from .. import guides", True),
        ("pyro_metassm.models.meta_ssm", "from ..guides import DKF", True),
        ("pyro_metassm.models.meta_ssm", "def f():\n    import pyro_metassm.training", True),
        ("pyro_metassm.models.meta_ssm", "import pyro_metassm as pm", True),
        ("pyro_metassm.models.meta_ssm", "from pyro_metassm import Recording", True),
        ("pyro_metassm.guides.dkf", "from models.meta_ssm import MetaSSM", True),
        ("pyro_metassm.training", "from pyro_metassm.metrics import r2", True),
    ],
)
def test_the_check_itself(module: str, source: str, wrong: bool):
    assert bool(_offences(module, source)) == wrong


def test_relative_imports_in_a_package_are_resolved():
    assert _imports("pyro_metassm.io", "from .nwb import read", True) == [(1, "pyro_metassm.io.nwb.read")]
    assert _imports("pyro_metassm.io.nwb", "from ..plots import x", False) == [(1, "pyro_metassm.plots.x")]
