import itertools
import math

import pytest
import torch
import torch.multiprocessing as mp

from mm_train import config, costs
from mm_train.data import Batch
from mm_train.metric_names import NAMES
from mm_train.model import Losses, MobileMoE
from mm_train.parallel.groups import Groups
from mm_train.sharding import Place
from mm_train.statistics import Interval, gpu_named, peak_flops

SOURCES = ["chat", "code"]


@pytest.fixture
def cfg(small_model) -> config.Config:
    """Two layers of 8 experts, 2 for each of the 64 tokens of a step."""
    cfg = config.Config(model=small_model)
    cfg.data = config.Data(seq_len=16)
    cfg.train = config.Train(tokens=6400, global_batch_tokens=64, micro_batch_size=2)
    return cfg


def losses(nats: float, counts: list[list[int]], dropped: int = 0) -> Losses:
    """Sums of a micro-batch of 32 tokens whose router is undecided between two experts."""
    return Losses(
        torch.tensor(nats, requires_grad=True),
        torch.tensor(64.0),
        torch.tensor(counts),
        torch.tensor([dropped, 0]),
        torch.tensor([32 * math.log(2), 0.0]),
    )


def batch(*sources: str) -> Batch:
    nothing = torch.zeros(len(sources), 16, dtype=torch.int64)
    return Batch(nothing, nothing, nothing, sources)


EVEN, ONE = [8] * 8, [64, 0, 0, 0, 0, 0, 0, 0]


def test_an_interval_sums_its_steps(cfg):
    interval = Interval(cfg, Groups(), SOURCES)
    for nats in (100.0, 50.0):
        interval.add_micro(losses(nats, [EVEN, ONE], dropped=3), batch("code", "code"))
        interval.add_micro(losses(nats, [EVEN, EVEN]), batch("code", "chat"))
        totals = interval.finish_step(scored=50)
        assert totals.loss == 2 * nats / 50
        assert totals.counts_LE.tolist() == [[16] * 8, [72, *[8] * 7]]
        assert not totals.stop
    values = interval.values(step=10)
    assert values["tokens"] == 640
    assert values["loss"] == 300 / 100
    assert values["z_loss"] == 2.0
    assert values["dropped_fraction"] == 6 / (128 * 2 * 2)
    assert values["router_entropy"] == pytest.approx([math.log(2), 0])
    assert values["router_entropy_share"] == pytest.approx(1 / 6)  # log 2 / log 8, and the mean with 0
    assert values["expert_load"] == [[1 / 8] * 8, [144 / 256, *[16 / 256] * 7]]
    assert (values["load_max"], values["load_min"]) == ([1, 144 / 32], [1, 0.5])
    assert values["load_cv"] == pytest.approx([0, math.sqrt(7) / 2])
    assert values["dead_experts"] == 0
    assert values["data_mixture"] == {"chat": 0.25, "code": 0.75}
    assert set(values) - {"expert_load"} <= set(NAMES["train"])  # all of it has a name


def test_an_interval_begins_anew(cfg):
    interval = Interval(cfg, Groups(), SOURCES)
    interval.add_micro(losses(100.0, [EVEN, ONE]), batch("code", "code"))
    interval.finish_step(scored=1)
    interval.start()
    interval.add_micro(losses(32.0, [EVEN, ONE]), batch("chat", "chat"))
    interval.finish_step(scored=32)
    values = interval.values(step=1)
    assert values["loss"] == 1
    assert values["dead_experts"] == 7
    assert values["data_mixture"] == {"chat": 1, "code": 0}


