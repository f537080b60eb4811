import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_train.checkpoint.boxes import blocks, intersection, relative
from mm_train.sharding import Box

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def boxes_in(draw, shape):
    low = [draw(st.integers(0, n - 1)) for n in shape]
    return Box(tuple(low), tuple(draw(st.integers(1, n - a)) for a, n in zip(low, shape, strict=True)))


@given(st.data())
def test_the_blocks_of_a_range_hold_its_elements_in_order(data):
    whole = data.draw(shapes)
    box = data.draw(boxes_in(whole))
    start = data.draw(st.integers(0, box.size))
    stop = data.draw(st.integers(start, box.size))
    tensor = torch.arange(math.prod(whole)).view(whole)
    found = blocks(box, start, stop)
    assert len(found) <= 2 * len(whole) - 1
    assert [offset for offset, _ in found] == [sum(b.size for _, b in found[:i]) for i in range(len(found))]
    elements = [tensor[block.slices].reshape(-1) for _, block in found]
    want = tensor[box.slices].reshape(-1)[start:stop]
    assert torch.equal(torch.cat(elements) if elements else want[:0], want)


@given(st.data())
def test_an_intersection_is_what_both_hold(data):
    whole = data.draw(shapes)
    a, b = data.draw(boxes_in(whole)), data.draw(boxes_in(whole))
    counts = torch.zeros(whole, dtype=torch.int)
    counts[a.slices] += 1
    counts[b.slices] += 1
    both = intersection(a, b)
    assert (counts == 2).sum() == (both.size if both else 0)
    if both:
        assert (counts[both.slices] == 2).all()
        assert (counts[a.slices][relative(both, a)] == 2).all()
