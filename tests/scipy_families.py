"""Every family of observations, and the distribution of scipy.stats that it is."""

import inspect

import numpy as np
import scipy.special
import scipy.stats
import torch
from problems import kind_of

from pyro_metassm import likelihoods
from pyro_metassm.neurons import NeuronTable

FAMILIES = [
    family
    for name, family in vars(likelihoods).items()
    if inspect.isclass(family)
    and issubclass(family, likelihoods.Likelihood)
    and not (name.startswith("_") or inspect.isabstract(family))
]
COUNTS = [family for family in FAMILIES if kind_of(family) in ("counts", "binary")]


def gaussian(family, predictor, rows):
    return scipy.stats.norm(predictor, np.exp(family.log_sd.detach().numpy()[rows]))


def rate_of(family, predictor, rows):
    """The saturating link in another form: 1 / rate = exp(-predictor) + 1 / ceiling."""
    return 1 / (np.exp(-predictor) + np.exp(-family.log_ceiling.numpy()[rows]))


def poisson(family, predictor, rows):
    return scipy.stats.poisson(rate_of(family, predictor, rows))


def negative_binomial(family, predictor, rows):
    r, rate = np.exp(family.log_dispersion.detach().numpy()[rows]), rate_of(family, predictor, rows)
    return scipy.stats.nbinom(r, r / (r + rate))


class ZeroInflated:
    """Zero with probability ``g``, else a draw of a frozen distribution of scipy."""

    def __init__(self, g, base):
        self.g, self.base = g, base

    def logpmf(self, y):
        return np.log(self.g * (y == 0) + (1 - self.g) * self.base.pmf(y))

    def logpdf(self, y):
        with np.errstate(divide="ignore"):
            return np.where(y == 0, np.log(self.g), np.log1p(-self.g) + self.base.logpdf(y))

    def mean(self):
        return (1 - self.g) * self.base.mean()

    def stats(self, _):
        """Mean, variance and excess kurtosis from the raw moments."""
        m, v, skew, kurtosis = self.base.stats("mvsk")
        raw = [m, v + m**2, skew * v**1.5 + 3 * m * v + m**3]
        raw.append((kurtosis + 3) * v**2 + 4 * m * skew * v**1.5 + 6 * m**2 * v + m**4)
        a, b, c, d = ((1 - self.g) * moment for moment in raw)
        var = b - a**2
        return a, var, (d - 4 * a * c + 6 * a**2 * b - 3 * a**4) / var**2 - 3


def row(family, name, rows):
    return getattr(family, name).detach().numpy()[rows]


def zero_inflated_poisson(family, predictor, rows):
    gate = scipy.special.expit(row(family, "gate", rows))
    return ZeroInflated(gate, poisson(family, predictor, rows))


def softplus_poisson(family, predictor, rows):
    return scipy.stats.poisson(np.log1p(np.exp(predictor)))


def bernoulli(family, predictor, rows):
    return scipy.stats.bernoulli(scipy.special.expit(predictor))


def binomial(family, predictor, rows):
    return scipy.stats.binom(row(family, "total_count", rows), scipy.special.expit(predictor))


def student_t(family, predictor, rows):
    df, scale = 2 + np.exp(row(family, "log_df", rows)), np.exp(row(family, "log_scale", rows))
    return scipy.stats.t(df, predictor, scale)


def log_normal(family, predictor, rows):
    return scipy.stats.lognorm(np.exp(row(family, "log_sd", rows)), scale=np.exp(predictor))


def gamma(family, predictor, rows):
    """The link in another form: ``floor + 1 / (exp(-predictor) + 1 / ceiling)``."""
    mean = np.exp(row(family, "log_floor", rows)) + rate_of(family, predictor, rows)
    shape = np.exp(row(family, "log_shape", rows))
    return scipy.stats.gamma(shape, scale=mean / shape)


def zero_inflated_gamma(family, predictor, rows):
    gate = row(family, "gate", rows) - row(family, "slope", rows) * predictor
    return ZeroInflated(scipy.special.expit(gate), gamma(family, predictor, rows))


ORACLES = {
    likelihoods.Gaussian: gaussian,
    likelihoods.Poisson: poisson,
    likelihoods.NegativeBinomial: negative_binomial,
    likelihoods.SoftplusPoisson: softplus_poisson,
    likelihoods.ZeroInflatedPoisson: zero_inflated_poisson,
    likelihoods.Bernoulli: bernoulli,
    likelihoods.Binomial: binomial,
    likelihoods.StudentT: student_t,
    likelihoods.LogNormal: log_normal,
    likelihoods.Gamma: gamma,
    likelihoods.ZeroInflatedGamma: zero_inflated_gamma,
}


def started(family, recs):
    """A family in float64, its parameters random."""
    torch.manual_seed(0)
    made = family(NeuronTable.of(recs)).double()
    made.start(recs)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return made
