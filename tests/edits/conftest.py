"""The recordings that the classes of docs/edits.md fit."""

import edits_page
import pytest

import pyro_metassm as pm


@pytest.fixture(scope="module")
def recs() -> pm.Recordings:
    return edits_page.subjects()


@pytest.fixture(scope="module")
def driven() -> pm.Recordings:
    return edits_page.driven()
