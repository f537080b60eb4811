"""The command: every config, exact figures, the keys of its JSON, and one line for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mm_train.cli import UserError
from mm_train.config import Parallel
from mm_train.describe import main
from mm_train.rules import RANGES

ROOT = Path(__file__).parents[2]
MODELS = sorted((ROOT / "configs/model").glob("*.yaml"))
S, PRETRAIN = str(ROOT / "configs/model/s.yaml"), str(ROOT / "configs/stage/pretrain.yaml")
KEYS = {
    "total_params",
    "active_params",
    "int4_bytes",
    "train_flops_per_token",
    "inference_flops_per_token",
    "kv_bytes_per_token",
    "memory_gib",
    "comm_bytes_per_step",
    "days",
}


KEYS_OF_A_LAYOUT = ("expert_parallel", "tensor_parallel", "zero_stage", "recompute")


@pytest.fixture
def facts(capsys):
    """A function from arguments to what --json prints."""

    def run(*args: str) -> dict:
        assert main([*map(str, args), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def text(capsys):
    """A function from arguments to the printed report."""

    def run(*args: str) -> str:
        assert main([*map(str, args)]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_is_described(path, facts, text):
    said = facts(path)
    assert set(said) >= KEYS
    assert said["total_params"] == sum(part["total"] for part in said["params_by_part"].values())
    assert said["active_params"] == sum(part["active"] for part in said["params_by_part"].values())
    assert said["train_flops_per_token"] == 3 * said["inference_flops_per_token"]
    assert said["memory_gib"]["total"] == pytest.approx(
        sum(size for part, size in said["memory_gib"].items() if part != "total")
    )
    report = text(path)
    head = report.splitlines()[0]
    assert head == f"{said['name']}: {said['total_params']:,} parameters, {said['active_params']:,} active per token"
    comment = path.read_text().splitlines()[0]
    for count in {said["total_params"], said["active_params"]}:
        assert f"{count:,}" in comment or path.stem == "tiny"
    assert max(map(len, report.splitlines())) < 160
    hint = re.fullmatch(r"another layout: (.*); a stage: add (.*)", report.splitlines()[-1])
    for words in hint.groups():
        assert (
            facts(path, *words.replace("configs/", f"{ROOT}/configs/").split())["total_params"] == said["total_params"]
        )


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_has_a_training_layout(path, facts):
    dense = "num_local_experts: 0" in path.read_text()
    said = facts(path, "--parallel", "gpus=64", f"expert_parallel={1 if dense else 4}", "zero_stage=2")
    assert said["comm_bytes_per_step"]["total"] > 0
    assert (said["comm_bytes_per_step"]["all_to_all_dispatch"] == 0) == dense
    assert said["fits"]


def test_s_is_the_published_one(facts, text):
    said = facts(S)
    assert (said["total_params"], said["active_params"]) == (1_263_374_256, 272_469_936)
    assert (said["int4_bytes"], said["kv_bytes_per_token"]) == (713_916_240, 20_480)
    assert said["train_flops_per_token"] == 1_823_367_168 == sum(said["train_flops_by_part"].values())
    # 6 T tokens of 1.823 GFLOP at 40 % of 989 TFLOP/s
    assert said["days"] == pytest.approx(6e12 * 1_823_367_168 / (989e12 * 0.4) / 86_400)
    report = text(S)
    for figure in ("1,263,374,256", "272,469,936", "713,916,240", "32.4%", "1.82 GFLOP", "160 MiB", "320.1 days"):
        assert figure in report, figure


def test_training_the_paper_way(facts):
    said = facts(S, PRETRAIN, "--parallel", "gpus=64", "zero_stage=1")
    assert said["layout"] == {
        "gpus": 64,
        "expert_parallel": 4,  # of the stage file
        "tensor_parallel": 1,
        "zero_stage": 1,
        "recompute": "none",
        "engine": "deepspeed",
        "micro_batch_size": 8,
        "micro_steps": 4,
        "global_batch_tokens": 4_194_304,
        "activation_dtype": "bfloat16",
        "capacity_factor": 1.5,
        "quantisation_aware": False,
    }
    assert said["assumptions"] == []
    routed = said["train_flops_by_part"]["routed experts"]
    assert said["hardware_train_flops_per_token"] - said["train_flops_per_token"] == pytest.approx(routed / 2, rel=2e-3)
    # 4 micro-steps, 20 layers, forward and backward; 60 x 1639 rows of 768 bfloat16 values, 3 of 4 to other GPUs
    assert said["comm_bytes_per_step"]["all_to_all_dispatch"] == 4 * 20 * 2 * (60 * 1639) * 768 * 2 * 3 // 4


def test_where_values_come_from(facts):
    from_stage = facts(S, ROOT / "configs/stage/midtrain.yaml")
    assert (from_stage["context"], from_stage["tokens"]) == (8192, 500e9)
    assert from_stage["layout"]["gpus"] == 4  # as few as its expert parallel allows
    words = ("--context", "1024", "--tokens", "2.5B", "--mfu", "0.2", "--gpu", "a100-40")
    asked = facts(S, *words, "--parallel", "micro_batch_size=2")
    assert (asked["context"], asked["tokens"], asked["mfu"]) == (1024, 2.5e9, 0.2)
    assert (asked["gpu"]["tflops"], asked["layout"]["micro_batch_size"]) == (312, 2)
    assert facts(S, "data.seq_len=4096")["context"] == 4096
    assert [facts(S, "--context", size)["context"] for size in ("2k", "8K", "1,000")] == [2048, 8192, 1000]
    assert facts(ROOT / "configs/model/tiny.yaml")["context"] == 1024  # its longest
    tiny = facts(ROOT / "configs/model/tiny.yaml", ROOT / "configs/stage/tiny/pretrain.yaml")
    assert tiny["layout"]["activation_dtype"] == "float32"  # the stage leaves it out; training then takes the schema's


def test_one_gpu_to_thousands(facts, text):
    lines = {line["gpus"]: line for line in facts(S, PRETRAIN, "--parallel", "gpus=16")["scale"]}
    assert list(lines) == [1, 8, 16, 64, 512, 4096]
    assert lines[8]["days"] == pytest.approx(2 * lines[16]["days"])
    assert lines[8]["memory_gib_total"] > lines[64]["memory_gib_total"]
    assert lines[512]["micro_batch_size"] == 4  # 8 rows on each of 512 GPUs would be more than the batch
    assert (lines[1]["days"], lines[4096]["memory_gib_total"]) == (None, None)
    assert "(4) must divide the number of processes (1)" in lines[1]["why_not"]
    assert "must be a multiple of train.micro_batch_size (1)" in lines[4096]["why_not"]
    assert facts(S)["scale"][-1]["global_batch_tokens"] == 2 * 4_194_304  # one row on each of 4096, no batch asked for
    assert "4,096 GPUs: that is a global batch of 8,388,608 tokens" in text(S)
    report = text(S, PRETRAIN, "--parallel", "gpus=16")
    assert "not on 4,096 GPUs: train.global_batch_tokens (4194304)" in report
    assert "expert parallel 4, ZeRO 1 on more than one" in report


def test_a_line_of_the_table_is_what_that_layout_is_said_to_take(facts):
    line = next(line for line in facts(S, PRETRAIN)["scale"] if line["gpus"] == 512)
    asked = facts(S, PRETRAIN, "--parallel", "gpus=512", f"micro_batch_size={line['micro_batch_size']}")
    assert line["memory_gib_total"] == asked["memory_gib"]["total"]
    assert line["comm_bytes_per_step_total"] == asked["comm_bytes_per_step"]["total"]


def test_micro_batches_shrink_to_what_divides_the_batch(facts):
    batch = f"train.global_batch_tokens={2048 * 8 * 45}"  # 45 rows on each of 8 GPUs
    lines = {line["gpus"]: line for line in facts(S, batch, "--parallel", "micro_batch_size=40", "gpus=9")["scale"]}
    assert (lines[8]["micro_batch_size"], lines[8]["micro_steps"]) == (15, 3)
    # no batch asked for: it is rounded up instead, to rows of 3000 tokens here
    lines = {line["gpus"]: line for line in facts(S, "--context", "3000")["scale"]}
    assert (lines[8]["micro_batch_size"], lines[8]["global_batch_tokens"]) == (8, 22 * 8 * 8 * 3000)


def test_all_experts_everywhere_are_recommended_where_they_fit(facts, text):
    said = facts(S, PRETRAIN, "--parallel", "gpus=64")
    chosen = said["recommendation"]
    assert (chosen["expert_parallel"], chosen["zero_stage"], chosen["recompute"]) == (1, 0, "none")
    kinds = {tuple(layout[key] for key in KEYS_OF_A_LAYOUT): layout for layout in said["layouts"]}
    assert set(kinds) == {(ep, 1, zero, again) for ep in (1, 2, 4) for zero in (0, 1, 2) for again in ("none", "layer")}
    best = kinds[1, 1, 0, "none"]
    assert best["comm_bytes_per_step_total"] < min(
        layout["comm_bytes_per_step_total"] for key, layout in kinds.items() if key[0] > 1 or key[2] > 0
    )
    own = kinds[4, 1, 1, "none"]  # of the stage file
    assert own["memory_gib_total"] == said["memory_gib"]["total"]
    assert own["comm_bytes_per_step_total"] == said["comm_bytes_per_step"]["total"]
    assert kinds[4, 1, 1, "layer"]["memory_gib_total"] < own["memory_gib_total"]
    assert chosen["paper"].startswith("expert_parallel=4 zero_stage=0 recompute=none: 33.2 GiB a GPU, fits, 37.10 GiB")
    report = text(S, PRETRAIN, "--parallel", "gpus=64")
    assert "  * recommended: expert_parallel=1 zero_stage=0 recompute=none\n" in report
    assert re.search(r"expert parallel 1, ZeRO 0 +46\.5 +yes \* +9\.27 ", report)
    assert "  the paper's: expert_parallel=4" in report


def test_recommendations_when_memory_is_short(facts):
    large, words = ROOT / "configs/model/l.yaml", ("--gpu", "a100-40", "--parallel", "gpus=8")
    chosen = facts(large, *words)["recommendation"]
    assert (chosen["expert_parallel"], chosen["zero_stage"], chosen["recompute"]) == (2, 1, "layer")
    assert "nothing fits without recomputation (with micro_batch_size=1 it would)" in chosen["why"]
    assert "with all experts on every GPU nothing fits" in chosen["why"]
    chosen = facts(large, *words, "micro_batch_size=1")["recommendation"]  # sends more, computes nothing twice
    assert (chosen["expert_parallel"], chosen["recompute"]) == (4, "none")
    said = facts(large, "--gpu", "a100-40", "--parallel", "gpus=2")
    assert said["recommendation"]["expert_parallel"] is None
    assert {layout["tensor_parallel"] for layout in said["layouts"]} == {1, 2}
    assert not any(layout["fits"] for layout in said["layouts"])


def test_tensor_parallelism_is_recommended_where_nothing_else_fits(facts, text):
    dense = (str(ROOT / "configs/model/mobilellm-pro.yaml"), "train.global_batch_tokens=1048576", "--context", "8192")
    words = ("--parallel", "gpus=2", "micro_batch_size=16")
    said = facts(*dense, "--gpu", "a100-40", *words)["recommendation"]
    assert (said["tensor_parallel"], said["recompute"], said["paper"]) == (2, "layer", None)  # no experts
    report = text(*dense, "--gpu", "a100-40", *words)
    assert "expert_parallel=1 tensor_parallel=2 zero_stage=0 recompute=layer" in report
    assert "nothing fits without tensor parallelism" in report
    assert max(map(len, report.splitlines())) < 160
    assert facts(*dense, "--gpu", "h200", *words)["recommendation"]["tensor_parallel"] == 1


def test_one_gpu_has_no_choice_but_recomputation(facts, text):
    said = facts(S)
    assert [layout["recompute"] for layout in said["layouts"]] == ["none", "layer"]
    assert "not possible here" in said["recommendation"]["paper"]
    assert "* recommended: expert_parallel=1 recompute=none" in text(S)


def test_a_layout_with_tensor_parallelism_and_recomputation(facts, text):
    words = (S, "--parallel", "gpus=8", "tensor_parallel=2", "expert_parallel=2", "zero_stage=2", "recompute=layer")
    said, report = facts(*words), text(*words)
    assert said["layout"]["micro_steps"] == 4_194_304 // (8 * 2048 * 4)  # two GPUs share a micro-batch
    assert said["comm_bytes_per_step"]["tensor_all_reduce"] > 0
    assert said["hardware_train_flops_per_token"] > 4 / 3 * said["train_flops_per_token"]
    assert "expert parallel 2, tensor parallel 2, DeepSpeed, ZeRO 2, layers recomputed" in report
    assert "with the layers' forward pass once more and routed experts 2 times" in report
    assert facts(S, "--parallel", "tensor_parallel=2")["layout"]["gpus"] == 2
    assert {line["gpus"] for line in said["scale"] if line["why_not"]} == {1}


def test_what_does_not_fit_is_said(facts, text):
    words = (str(ROOT / "configs/model/l.yaml"), "--gpu", "a100-40")
    assert not facts(*words)["fits"]
    assert "does NOT fit into the 40 GiB" in text(*words)


def test_the_largest_that_the_rules_accept_has_finite_figures(capsys):
    words = ["num_hidden_layers", "num_local_experts", "num_experts_per_tok", "hidden_size", "vocab_size"]
    sizes = [f"model.{key}={RANGES[f'model.{key}'].high}" for key in words]
    more = ["moe.dispatch=drop_and_pad", "moe.capacity_factor=1000", "--tokens", "1e18", "--mfu", "0.001"]
    assert main([S, *sizes, *more, "--parallel", "gpus=1000000", "micro_batch_size=65536", "--json"]) == 0
    said = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    assert not said["fits"]


def test_one_system_of_units_but_for_the_papers_budget(text):
    lines = text(S, PRETRAIN, "--parallel", "gpus=16").splitlines()
    assert [line for line in lines if re.search(r"\b[GM]B\b", line)] == [
        "  int4 weights and an int8 cache of 8,192 tokens: 0.74 GiB (0.80 GB; the paper allows 5 GB, 4.66 GiB)"
    ]
    assert any(re.fullmatch(r" +bf16 copies of the weights, kept for the backward pass +0\.68", line) for line in lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--parallel gpu=2", "--parallel: unknown key gpu (did you mean gpus?)"),
        ("--parallel zero=1", "--parallel: unknown key zero"),
        ("--parallel gpus", "--parallel takes key=value, not 'gpus'"),
        ("--parallel gpus=many", "--parallel gpus is 'many'; it must be a whole number"),
        ("--parallel gpus=0", "gpus is 0; it must be 1 to 1,000,000"),
        ("--parallel gpus=1000000000", "gpus is 1000000000; it must be 1 to 1,000,000"),
        ("--parallel micro_batch_size=-1", "train.micro_batch_size is -1; it must be above 0"),
        (
            "--parallel micro_batch_size=1000000000",
            "micro_batch_size is 1000000000; it must be above 0 and at most 65,5",
        ),
        ("--parallel zero_stage=3", "parallel.zero_stage is 3; it must be one of 0, 1, 2"),
        ("--parallel recompute=all", "train.recompute is 'all'; it must be one of none, layer"),
        ("--parallel tensor_parallel=5", "parallel.tensor_parallel (5) must divide model.num_attention_heads (12)"),
        ("--parallel tensor_parallel=2 gpus=3", "tensor_parallel (2) must divide the number of processes (3)"),
        (
            "--parallel tensor_parallel=2 gpus=4 expert_parallel=4",
            "expert_parallel (4) must divide the number of processes (4) / tensor_parallel (2)",
        ),
        ("quant.enabled=true --parallel tensor_parallel=2", "parallel.tensor_parallel is 2 with quant.enabled"),
        ("--parallel gpus=6 expert_parallel=4", "expert_parallel (4) must divide the number of processes (6)"),
        ("--parallel gpus=7 expert_parallel=7", "expert_parallel (7) must divide model.num_local_experts (60)"),
        ("parallel.engine=plain --parallel gpus=2", "parallel.engine=plain runs on one process; there are 2"),
        ("parallel.engine=mpi", "parallel.engine is 'mpi'"),
        (
            "train.global_batch_tokens=100000 --parallel gpus=2",
            "(100000) must be a multiple of train.micro_batch_size (8)",
        ),
        ("train.dtype=fp8", "train.dtype is 'fp8'; it must be one of float32, bfloat16"),
        ("moe.dispatch=drop", "moe.dispatch is 'drop'"),
        ("moe.capacity_factor=0", "moe.capacity_factor is 0.0; it must be above 0"),
        ("moe.capacity_factor=1e308", "moe.capacity_factor is 1e+308; it must be above 0 and at most 1,000"),
        ("model.num_experts_per_tok=1", "the router learns nothing: set model.norm_topk_prob=false"),
        ("model.num_hidden_layers=100000000", "num_hidden_layers is 100000000; it must be above 0 and at most 1,024"),
        ("optim.lr=0", "optim.lr is 0.0; it must be above 0"),
        (f"{PRETRAIN} optim.warmup_steps=10000000", "optim.warmup_steps (10000000) must be below"),
        (f"{PRETRAIN} --tokens 1M", "train.tokens (1000000) is less than one batch"),
        ("train.tokens=0", "train.tokens is 0; it must be above 0"),
        (
            "--tokens 1e308",
            "train.tokens is a whole number of 1,024 bits; it must be at least 0 and at most 1,000,000,000,",
        ),
        ("--tokens lots", "--tokens is 'lots'; it must be a number, such as 6e12 or 500B"),
        ("--tokens nan", "--tokens is 'nan'; it must be a number"),
        ("--tokens 1e308T", "--tokens is '1e308T'; it must be a number"),
        ("--tokens B", "--tokens is 'B'; it must be a number"),
        ("--mfu 40", "--mfu is 40; it is a share of the GPU's peak"),
        ("--mfu 1e-320", "--mfu is 1e-320; it is a share of the GPU's peak, 0.001 to 1"),
        ("--gpu h10", "--gpu: unknown h10 (did you mean h100?)"),
        ("--context 9000", "data.seq_len (9000) must not exceed model.max_position_embeddings (8192)"),
        ("--context 0", "data.seq_len is 0; it must be above 0"),
        ("--context long", "--context is 'long'; it must be a number, such as 2048 or 2k"),
        ("model.hidden_size=100", "model.hidden_size (100) must be a multiple of 32"),
        ("model.hiden_size=64", "unknown key model.hiden_size (did you mean model.hidden_size?)"),
        ("nowhere.yaml", "config file not found: nowhere.yaml"),
        (
            "model.num_local_experts=0 model.num_experts_per_tok=0 --parallel gpus=4 expert_parallel=4",
            "a dense network (model.num_local_experts 0) has no experts to share out",
        ),
    ],
)
def test_a_mistake_gets_one_line(args, message, capsys):
    assert main([S, *args.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_layout_is_refused_in_the_words_of_training(capsys):
    from mm_train.parallel.groups import check_world

    for gpus, tp, ep in ((3, 2, 1), (4, 2, 4), (6, 1, 4)):
        words = [f"gpus={gpus}", f"tensor_parallel={tp}", f"expert_parallel={ep}"]
        assert main([S, "--parallel", *words]) == 2
        with pytest.raises(UserError) as refused:
            check_world(Parallel(expert_parallel=ep, tensor_parallel=tp), gpus)
        assert capsys.readouterr().err == f"error: {refused.value}\n"


def test_it_needs_no_torch():
    code = (
        f"import sys; from mm_train.describe import main; main([{S!r}, '--json']);"
        " sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_what_a_stage_reads_of_its_data(data_set, capsys):
    stage = str(ROOT / "configs/stage/tiny/pretrain.yaml")
    words = [str(ROOT / "configs/model/tiny.yaml"), stage, f"data.path={data_set}", "data.seq_len=64"]
    assert main([*words, "data.mixture={code: 1, docs: 0, books: 1}"]) == 0
    printed = capsys.readouterr().out
    assert f"Data in {data_set}\n  code: 50.0% of the rows, 401 k tokens of 21.2 k: 18.9 epochs\n" in printed
    assert "  books: not prepared\n" in printed
    assert "  this stage reads code 18.9 times; more than data.max_epochs (4)" in printed
    assert main([*words, "data.path=nowhere", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] is None
