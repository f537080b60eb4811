"""Cached and padded computation against the whole sequence at once."""

import pytest
import torch

from mm_train.model import MobileMoE


@pytest.fixture
def model(small_model):
    model = MobileMoE(small_model).eval()
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():  # attention that is not nearly uniform
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pieces", [[30], [1] * 30, [17, 1, 1, 11], [1, 29]])
@torch.no_grad()
def test_pieces_give_what_the_whole_gives(model, tokens, pieces):
    cache = model.new_cache(2, 40)
    got = torch.cat([model.hidden(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    assert cache.length == 30
    torch.testing.assert_close(got, model.hidden(tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_left_padding_changes_nothing(model, tokens):
    short, padding = tokens[1, :18], 12
    both = torch.stack([tokens[0], torch.cat([torch.zeros(padding, dtype=torch.long), short])])
    cache = model.new_cache(2, 40, [0, padding])
    first, second = model.hidden(both[:, :25], cache), model.hidden(both[:, 25:], cache)
    got = torch.cat([first, second], 1)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[0], model.hidden(tokens[:1])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1, padding:], model.hidden(short[None])[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_columns_can_be_forgotten_and_rows_dropped(model, tokens):
    cache = model.new_cache(2, 40)
    model.hidden(tokens, cache)
    cache.rewind(20)
    cache.keep_rows([1])
    got = model.hidden(tokens[1:, 20:], cache)
    torch.testing.assert_close(got, model.hidden(tokens)[1:, 20:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_beginning_that_all_rows_share_is_computed_once(model, tokens):
    prefix = model.new_cache(1, 10)
    model.hidden(tokens[:1, :10], prefix)
    rests, padding = [tokens[0, 10:25], tokens[1, 10:22]], [0, 3]
    cache = model.new_cache(2, 40, padding)
    cache.begin_with(prefix)
    padded = torch.stack(
        [torch.cat([torch.zeros(pad, dtype=torch.long), rest]) for pad, rest in zip(padding, rests, strict=True)]
    )
    got = torch.cat([model.hidden(padded[:, :14], cache), model.hidden(padded[:, 14:], cache)], 1)
    for row, (pad, rest) in enumerate(zip(padding, rests, strict=True)):
        whole = model.hidden(torch.cat([tokens[0, :10], rest])[None])[0, 10:]
        torch.testing.assert_close(got[row, pad:], whole, rtol=1e-4, atol=1e-5)
    assert prefix.length == 10


@torch.no_grad()
def test_rows_move_only_from_the_end_when_others_are_dropped(model):
    tokens = torch.randint(0, 512, (5, 12), generator=torch.Generator().manual_seed(1))
    prefix = model.new_cache(1, 6)
    model.hidden(tokens[:1, :6], prefix)
    cache = model.new_cache(5, 10, [0, 1, 0, 0, 2])
    cache.begin_with(prefix)
    model.hidden(tokens[:, 6:10], cache)
    assert cache.keep_rows([1, 2, 4]) == [4, 1, 2]
    assert cache.keep_rows([0, 1]) == [0, 1]
    got = model.hidden(tokens[[4, 1], 10:], cache)
    for place, (row, padding) in enumerate(((4, 2), (1, 1))):
        whole = torch.cat([tokens[0, :6], tokens[row, 6 + padding :]])
        torch.testing.assert_close(got[place], model.hidden(whole[None])[0, -2:], rtol=1e-4, atol=1e-5)
    assert prefix.length == 6
