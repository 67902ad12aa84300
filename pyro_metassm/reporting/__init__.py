"""A fit as one HTML page that holds all that it shows (`pyro_metassm.report`)."""

from pyro_metassm.reporting.page import report as report
