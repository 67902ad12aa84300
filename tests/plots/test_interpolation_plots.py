"""Grids of embeddings, by what is drawn."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from drawn_maps import BIN, RNG, texts

from pyro_metassm import plots


def grid(num_draws=4, rows=3) -> xr.Dataset:
    time = np.arange(6) * BIN
    e = np.zeros((num_draws, rows, 3, 2)) + 0.01 * RNG.normal(size=(num_draws, 1, 1, 2))
    e[..., 0] += [-0.5, 0.0, 0.5]
    e[..., 1] += 0.25 * (np.arange(rows) - rows // 2)[:, None]
    latents = np.stack([time / BIN * (1 + e[..., :1]), time / BIN + 10 * e[..., 1:]], -1)
    rates = np.stack([latents[..., 0] * k for k in (0.0, 3.0, 1.0, 2.0)], -1)
    lead = ("draw", "row", "column")
    return xr.Dataset(
        {
            "embedding": ((*lead, "embedding_dim"), e),
            "latents": ((*lead, "time", "latent_dim"), latents),
            "rates": ((*lead, "time", "neuron"), rates),
        },
        coords={"time": ("time", time)},
        attrs={"plane": [0, 1] if rows > 1 else [0], "radius": 1.0, "recording": "a"},
    )


def test_a_grid_of_trajectories_lies_as_the_embeddings_do():
    found = grid()
    panels = plots.interpolation_grid(found)
    assert panels.shape == (3, 3)
    for row, column in np.ndindex(3, 3):
        drawn = panels[2 - row, column].lines  # upwards on paper
        of = found["latents"].isel(row=row, column=column).values
        assert len(drawn) == 4 + 2
        away = np.linalg.norm(of - np.median(of, 0), axis=-1).mean(1)
        central = of[away.argmin()]
        np.testing.assert_allclose(drawn[4].get_xydata(), central)
        np.testing.assert_allclose(drawn[1].get_xydata(), of[1])
        np.testing.assert_allclose(drawn[5].get_xydata()[0], central[0])
    assert [ax.get_title() for ax in panels[0]] == ["$e_1$ -0.50", "$e_1$ +0.00", "$e_1$ +0.50"]
    assert [texts(ax.texts)[0] for ax in panels[:, 2]] == ["$e_2$ +0.25", "$e_2$ +0.00", "$e_2$ -0.25"]
    widths = np.array([[ax.spines["left"].get_linewidth() for ax in row] for row in panels])
    assert widths[1, 1] > 2 * np.delete(widths.ravel(), 4).max()
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in panels.ravel()}) == 1
    assert [ax.get_xlabel() for ax in panels[2]] == ["latent 1"] * 3 and not panels[0, 0].get_xlabel()
    assert plots.interpolation_grid(grid(rows=1)).shape == (1, 3)


def test_a_panel_that_explodes_leaves_the_others_readable():
    found = grid()
    found["latents"][:, 2, 2] = found["latents"][:, 2, 2] * 1e5
    panels = plots.interpolation_grid(found)
    assert panels[0, 0].get_xlim()[1] < 20
    usual = found["latents"].mean("draw").values[:2]
    assert (
        panels[0, 0].get_xlim()[0] <= usual[..., 0].min()
        and panels[0, 0].get_xlim()[1] >= usual[..., 0].max()
    )


def test_a_few_draws_that_explode_leave_the_bold_line_where_most_are():
    found = grid()
    usual = plots.interpolation_grid(found)[0, 0].lines[4].get_xydata()
    spread = np.ptp(found["latents"].isel(row=2, column=0).values, axis=0)
    found["latents"][0] = found["latents"][0] + 1e6
    moved = plots.interpolation_grid(found)[0, 0].lines[4].get_xydata()
    assert (np.abs(moved - usual) <= spread + 1e-9).all()


def test_a_grid_of_rates_over_time():
    found = grid()
    panels = plots.interpolation_grid(found, of="rates")
    corner = panels[0, 2]  # the third column and row of the grid
    # 0 is constant.
    assert [line.get_label() for line in corner.lines] == [
        "neuron 1",
        "neuron 2",
        "neuron 3",
    ]
    assert len({line.get_linestyle() for line in corner.lines}) == 3
    of = found["rates"].isel(row=2, column=2).values
    np.testing.assert_allclose(corner.lines[1].get_ydata(), np.median(of[..., 2], 0))
    np.testing.assert_allclose(corner.lines[1].get_xdata(), found["time"])
    band = corner.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(np.quantile(of[:, -1, 1], 0.95))
    assert panels[2, 0].get_xlabel() == "time (s)" and panels[2, 0].get_ylabel() == "rate (per bin)"
    assert sum(ax.get_legend() is not None for ax in panels.ravel()) == 1
    chosen = plots.interpolation_grid(found, of="rates", which=[3])
    assert [line.get_label() for line in chosen[0, 0].lines] == ["neuron 3"]
    named = plots.interpolation_grid(found, of="rates", which=[3, 0], names=["M1", "PMd"])
    assert [line.get_label() for line in named[0, 0].lines] == ["M1", "PMd"]
    with pytest.raises(ValueError, match="needed 2 names, one for each neuron that is drawn, got 1"):
        plots.interpolation_grid(found, of="rates", which=[3, 0], names=["M1"])


def test_grids_draw_into_the_axes_given_and_refuse_what_is_none():
    found = grid()
    mine = plt.subplots(3, 3)[1]
    number = len(plt.get_fignums())
    assert (plots.interpolation_grid(found, mine) == mine).all() and len(plt.get_fignums()) == number
    with pytest.raises(ValueError, match="needed 3 x 3 axes, got 2"):
        plots.interpolation_grid(found, plt.subplots(1, 2)[1])
    with pytest.raises(ValueError, match="with decoded, got one of embedding, latents, rates"):
        plots.interpolation_grid(found, of="decoded")
    with pytest.raises(ValueError, match="positions below 4, got 4"):
        plots.interpolation_grid(found, of="rates", which=[0, 4])
    with pytest.raises(ValueError, match="needed of="):
        plots.interpolation_grid(found, of="speed")
    with pytest.raises(ValueError, match="plane of two of the 2 latents"):
        plots.interpolation_grid(found, plane=(0, 2))
