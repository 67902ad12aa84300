"""A model where a fit is needed, and recordings that are not there: said in words."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
from fits import parts

import pyro_metassm as pm
from pyro_metassm import plots

SPACES = {"pm": pm, "metrics": pm.metrics, "analysis": pm.analysis, "plots": plots, "baselines": pm.baselines}
# For the arguments besides the fit that have no default.
GIVEN = SimpleNamespace(
    at="a",
    along=["a", "b"],
    context=3,
    grid_around="a",
    horizon=2,
    name="a",
    new=None,
    num_samples=3,
    origins=(3,),
    out=Path("page.html"),
    recording="a",
    seed=0,
    tree=None,
    trials=[0],
    truth=None,
)  # fmt: skip


def taking_a_fit() -> dict:
    """Public functions whose first argument is a fit, by name."""
    found = {}
    for space, module in SPACES.items():
        for name, function in vars(module).items():
            if not inspect.isfunction(function) or name.startswith("_"):
                continue
            first = next(iter(inspect.signature(function).parameters.values()), None)
            if first is not None and first.name == "fit" and str(first.annotation) == "Fit":
                found[f"{space}.{name}"] = function
    return found


TAKING = taking_a_fit()


def test_there_are_functions_that_take_a_fit():
    assert {"pm.posterior", "metrics.r2", "analysis.flow_field", "plots.history"} - set(TAKING) == {
        "metrics.r2"
    }


@pytest.mark.parametrize("name", TAKING)
def test_a_model_in_place_of_a_fit_is_told(name, recs):
    model, guide = parts(recs)
    arguments = {}
    for parameter in list(inspect.signature(TAKING[name]).parameters.values())[1:]:
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            data = parameter.name in ("recs", "train", "test", "like")
            arguments[parameter.name] = recs if data else getattr(GIVEN, parameter.name)
    for wrong in (model, guide):
        with pytest.raises(TypeError, match=rf"needed a fit, .*pm\.fit.*got {type(wrong).__name__}"):
            TAKING[name](wrong, **arguments)


def test_fits_that_are_compared_are_fits(recs):
    with pytest.raises(TypeError, match=r"needed a fit, .*got MetaSSM"):
        pm.compare({"a model": parts(recs)[0]}, recs)


def test_names_that_are_not_there_are_told_with_those_that_are(recs):
    simulated = pm.simulate.limit_cycles([2.0, 5.0], num_trials=2, num_steps=4)
    for data, said in ((simulated, "there are 'w=2', 'w=5'"), (recs, "there are none")):
        with pytest.raises(KeyError, match=f"no truth of recording 'w=3'; {said}"):
            data.truth["w=3"]
    assert "w=3" not in simulated.truth and simulated.truth.get("w=3") is None
    with pytest.raises(ValueError, match=r"recording 'd': needed a recording .* knows \('a', 'b', 'c'\)"):
        parts(recs)[0].neurons.check(["d"], [3])
