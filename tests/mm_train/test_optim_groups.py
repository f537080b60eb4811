import pytest

from mm_train import config
from mm_train.inventory import KINDS, tensors
from mm_train.optim_groups import kinds_of, lines, table


def test_what_is_said_at_the_start(small_model):
    adamw = list(lines(table(small_model, config.Optim())))
    assert adamw == [
        "AdamW, weight decay 0.1: embedding, attention, router, routed experts, shared expert (181,248 parameters)",
        "AdamW, no weight decay: norms (320 parameters)",
    ]
    muon = list(lines(table(small_model, config.Optim(name="muon", no_decay=["norms", "embedding"]))))
    assert muon == [
        "Muon, weight decay 0.1: attention, routed experts, shared expert (147,456 parameters)",
        "AdamW, no weight decay: embedding, norms (33,088 parameters)",
        "AdamW, weight decay 0.1: router (1,024 parameters)",
    ]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_training_keeps_of_a_tensor(small_model, name):
    for entry in tensors(small_model):
        kept = kinds_of(entry, config.Optim(name=name))
        if entry.name.endswith("expert_bias"):
            assert kept == ("weight",)
        elif name == "muon" and entry.part in ("attention", "routed experts", "shared expert"):
            assert kept == ("weight", "exp_avg")
        else:
            assert kept == KINDS
