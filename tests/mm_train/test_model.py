"""The network against a second, slow implementation written from the specification alone."""

import dataclasses
import math

import pytest
import torch

from kernels.attention import Lengths
from kernels.cross_entropy import IGNORE
from mm_train import config, inventory
from mm_train.model import MobileMoE, rope_frequencies

VARIANTS = {  # the networks that the paper compares with
    "mobilemoe": {},
    "dense": {"num_local_experts": 0, "num_experts_per_tok": 0},
    "coarse": {"num_experts_per_tok": 1, "intermediate_size": 128, "norm_topk_prob": False},
    "no shared expert": {"intermediate_size_mlp": 0},
    "softmax": {"scoring_func": "softmax", "routed_scaling_factor": 1.0},
}


@pytest.fixture
def model(small_model):
    return build(small_model)


def build(small_model, **changes):
    """A network in which every term of the specification shows."""
    scaling = config.RopeScaling(original_max_position_embeddings=64)
    shape = dataclasses.replace(small_model, rope_scaling=scaling, max_position_embeddings=256, **changes)
    model = MobileMoE(shape)
    model.init_weights(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that every term shows
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 1) + (parameter.ndim == 1))
        for layer in model.moe_layers():
            layer.expert_bias.copy_(torch.randn(shape.num_local_experts) * 0.2)
    return model.eval()


