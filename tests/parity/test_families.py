"""Every family against transformers itself, live; needs the `parity` extra (`make parity`)."""

from __future__ import annotations

import pytest

from mtj_loader.formats import hf_config
from mtj_loader.models import family
from tests.parity import harness
from tests.parity.cases import CASES, NAMES

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=NAMES, ids="-".join)
def pair(request, tmp_path_factory) -> harness.Pair:
    return harness.make_pair(*request.param, tmp_path_factory.mktemp("pair"))


def test_logits(pair: harness.Pair):
    harness.check_logits(pair)


def test_two_axes(pair: harness.Pair):
    harness.check_two_axes(pair)


def test_greedy_text(pair: harness.Pair):
    harness.check_greedy(pair)


# Classes whose defaults do not describe a valid model; see each family's file.
_NO_DEFAULT_MODEL: set[str] = set()


@pytest.mark.parametrize("model_type", sorted(CASES.keys() - _NO_DEFAULT_MODEL))
def test_defaults_are_those_of_transformers(model_type: str):
    """An empty config means the same as the config that transformers fills in."""
    transformers = pytest.importorskip("transformers")
    full = transformers.AutoConfig.for_model(model_type).to_dict()
    least, most = (
        family(model_type).Config.read(
            hf_config.normalize(config, file="config.json"), file="config.json"
        )
        for config in ({"model_type": model_type}, full)
    )
    assert least == most
