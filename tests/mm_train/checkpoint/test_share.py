import pytest
import torch

from mm_train.checkpoint import share
from mm_train.checkpoint.share import Staging, share_of
from mm_train.parallel.groups import Groups
from tests.mm_train.checkpoint.layouts import engines, random_state, world


def test_a_share_is_described_as_it_lies_in_the_file(small_model):
    state = random_state(small_model)
    groups = world(ep=2, tp=2, replicas=2)
    shares = [share_of(e, small_model, g) for e, g in zip(engines(small_model, state, groups), groups, strict=True)]
    for mine in shares:
        assert [v.length for v in mine.vectors] == [t.numel() for t in mine.tensors]
        assert len({v.key for v in mine.vectors}) == len(mine.vectors)
        kinds = [v.key.split("/")[0] for v in mine.vectors]
        assert kinds == sorted(kinds, key=["weight", "exp_avg", "exp_avg_sq", "rng"].index)
    stored = sum(part.stop - part.start for mine in shares for part in mine.parts)
    assert stored == sum(tensor.numel() for tensor in state["weight"].values())
    assert [any(part.name.endswith("expert_bias") for part in mine.parts) for mine in shares] == [True] + 7 * [False]
    assert [mine.vectors[-1].key == "rng/torch" for mine in shares] == [True] + 7 * [False]


def test_several_fragments_of_one_tensor_have_keys_of_their_own(engine, small_model):
    from mm_train.engine import Fragment

    name = "model.embed_tokens.weight"
    rest = [fragment for fragment in engine.fragments() if fragment.name != name]
    engine.fragments = lambda: [Fragment(name, 0, 100), Fragment(name, 100, 512 * 64), *rest]
    keys = [part.key for part in share_of(engine, small_model, Groups()).parts if part.name == name]
    assert keys == [name, f"{name}@100"]


@pytest.mark.parametrize("segment", [1, 7, 64, 1 << 20])
def test_a_copy_is_what_was_there_whatever_happens_later(monkeypatch, segment):
    monkeypatch.setattr(share, "SEGMENT", segment)
    staging = Staging()
    for sizes in ([5, 0, 20, 1], [3, 3], [30, 9]):  # less, then more, than at first
        tensors = [torch.randn(size) for size in sizes] + [torch.arange(4, dtype=torch.uint8)]
        want = b"".join(tensor.numpy().tobytes() for tensor in tensors)
        buffers = staging.copy(tensors)
        for tensor in tensors[:-1]:
            tensor.zero_()
        assert b"".join(buffers) == want


def test_memory_is_taken_once():
    staging = Staging()
    tensors = [torch.randn(100), torch.randn(50)]
    staging.reserve(tensors)
    (segment,) = staging._segments
    staging.copy(tensors)
    staging.copy(tensors[:1])
    staging.copy(tensors)
    assert staging._segments[0] is segment


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_gpu_are_copied_by_way_of_pinned_memory(monkeypatch):
    monkeypatch.setattr(share, "SEGMENT", 1000)
    tensors = [torch.randn(size, device="cuda") for size in (900, 3000, 7)]
    want = b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)
    staging = Staging()
    buffers = staging.copy(tensors)
    for tensor in tensors:
        tensor.zero_()
    torch.cuda.synchronize()
    assert b"".join(buffers) == want
    assert all(segment.is_pinned() for segment in staging._segments)
