import itertools

import torch
from torch import nn

from mm_train.inventory import tensors
from mm_train.model import MobileMoE
from mm_train.sharding import Place, local_boxes, whole
from mm_train.weights import fill, initial, materialise


def test_a_part_of_a_fresh_tensor_is_that_part_of_the_whole(small_model):
    model = MobileMoE(small_model)
    model.init_weights(3)
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    source = initial(small_model, 3)
    for place in (Place(1, 4, 0, 1), Place(0, 1, 1, 2), Place(3, 4, 1, 2)):
        for entry, box in local_boxes(small_model, place):
            assert torch.equal(source(entry.name, box), values[entry.name][box.slices]), entry.name


def test_fresh_values_have_the_spread_that_the_config_says(small_model):
    model = MobileMoE(small_model)
    model.init_weights(0)
    layer = model.model.layers[0]
    std = small_model.initializer_range
    torch.testing.assert_close(layer.self_attn.q_proj.weight.std(), torch.tensor(std), rtol=0.05, atol=0)
    shrunk = std / (2 * small_model.num_hidden_layers) ** 0.5
    torch.testing.assert_close(layer.self_attn.o_proj.weight.std(), torch.tensor(shrunk), rtol=0.05, atol=0)
    assert (layer.input_layernorm.weight == 1).all()
    assert (layer.feed_forward.expert_bias == 0).all()


def test_every_seed_gives_other_values(small_model):
    shapes = {entry.name: entry.shape for entry in tensors(small_model) if len(entry.shape) > 1}
    sources = [initial(small_model, seed) for seed in (0, 1, 2, 2**31 - 1)]
    for name, shape in shapes.items():
        values = [source(name, whole(shape)) for source in sources]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(values, 2)), name


def test_memory_is_given_without_losing_notes_on_parameters():
    with torch.device("meta"):
        module = nn.Linear(3, 2)
        module.register_buffer("count", torch.zeros(4))
    module.weight.group_name = "ep_size_2"
    materialise(module, torch.device("cpu"))
    assert module.weight.device.type == module.count.device.type == "cpu"
    assert module.weight.shape == (2, 3)
    assert isinstance(module.weight, nn.Parameter)
    assert module.weight.group_name == "ep_size_2"


def test_every_tensor_is_filled(small_model):
    with torch.device("meta"):
        model = MobileMoE(small_model)
    materialise(model, torch.device("cpu"))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(torch.nan)
    fill(model, small_model, initial(small_model, 0))
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
