"""Equation (1) against values of the paper, its reduced form, and files."""

import json

import numpy as np
import pytest

from mm_train.cli import UserError
from mm_train.scaling_law.law import PUBLISHED, SCHEMA, effective_expansion, law_to_json, load_law


def test_the_published_losses():
    said = PUBLISHED.loss(0.5e9, 100e9, [1, 2, 4, 8, 16, 32])
    assert said == pytest.approx([2.401, 2.367, 2.349, 2.342, 2.341, 2.343], abs=6e-4)


def test_effective_expansion_starts_at_one_and_saturates():
    assert effective_expansion(1) == pytest.approx(1)
    values = effective_expansion(np.array([1, 2, 8, 32, 1e9]))
    assert (np.diff(values) > 0).all()
    assert values[-1] == pytest.approx(32, rel=1e-6)
    assert effective_expansion(1, e_start=3) == pytest.approx(3)


@pytest.mark.parametrize("expansion", [1, 3, 8, 32])
def test_the_reduced_form_is_the_law_at_one_expansion(expansion):
    k = PUBLISHED.reduced(expansion)
    n, d = np.meshgrid([0.27, 0.9], [100, 450])
    assert k.A * n**k.alpha + k.B * d**k.beta + k.c == pytest.approx(PUBLISHED.loss(n * 1e9, d * 1e9, expansion))


def test_e_8_is_within_six_thousandths_of_the_best_everywhere_in_range_and_not_at_6_t():
    n, d, e = np.meshgrid(np.linspace(0.3e9, 0.9e9, 9), np.linspace(100e9, 500e9, 9), [1, 2, 4, 8, 16, 32])
    losses = PUBLISHED.loss(n, d, e)
    assert (losses[..., 3] - losses.min(-1)).max() < 0.006
    assert PUBLISHED.loss(0.9e9, 6e12, 1) - PUBLISHED.loss(0.9e9, 6e12, 8) == pytest.approx(-0.007, abs=5e-4)


def test_a_law_survives_its_file(tmp_path):
    path = tmp_path / "law.json"
    path.write_text(json.dumps({"schema": SCHEMA, "form": "joint", "fits": [law_to_json(PUBLISHED)]}))
    assert load_law(str(path)) == PUBLISHED


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot read the law"),
        ("[]", "its schema is not"),
        (json.dumps({"schema": SCHEMA, "form": "fixed-e"}), "needs the joint one"),
        (json.dumps({"schema": SCHEMA, "form": "joint", "fits": []}), "missing or wrong"),
        (
            json.dumps({"schema": SCHEMA, "form": "joint", "fits": [law_to_json(PUBLISHED) | {"unit": 0}]}),
            "not positive",
        ),
    ],
)
def test_a_file_that_is_no_law_is_refused(tmp_path, content, says):
    path = tmp_path / "law.json"
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        load_law(str(path))


def test_a_missing_file_is_refused():
    with pytest.raises(UserError, match="cannot read the law"):
        load_law("nowhere.json")