def test_a_skipped_step_does_not_poison_the_interval(cfg, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    interval = Interval(cfg, Groups(), SOURCES)
    for nats in (math.nan, 64.0, math.inf):
        interval.add_micro(losses(nats, [EVEN, EVEN]), batch("code", "code"))
        totals = interval.finish_step(scored=64)
        if not math.isfinite(nats):
            assert not math.isfinite(totals.loss)
            interval.forget_step()
    with pytest.raises(AssertionError, match="forget_step follows finish_step"):
        interval.forget_step()
    now[0] += 12
    values = interval.values(step=3)
    assert values["loss"] == 1
    assert values["expert_load"] == [[1 / 8] * 8] * 2
    assert values["tokens_per_second"] == pytest.approx(64 / 12)  # three steps took time, one trained
    assert values["step_seconds"] == 4


def test_an_interval_of_skipped_steps_has_no_loss(cfg):
    interval = Interval(cfg, Groups(), SOURCES)
    interval.add_micro(losses(math.nan, [EVEN, EVEN]), batch("code"))
    interval.finish_step(scored=64)
    interval.forget_step()
    values = interval.values(step=1)
    assert values["loss"] is None
    assert values["tokens_per_second"] == 0
    assert "expert_load" not in values


def test_time_and_speed(cfg, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("mm_train.timing.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    interval = Interval(cfg, Groups(world=1), SOURCES)
    for _ in range(2):
        for name, seconds in {"data": 1, "forward": 2, "backward": 4, "optimizer": 0.5}.items():
            with interval.clock.phase(name):
                now[0] += seconds
        interval.add_micro(losses(1.0, [EVEN, EVEN]), batch("code"))
        interval.finish_step(scored=64)
        now[0] += 0.5
    for name, seconds in {"validation": 100, "checkpoint": 10}.items():
        with interval.clock.phase(name):
            now[0] += seconds
    values = interval.values(step=2)
    assert values["tokens_per_second"] == values["tokens_per_second_per_gpu"] == 128 / 16
    assert values["step_seconds"] == 63
    assert {name: seconds for name, seconds in values["phase_seconds"].items() if seconds} == {
        "data": 1,
        "forward": 2,
        "backward": 4,
        "optimizer": 0.5,
        "checkpoint": 5,
        "validation": 50,
        "other": 0.5,
    }
    per_token = sum(costs.train_flops(cfg.model, 16).values())
    assert values["model_flops_per_second"] == pytest.approx(8 * per_token)
    assert values["mfu"] is None  # a CPU has no peak to compare with
    interval.groups, interval.peak_flops = Groups(world=4), 1e6
    values = interval.values(step=2)
    assert values["tokens_per_second_per_gpu"] == 2
    assert values["mfu"] == pytest.approx(8 * per_token / 4e6)


def test_a_dense_network_has_no_routing(cfg, small_model):
    cfg.model = config.Model(**{**vars(small_model), "num_local_experts": 0, "num_experts_per_tok": 0})
    model = MobileMoE(cfg.model)
    model.init_weights(0)
    tokens_BT = torch.randint(0, 512, (4, 16))
    interval = Interval(cfg, Groups(), SOURCES)
    interval.add_micro(out := model(tokens_BT, tokens_BT), batch("code"))
    assert interval.finish_step(scored=64).counts_LE.shape == (0, 1)
    values = interval.values(step=1)
    assert values["loss"] == pytest.approx(float(out.cross_entropy_sum.detach()) / 64)
    assert "expert_load" not in values


def test_the_sums_of_a_real_model_agree_with_it(cfg):
    model = MobileMoE(cfg.model).train()
    model.init_weights(0)
    tokens_BT = torch.randint(0, 512, (4, 16), generator=torch.Generator().manual_seed(0))
    interval = Interval(cfg, Groups(), SOURCES)
    interval.add_micro(out := model(tokens_BT, tokens_BT), batch("code"))
    totals = interval.finish_step(scored=64)
    assert totals.loss == pytest.approx(float(out.cross_entropy_sum.detach()) / 64)
    assert totals.counts_LE.sum(1).tolist() == [128, 128]
    values = interval.values(step=1)
    assert values["router_entropy_share"] == pytest.approx(1, abs=0.01)  # a new router is undecided
    assert values["memory_gib"]["host"] > 0.05


def _rank(rank: int, cfg: config.Config, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/world", rank=rank, world_size=2)
    for tp in (1, 2):
        groups = Groups(rank, 2, place=Place(0, 1, rank if tp == 2 else 0, tp), dp_size=2 // tp)
        interval = Interval(cfg, groups, SOURCES)
        mine = 0 if tp == 2 else rank  # a tensor lane reads the same rows
        interval.add_micro(losses([32.0, 96.0][mine], [[EVEN, ONE], [EVEN, EVEN]][mine]), batch(["code", "chat"][mine]))
        totals = interval.finish_step(scored=64, stop=rank == 1)
        torch.save((totals, interval.values(step=1)), f"{folder}/{tp}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_agree_on_the_global_batch_and_on_stopping(cfg, tmp_path):
    mp.spawn(_rank, (cfg, str(tmp_path)), nprocs=2)
    layouts = {1: (2.0, 72, 0.5), 2: (0.5, 64, 1.0)}  # tensor parallel -> what comes out
    for (tp, (loss, first, mixture)), rank in itertools.product(layouts.items(), range(2)):
        totals, values = torch.load(tmp_path / f"{tp}-{rank}.pt", weights_only=False)
        assert totals.loss == values["loss"] == loss
        assert totals.counts_LE[1, 0] == first
        assert totals.stop
        assert values["data_mixture"]["code"] == mixture
        assert values["tokens_per_second_per_gpu"] == values["tokens_per_second"] / 2


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_peak_is_known_or_not_but_never_guessed(name, tflops):
    gpu = gpu_named(name)
    assert (gpu.tflops if gpu else None) == tflops


def test_the_peak_is_of_bf16_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(torch.device("cuda", 0), "bfloat16") == 989e12
    assert peak_flops(torch.device("cuda", 0), "float32") is None
    assert peak_flops(torch.device("cpu"), "bfloat16") is None
