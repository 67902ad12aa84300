"""Meta-dynamical state space models: one family of latent dynamics for many recordings."""

from pyro_metassm import analysis as analysis
from pyro_metassm import baselines as baselines
from pyro_metassm import guides as guides
from pyro_metassm import io as io
from pyro_metassm import likelihoods as likelihoods
from pyro_metassm import metrics as metrics
from pyro_metassm import models as models
from pyro_metassm import simulate as simulate
from pyro_metassm import transitions as transitions
from pyro_metassm.adaptation import adapt as adapt
from pyro_metassm.calibrating import calibration as calibration
from pyro_metassm.checkpoints import CheckpointError as CheckpointError
from pyro_metassm.comparing import compare as compare
from pyro_metassm.drifting import drift as drift
from pyro_metassm.for_arviz import to_arviz as to_arviz
from pyro_metassm.io.binning import bin_spikes as bin_spikes
from pyro_metassm.io.mat import read_mat as read_mat
from pyro_metassm.io.nlb import read_nlb as read_nlb
from pyro_metassm.io.nwb import read_nwb as read_nwb
from pyro_metassm.io.pynapple import from_pynapple as from_pynapple
from pyro_metassm.io.structures import from_dict as from_dict
from pyro_metassm.io.zarr import open_zarr as open_zarr
from pyro_metassm.joining import join as join
from pyro_metassm.leaving_future_out import leave_future_out as leave_future_out
from pyro_metassm.posterior import forecast as forecast
from pyro_metassm.posterior import posterior as posterior
from pyro_metassm.posterior import prior_predictive as prior_predictive
from pyro_metassm.recordings import Batch as Batch
from pyro_metassm.recordings import Recording as Recording
from pyro_metassm.recordings import Recordings as Recordings
from pyro_metassm.reporting import report as report
from pyro_metassm.restarts import Restarts as Restarts
from pyro_metassm.restarts import fit_restarts as fit_restarts
from pyro_metassm.result import Fit as Fit
from pyro_metassm.revising import revise as revise
from pyro_metassm.saving import load as load
from pyro_metassm.suggesting import search_objective as search_objective
from pyro_metassm.suggesting import suggest_dims as suggest_dims
from pyro_metassm.trainer import NonFiniteLossError as NonFiniteLossError
from pyro_metassm.training import fit as fit

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "plots":  # on first use: matplotlib is slow to import, and not everybody plots
        import importlib

        return importlib.import_module("pyro_metassm.plots")
    raise AttributeError(f"module 'pyro_metassm' has no attribute {name!r}")