def by_the_specification(state, shape: config.Model, tokens):
    """Logits of one row, token by token and expert by expert, float64. Section 2 of the model's description."""
    p = {name: tensor.double() for name, tensor in state.items()}
    heads, kv, width = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim

    def norm(x, weight=1.0):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + shape.rms_norm_eps) * weight

    def rotate(x, position):
        out = x.clone()
        for i in range(width // 2):
            f = shape.rope_theta ** (-2 * i / width)
            scaling = shape.rope_scaling
            if scaling and 2 * math.pi / f > scaling.original_max_position_embeddings:
                f /= scaling.factor
            c, s = math.cos(position * f), math.sin(position * f)
            out[2 * i], out[2 * i + 1] = x[2 * i] * c - x[2 * i + 1] * s, x[2 * i] * s + x[2 * i + 1] * c
        return out

    def silu(x):
        return x * torch.sigmoid(x)

    x = p["model.embed_tokens.weight"][tokens]
    for n in range(shape.num_hidden_layers):
        at = f"model.layers.{n}."
        h = norm(x, p[at + "input_layernorm.weight"])
        q, k, v = ((h @ p[f"{at}self_attn.{c}_proj.weight"].T).view(len(tokens), -1, width) for c in "qkv")
        keys = torch.stack([torch.stack([rotate(norm(k[u, g]), u) for g in range(kv)]) for u in range(len(tokens))])
        out = torch.zeros(len(tokens), heads, width, dtype=torch.float64)
        for t in range(len(tokens)):
            for head in range(heads):
                group = head // (heads // kv)
                scores = keys[: t + 1, group] @ rotate(norm(q[t, head]), t) / math.sqrt(width)
                out[t, head] = torch.softmax(scores, 0) @ v[: t + 1, group]
        x = x + out.flatten(1) @ p[at + "self_attn.o_proj.weight"].T
        h = norm(x, p[at + "post_attention_layernorm.weight"])
        ff = at + "feed_forward."
        shared = ff + "shared_expert." if shape.num_local_experts else ff
        y = torch.zeros_like(h)
        if shape.intermediate_size_mlp:
            y = silu(h @ p[shared + "gate_proj.weight"].T) * (h @ p[shared + "up_proj.weight"].T)
            y = y @ p[shared + "down_proj.weight"].T
        for t in range(len(tokens) if shape.num_local_experts else 0):
            scores = p[ff + "router.weight"] @ h[t]
            scores = torch.sigmoid(scores) if shape.scoring_func == "sigmoid" else torch.softmax(scores, 0)
            chosen = sorted(range(len(scores)), key=lambda e: -(scores[e] + p[ff + "expert_bias"][e]).item())
            chosen = chosen[: shape.num_experts_per_tok]
            total = sum(scores[e] for e in chosen) + 1e-20 if shape.norm_topk_prob else 1
            for e in chosen:
                gate, up = (h[t] @ p[ff + "experts.gate_up_proj"][e]).split(shape.intermediate_size)
                weight = scores[e] / total * shape.routed_scaling_factor
                y[t] += weight * ((silu(gate) * up) @ p[ff + "experts.down_proj"][e])
        x = x + y
    return norm(x, p["model.norm.weight"]) @ p["model.embed_tokens.weight"].T


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_the_specification(small_model, changes):
    model = build(small_model, **changes)
    tokens = torch.randint(0, 512, (1, 40))
    want = by_the_specification(model.state_dict(), model.config, tokens[0])
    got = model(tokens)[0].detach()
    assert ((got - want).abs().max() / want.std()).item() < 1e-4


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_of_a_variant_learns(small_model, changes):
    model = build(small_model, **changes).train()
    tokens = torch.randint(0, 512, (4, 60))
    losses = model(tokens, tokens)
    (losses.cross_entropy_sum + losses.z_loss_sum).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert losses.counts_LE.sum() == 4 * 60 * model.config.num_experts_per_tok * len(model.moe_layers())


def test_the_inventory_lists_exactly_the_tensors_of_the_network(small_model):
    for changes in VARIANTS.values():
        model = build(small_model, **changes)
        listed = {entry.name: entry.shape for entry in inventory.tensors(model.config)}
        assert listed == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_the_head_is_the_embedding(model):
    tokens = torch.randint(0, 512, (1, 8))
    before = model(tokens)[0, -1]
    with torch.no_grad():
        model.model.embed_tokens.weight[511] *= 2  # 511 is not among the tokens below
    assert 511 not in tokens
    torch.testing.assert_close(model(tokens)[0, -1, 511], before[511] * 2)


def test_the_router_is_float32_whatever_the_activations_are(model):
    x = torch.randn(5, 64).bfloat16()
    router = model.moe_layers()[0].router
    assert torch.equal(router(x), x.float() @ router.weight.T)
    assert router(x).dtype == torch.float32


def test_long_rows_too(model):
    """Beyond the wavelength where scaling begins."""
    tokens = torch.randint(0, 512, (1, 100))
    want = by_the_specification(model.state_dict(), model.config, tokens[0])
    assert ((model(tokens)[0].detach() - want).abs().max() / want.std()).item() < 1e-4


def test_released_scaling_slows_14_of_32_pairs_by_16():
    shape = config.Model(head_dim=64, rope_scaling=config.RopeScaling())
    plain = rope_frequencies(dataclasses.replace(shape, rope_scaling=None))
    ratio = plain / rope_frequencies(shape)
    assert (ratio == 1).sum() == 18
    torch.testing.assert_close(ratio[18:], torch.full((14,), 16.0))


def test_the_future_and_right_padding_do_not_show(model):
    tokens = torch.randint(0, 512, (2, 30))
    padded = tokens.clone()
    padded[:, 20:] = 0
    torch.testing.assert_close(model(tokens)[:, :20], model(padded)[:, :20], rtol=1e-5, atol=1e-5)


def test_documents_do_not_see_each_other(model):
    first, second = torch.randint(0, 512, (1, 12)), torch.randint(0, 512, (1, 18))
    both = torch.cat([first, second], 1)
    document = torch.tensor([[0] * 12 + [1] * 18])
    labels = torch.full_like(both, IGNORE)
    labels[0, 20] = 7
    packed = model(both, labels, document).cross_entropy_sum
    alone = -torch.log_softmax(model(second)[0, 8], -1)[7]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_attention_by_lengths_gives_what_the_mask_gives(model, monkeypatch):
    document = torch.tensor([[0] * 8 + [1] * 12, [0] * 20])
    lengths = Lengths(torch.tensor([0, 8, 20, 40], dtype=torch.int32), 20)
    torch.manual_seed(0)
    tokens, labels = (torch.randint(0, model.config.vocab_size, (2, 20)) for _ in range(2))
    results = []
    for by_lengths in (False, True):
        monkeypatch.setattr("mm_train.model.attends_by_lengths", lambda x, answer=by_lengths: answer)
        model.zero_grad()
        losses = model(tokens, labels, document, lengths)
        losses.cross_entropy_sum.backward()
        results.append((losses.cross_entropy_sum, model.model.layers[0].self_attn.q_proj.weight.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_nothing_crosses_a_document_boundary_in_a_row_of_8192(small_model):
    """What the loss of the second document owes to the first is zero, not nearly zero."""
    model = MobileMoE(small_model)
    model.init_weights(0)
    tokens = torch.randint(0, 512, (1, 8192))
    document = (torch.arange(8192)[None] >= 5000).long()
    inputs: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].retain_grad() or args[0]))
    model(tokens, tokens.where(document == 1, IGNORE), document).cross_entropy_sum.backward()
    assert not inputs[0].grad[0, :5000].any()
    assert inputs[0].grad[0, 5000:].any(1).all()


