"""Scores by formulas of their own, which the tests compare with."""

import scipy.integrate
import scipy.special
import scipy.stats


def mean_r2(y, prediction):
    return float((1 - ((y - prediction) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)).mean())


def crps_of_poisson(rate, y):
    """Closed form (Wei and Held, 2014): (y - m)(2 F(y) - 1) + 2 m f(y) - m exp(-2m) (I0(2m) + I1(2m))."""
    p = scipy.stats.poisson(rate)
    bessel = scipy.special.ive(0, 2 * rate) + scipy.special.ive(1, 2 * rate)
    return (y - rate) * (2 * p.cdf(y) - 1) + 2 * rate * p.pmf(y) - rate * bessel
