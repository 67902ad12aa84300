"""The edits that docs/edits.md shows: they run, and their sites have the densities that they say."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy import stats

import pyro_metassm as pm
from pyro_metassm.elbo import SequentialELBO

PAGE = Path(__file__).parents[1] / "docs" / "edits.md"