def test_recomputed_layers_give_the_same_gradients_and_count_once(model):
    tokens, labels = torch.randint(0, 512, (2, 2, 20))
    document = torch.tensor([[0] * 8 + [1] * 12, [0] * 20])
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        losses = model.train()(tokens, labels, document)
        (losses.cross_entropy_sum + losses.z_loss_sum).backward()
        found.append((losses, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (kept, gradients), (recomputed, again) = found
    assert all(torch.equal(*pair) for pair in zip(kept, recomputed, strict=True))
    assert recomputed.counts_LE.sum(1).tolist() == [2 * 20 * 2] * 2
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def test_router_entropy_is_log_e_when_all_experts_score_alike(model):
    for layer in model.moe_layers():
        layer.router.weight.data.zero_()
    tokens = torch.randint(0, 512, (2, 20))
    torch.testing.assert_close(model(tokens, tokens).entropy_sum_L, torch.full((2,), 40 * math.log(8)))


def test_losses_are_sums_and_count_every_slot(model):
    tokens = torch.randint(0, 512, (2, 20))
    labels = torch.randint(0, 512, (2, 20))
    labels[0, :5] = IGNORE
    losses = model(tokens, labels)
    want = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(losses.cross_entropy_sum, want)
    assert losses.counts_LE.sum(1).tolist() == [2 * 20 * 2] * 2
    assert losses.dropped_L.tolist() == [0, 0]


def test_capacity_drops_in_training_only(model):
    for layer in model.moe_layers():
        layer.dispatcher.capacity_factor = 0.5
    tokens = torch.randint(0, 512, (2, 20))
    assert model.eval()(tokens, tokens).dropped_L.sum() == 0
    losses = model.train()(tokens, tokens)
    assert (losses.dropped_L >= 2 * 20 * 2 * 0.5).all()
    losses.cross_entropy_sum.backward()


def test_initial_values_do_not_depend_on_what_else_exists(small_model):
    deeper = dataclasses.replace(small_model, num_hidden_layers=3)
    models = [MobileMoE(shape) for shape in (small_model, deeper)]
    for model in models:
        model.init_weights(5)
    assert torch.equal(*(m.model.layers[1].feed_forward.router.weight for m in models))
    assert not torch.equal(*(models[0].model.layers[i].feed_forward.router.weight for i in (0, 1)))


def test_bfloat16_activations_follow_float32(small_model):
    tokens = torch.randint(0, 512, (1, 20))
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = MobileMoE(small_model, dtype).eval()
        model.init_weights(0)
        outputs.append(model(tokens).float())
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert (outputs[0] - outputs[1]).abs().max() < 0.05 * outputs[0].std()
