"""The kernels' shapes are those of the model files."""

import math

import pytest

from kernels.sizes import SCALE, SIZES, sizes_named
from mm_train import config, rules


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_that_of_the_model_file(name):
    model = config.load_words([f"configs/model/{name}.yaml"], check=rules.validate_training).model
    assert SIZES[name] == (
        model.hidden_size,
        model.intermediate_size,
        model.num_local_experts,
        model.num_experts_per_tok,
        model.vocab_size,
    )
    assert model.routed_scaling_factor == SCALE


@pytest.mark.parametrize("tokens", [1, 100, 8192])
def test_capacity_is_that_of_the_dispatcher(tokens):
    assert SIZES["s"].capacity(tokens) == math.ceil(1.5 * tokens * 4 / 60)


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="no size 'xl'; sizes are tiny, s, m, l"):
        sizes_named("s,xl")
