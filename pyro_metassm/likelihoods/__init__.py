"""Families of observations: from the predictor of every neuron, ``z C_i + d_i``, to a distribution.

A family is a small module made from the table of neurons. ``forward(predictor, recording)`` returns the distribution
of every neuron and bin (no event dimension: the model adds masks, plates and events) or a joint one over the neurons of
a bin. Parameters of neurons (noise, dispersion) are rows of the table. Another likelihood is a subclass, or an override
of ``MetaSSM.likelihood``; :class:`Mixed` gives every recording, or every neuron, a family of its own.
"""

from pyro_metassm.likelihoods.base import Likelihood as Likelihood
from pyro_metassm.likelihoods.counts import Bernoulli as Bernoulli
from pyro_metassm.likelihoods.counts import Binomial as Binomial
from pyro_metassm.likelihoods.counts import NegativeBinomial as NegativeBinomial
from pyro_metassm.likelihoods.counts import Poisson as Poisson
from pyro_metassm.likelihoods.counts import SoftplusPoisson as SoftplusPoisson
from pyro_metassm.likelihoods.counts import ZeroInflatedPoisson as ZeroInflatedPoisson
from pyro_metassm.likelihoods.mixed import Mixed as Mixed
from pyro_metassm.likelihoods.positive import Gamma as Gamma
from pyro_metassm.likelihoods.positive import LogNormal as LogNormal
from pyro_metassm.likelihoods.positive import ZeroInflatedGamma as ZeroInflatedGamma
from pyro_metassm.likelihoods.real import Gaussian as Gaussian
from pyro_metassm.likelihoods.real import LowRankGaussian as LowRankGaussian
from pyro_metassm.likelihoods.real import StudentT as StudentT
