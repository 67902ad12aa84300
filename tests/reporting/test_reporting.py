"""The page of a fit: what it says, from closed forms and other scores; what it is as HTML; what it leaves out."""

import copy
import json
import re
from pathlib import Path

import known_maps
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from html_pages import Page, browser, opened, row_of
from known_maps import Known, NormalForm, fit_of
from reported import FORMULA, IMAGE, NAMES, QUICK, SCRIPT, page_of, recordings

import pyro_metassm as pm
from pyro_metassm.reporting import atlas, html, mapping, places, quality, scoring
from pyro_metassm.reporting import page as pages
from pyro_metassm.reporting.album import LARGEST, Album
from pyro_metassm.reporting.asked import Told

TWO = {"slow": (1.0, 2.0), "fast": (0.6, 6.0)}  # mu and w of the normal form


@pytest.fixture(scope="module")
def written(fit, data, tmp_path_factory) -> Path:
    """A page with everything, of recordings with hostile names."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    return pm.report(fit, data[1], train=data[0], out=out, context=6, horizon=5, **QUICK)


@pytest.fixture(scope="module")
def page(written) -> Page:
    return Page(written.read_text(encoding="utf-8"))


# ---- as HTML ---------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_holds_all_that_it_shows(page, written):
    assert page.faults == [] and page.foreign() == []
    assert written.stat().st_size < LARGEST
    links = [address for address in page.of("href") if address.startswith("#")]
    assert len(links) >= 4 + len(NAMES) and {link[1:] for link in links} <= set(page.of("id"))
    assert len(set(page.of("id"))) == len(page.of("id"))
    images = page.tags.count("img")
    assert images >= 3 + 2 * len(NAMES) and len([alt for alt in page.of("alt") if alt]) == images
    (policy,) = (value for value in page.of("content") if "default-src" in value)
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert "viewport" in page.of("name") and page.of("lang") == ["en"]


def test_text_from_files_is_text(page, written):
    for name in NAMES:
        assert name in page.texts
    assert not {"script", "b", "i"} & set(page.tags)
    assert "onerror" not in {key for _, key, _ in page.attributes}
    raw = written.read_text(encoding="utf-8")
    assert SCRIPT not in raw and IMAGE not in raw


def test_letters_that_are_not_printed_are_marked():
    assert html.text("a\u202eb\x1b<") == "a\ufffdb\ufffd&lt;"


def test_the_colours_follow_the_device_and_paper(written):
    style = re.search("<style>(.*)</style>", written.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert "prefers-color-scheme: dark" in style and "@media print" in style and "max-width: 40rem" in style
    assert "url(" not in style and "@import" not in style


@pytest.mark.skipif(browser() is None, reason="no Chromium; `apt-get install chromium` has it")
def test_a_browser_opens_the_page_without_an_error(written, tmp_path):
    shown, said = opened(written, tmp_path)
    assert said == [] and 'id="recording-3"' in shown
    # The same page with a script of the test's, which the policy of the page would stop: does every picture decode,
    # and does nothing but tables and pictures, which scroll by themselves, reach beyond the width of a phone?
    text = written.read_text(encoding="utf-8")
    asked = (
        "const i = [...document.images]; document.title = JSON.stringify({images: i.length, "
        "good: i.filter(x => x.complete && x.naturalWidth > 0).length, mode: document.compatMode, "
        "over: document.documentElement.scrollWidth - window.innerWidth})"
    )
    opener = re.sub("<meta http-equiv[^>]*>", "", text).replace(
        "</body>", f"<script>onload = () => {{ {asked} }}</script></body>"
    )
    (tmp_path / "asked.html").write_text(opener, encoding="utf-8")
    shown, _ = opened(tmp_path / "asked.html", tmp_path, "--window-size=500,900")
    found = json.loads(Page(re.search("<title>.*?</title>", shown)[0].replace("title", "p")).text)
    assert found["images"] == found["good"] == Page(text).tags.count("img")
    assert found["mode"] == "CSS1Compat" and found["over"] <= 0


# ---- numbers ---------------------------------------------------------------------------------------------


def test_the_dynamics_are_those_of_the_closed_form():
    """A focus at 0 of rate mu and frequency w / 2 pi, and a cycle of period 2 pi / w that attracts at 2 mu."""
    asked = pages.ask(fit_of(NormalForm, TWO, sd=1e-6), None, None, Told(), num_draws=2)
    found = mapping.find(asked, lambda: None)
    for row, (name, (mu, w)) in zip(atlas.glance(asked, found), TWO.items(), strict=True):
        place = found.places[name]
        (focus,) = places.fixed_points(place.points)
        assert (focus["fixed point"], focus["in draws"]) == ("unstable focus", "100 %")
        values = [float(focus[key].split(" ")[0]) for key in ("slowest rate (1/s)", "its frequency (Hz)")]
        assert np.allclose(values, [mu, w / (2 * np.pi)], rtol=6e-3)  # three digits are written
        (cycle,) = places.limit_cycles(place.cycles)
        values = [float(cycle[key].split(" ")[0]) for key in list(cycle)[1:4]]
        assert cycle["limit cycle"] == "attracts"
        assert np.allclose(values, [2 * np.pi / w, np.sqrt(mu), -2 * mu], rtol=6e-3)
        assert (row["recording"], row["neurons"], row["fixed points"]) == (name, "6", "1 unstable focus")
        assert row["embedding"] == f"{mu:.2f} ± 0.00, {w:.2f} ± 0.00"
        assert float(row["period of cycle (s)"].split(" ")[0]) == values[0]


def test_the_crossing_of_a_hopf_bifurcation_is_where_mu_is_0():
    found = fit_of(NormalForm, {"a": (-0.5, 4.0), "b": (1.0, 4.0), "c": (0.5, 4.0)}, sd=1e-6)
    # The path goes along mu, through 0, as far as the farthest recording: from (-1, 0) to (1, 0), where w is 0.
    along = pm.analysis.bifurcation(found, 0, num_points=4, num_draws=1, with_cycles=False)
    (line,) = atlas.crossings(along)
    assert line.startswith("At 0.500 of the path the stability of a fixed point changes")
    stays = pm.analysis.bifurcation(found, ["b", "c"], num_points=3, num_draws=1, with_cycles=False)
    fold = along.drop_dims("fold").assign(fold=(("draw", "fold"), [[0.25]]))
    assert (
        "At 0.250 of the path two fixed points meet and end, or begin (a fold); in 100 % of the draws."
        in (atlas.crossings(fold))
    )
    assert atlas.crossings(stays) == ["No fixed point on this path changes its stability."]


def test_the_scores_are_those_of_the_metrics(page, fit, data):
    train, test = data
    kept = pm.Recordings([r.take(np.flatnonzero(r.lengths > 6)) for r in test.values()])
    draws = {"num_samples": QUICK["num_samples"], "seed": 0}
    curve = pm.metrics.forecast_r2(fit, kept, context=6, horizon=5, **draws)
    table = pm.baselines.table(fit, train, kept, context=6, horizon=5, **draws)
    rebuilt = pm.metrics.reconstruction_r2(fit, test, **draws)
    for score, values in (
        ("Forecast, R², 5 bins (0.1 s) ahead", curve.sel(horizon_step=5).values),
        ("Reconstruction, R²", rebuilt.values),
        ("Forecast, bits per spike", table.loc["fp_bps", "model"].values),
    ):
        at = page.cells.index(score)
        assert page.cells[at + 1] == str(len(values))
        mean, error = page.cells[at + 2].split(" ± ")
        assert float(mean) == pytest.approx(values.mean(), abs=6e-4)
        assert float(error) == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)), abs=6e-4)
    assert "1 trials end before that" in page.text


def test_simple_forecasts_against_plain_means(fit, data):
    train, test = data
    found = scoring.simple_forecasts(fit, train, test, context=6, horizon=5, steps=[1, 5])
    for name in test:
        rows = test[name].lengths > 6
        y = test[name].observations[rows, 6:11]
        mean = np.nanmean(train[name].observations, (0, 1))
        for k, score in ((1, "forecast_r2, 1 bin ahead"), (5, "forecast_r2, 5 bins ahead")):
            at = y[:, k - 1]
            expected = 1 - np.square(at - mean).sum() / np.square(at - at.mean(0)).sum()
            assert found[score][name]["mean rate"] == pytest.approx(expected)
            assert set(found[score][name]) == {"mean rate", "psth", "persistence"}
        bits = pm.metrics.bits_per_spike(np.broadcast_to(mean, y.shape), y)
        assert found["forecast_bits_per_spike"][name]["mean rate"] == pytest.approx(bits)
    far = scoring.simple_forecasts(fit, train, test, context=6, horizon=50, steps=[50])
    assert set(far) == {"forecast_bits_per_spike"} and set(far["forecast_bits_per_spike"]) == set(NAMES)


def test_means_and_errors_of_scores():
    of = {"a": {"fit": 0.5, "psth": 0.1}, "b": {"fit": 0.7}}
    (row,) = quality.summary({"forecast_r2, 5 bins ahead": of})
    assert row == {
        "score": "Forecast, R², 5 bins ahead",
        "recordings": "2",
        "fit": "0.600 ± 0.100",
        "psth": "0.100",
    }
    assert quality.of_recording({"co_bps": of}, "a") == [
        {"score": "Held-out neurons, bits per spike", "fit": "0.5", "psth": "0.1"}
    ]


def test_findings_of_the_data_are_on_the_page(page, data):
    with pytest.warns(UserWarning, match="only"):
        told = data[0].summary()["findings"].values
    for text in told:
        assert text and all(line in page.texts for line in text.splitlines())


def test_a_latent_that_says_nothing_is_noticed(page, fit, data, tmp_path):
    sizes = pm.analysis.variance_explained(fit, data[1], num_draws=0)["sd"].isel(draw=0)
    for name in NAMES:
        assert ", ".join(map(html.number, sizes.sel(recording=name).values)) in page.texts
    mute = copy.deepcopy(fit)
    with torch.no_grad():
        mute.model.read_out.weight[mute.model.neurons.slice(FORMULA), 1:] = 0.0
    said = "1 of 2 components of the latents move the read-out by less than 5 %"
    faint = (sizes.isel(component=1) < 0.05 * sizes.isel(component=0)).values
    assert not faint[NAMES.index(FORMULA)] and page.text.count(said) == faint.sum()
    told = page_of(mute, tmp_path, data[1])
    assert told.text.count(said) == faint.sum() + 1 and told.faults == []


# ---- models that lack something --------------------------------------------------------------------------


class Heavy(Known):
    """A transition without a mean."""

    def transition(self, z, dynamics):
        return dist.Cauchy(z, 0.1).to_event(1)


class Decay(Known):
    @staticmethod
    def step(z, e):
        return 0.8 * z + 0.0 * e[0].unsqueeze(-1)


def test_a_model_without_mean_dynamics_has_a_page_without_a_map(tmp_path):
    page = page_of(fit_of(Heavy, {"a": (0.1,), "b": (0.2,)}), tmp_path)
    assert "No map of the dynamics" in page.text and "needed a transition with a mean" in page.text
    assert page.tags.count("img") == 1 and page.faults == []  # the embeddings


def test_a_single_latent_and_shared_dynamics(tmp_path):
    page = page_of(fit_of(Decay, {"a": (0.1,), "b": (0.2,)}, latent_dim=1), tmp_path)
    assert (
        "a single latent has no plane" in page.text
        and "all recordings have the same dynamics" in page.text.lower()
    )
    rate = np.log(0.8) / known_maps.WIDTH
    assert row_of(page, "stable node", 3)[2] == f"{rate:.3g}" and page.faults == []


@pytest.mark.slow
def test_one_recording_of_sixteen_latents_is_seen_in_its_principal_plane(tmp_path):
    page = page_of(fit_of(Decay, {"a": (0.1, 0.0)}, latent_dim=16), tmp_path)
    assert [alt for alt in page.of("alt") if alt.startswith("Flow of a")] and page.faults == []
    assert row_of(page, "stable node", 2)[1].count(",") == 6  # six of them and an ellipsis
    assert "a path needs two recordings or more" in page.text


# ---- bad input -------------------------------------------------------------------------------------------


def test_data_that_are_not_the_fits(fit, data, tmp_path):
    out, (train, test) = tmp_path / "r.html", data
    other = recordings(("new",))
    narrow = pm.Recordings([pm.Recording(SCRIPT, np.ones((3, 9, 2)), bin_width=0.02)])
    wide = pm.Recordings([pm.Recording(SCRIPT, np.ones((3, 9, 3)), bin_width=0.04)])
    real = pm.Recordings([pm.Recording(SCRIPT, np.full((3, 9, 3), 0.5), bin_width=0.02)])
    for recs, said in ((other, "new"), (narrow, "3"), (wide, "0.02 s.*0.04 s"), (real, "counts")):
        with pytest.raises(ValueError, match=said):
            pm.report(fit, recs, out=out, **QUICK)
    with pytest.raises(ValueError, match="training trials of all recordings"):
        pm.report(fit, test, train=train.select([IMAGE]), out=out, **QUICK)
    with pytest.raises(ValueError, match="num_samples"):
        pm.report(fit, test, out=out, **QUICK | {"num_samples": 1})
    assert not out.exists()


def test_files_that_cannot_be_written(fit, tmp_path):
    with pytest.raises(IsADirectoryError, match="got a folder"):
        pm.report(fit, out=tmp_path, **QUICK)
    with pytest.raises(FileNotFoundError, match="needed a folder that is there"):
        pm.report(fit, out=tmp_path / "none" / "r.html", **QUICK)


def test_a_page_has_no_more_pictures_than_there_is_room_for():
    own = Album(1)
    draw = lambda figure: figure.subplots().plot([0, 1])
    made = own.picture(draw, (2, 2), "a", "b")
    assert made.count("data:image/png;base64,") == 1
    own.room = len(made) + 1
    assert own.picture(draw, (2, 2), "a", "b") == made and own.left_out == 0
    assert own.picture(draw, (2, 2), "a", "b") == "" and own.left_out == 1
