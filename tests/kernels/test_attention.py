import pytest
import torch
import torch.nn.functional as F

from kernels.attention import (
    Lengths,
    attends_by_lengths,
    attention_after_prefix,
    document_attention,
    document_attention_reference,
)


def packed(dtype=torch.float32, device="cpu"):
    """q, k, v of 2 rows of 40 tokens in documents of several lengths, one of them empty, and the mask that says so."""
    torch.manual_seed(0)
    ends = torch.tensor([0, 17, 17, 40, 41, 80], dtype=torch.int32)
    tensors = [torch.randn(80, 4, 16).to(device, dtype).requires_grad_() for _ in range(3)]
    document = torch.arange(5).repeat_interleave(ends.diff())
    mask = (document[:, None] == document[None, :]).tril().to(device)
    return tensors, Lengths(ends.to(device), 39), mask


def by_mask(q, k, v, mask):
    """The whole batch as one row."""
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def with_gradients(out, tensors):
    out.float().square().sum().backward()
    return [out, *(t.grad for t in tensors)]


def test_documents_one_by_one_are_what_a_mask_lets_through():
    tensors, lengths, _ = packed()
    got = with_gradients(document_attention(*tensors, lengths), tensors)
    tensors, _, mask = packed()
    for a, b in zip(got, with_gradients(by_mask(*tensors, mask), tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_a_cpu_and_float32_take_the_mask():
    assert not attends_by_lengths(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.gpu
def test_flash_attention_by_lengths_agrees_with_the_reference(device):
    tensors, lengths, _ = packed(torch.bfloat16, device)
    assert attends_by_lengths(tensors[0])
    got = with_gradients(document_attention(*tensors, lengths), tensors)
    wide = [t.detach().float().requires_grad_() for t in tensors]
    for a, b in zip(got, with_gradients(document_attention_reference(*wide, lengths), wide), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2**-6, atol=2**-6 * b.abs().max().item())


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("masked", ["none", "bool", "additive"])
@torch.no_grad()
def test_rows_that_begin_alike_see_their_beginning(columns, masked):
    """Against one long row each; with fewer key-value heads than heads, and rows that are padded on the left."""
    torch.manual_seed(0)
    rows, heads, groups, width, own, prefix = 3, 4, 2, 16, 7, 11
    q = torch.randn(rows, heads, columns, width)
    k, v = torch.randn(2, rows, groups, own, width)
    k_first, v_first = torch.randn(2, 1, groups, prefix, width)
    mask = None
    padding = torch.tensor([0, 2, 3]) if masked != "none" else torch.zeros(3, dtype=torch.long)
    if masked != "none":
        place = torch.arange(own)
        seen = (place <= place[-columns:, None]) & (place >= padding[:, None, None])
        mask = seen[:, None] if masked == "bool" else torch.zeros(()).where(seen, -torch.inf)[:, None]
    got = attention_after_prefix(q, k, v, k_first, v_first, mask)
    for row in range(rows):
        pad = int(padding[row])
        keys, values = (
            torch.cat([first[0], mine[row, :, pad:]], 1).repeat_interleave(heads // groups, 0)
            for first, mine in ((k_first, k), (v_first, v))
        )
        size = keys.shape[1]
        place = torch.arange(size)
        causal = place <= place[-columns:, None]
        want = F.scaled_dot_product_attention(q[row], keys, values, attn_mask=causal)
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-6)
