"""bf16, PTQ and QAT side by side, by real runs of a small model."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from mm_train import config, validate
from mm_train.checkpoint.folders import latest
from mm_train.compare_quant import check, main, rounded
from mm_train.metrics import read_metrics
from mm_train.model_folder import load_model
from mm_train.train import train
from tests.eval.conftest import mirror, wheel_folder  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def runs(small_model, data_set, tmp_path_factory) -> Path:
    """sft; qat and control that go on from it, two seeds; other, of another shape."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, **more) -> None:
        cfg = config.Config(
            model=small_model,
            data=config.Data(str(data_set), {"code": 3, "chat": 1}, ["code", "chat"], 64),
            train=config.Train(tokens=8 * 512, global_batch_tokens=512, micro_batch_size=8),
            optim=config.Optim(lr=3e-3, warmup_steps=1),
            log=config.Log(every=1, wandb="disabled"),
            run=config.Run(str(folder / name), "sft"),
        )
        assert train(dataclasses.replace(cfg, **more)) == 0

    run("sft")
    for seed in (0, 1):
        how = config.Train(tokens=4 * 512, global_batch_tokens=512, micro_batch_size=8, seed=seed)
        run(f"control-{seed}", init_from=str(folder / "sft"), train=how)
        run(f"qat-{seed}", init_from=str(folder / "sft"), train=how, quant=config.Quant(enabled=True))
    run("other", model=dataclasses.replace(small_model, intermediate_size=64))
    return folder


@pytest.fixture
def words(runs, data_set, tmp_path):
    """A function: the command's words, with these runs of QAT and control."""

    def make(qat=("qat-0",), control=(), bf16="sft", *more: str) -> list[str]:
        known = ["--bf16", str(runs / bf16), "--qat", *(str(runs / name) for name in qat)]
        known += ["--control", *(str(runs / name) for name in control)] if control else []
        return [*known, "--data", str(data_set), "--sources", "code,chat", "--seq-len", "64", "--out",
                str(tmp_path / "out"), *more]  # fmt: skip

    return make


def test_all_models_of_both_seeds(words, runs, tmp_path, data_set):
    assert main(words(("qat-0", "qat-1"), ("control-0", "control-1"))) == 0
    facts = json.loads((tmp_path / "out/compare.json").read_text())
    models = facts["models"]
    assert [m["kind"] for m in models] == ["bf16", "ptq", *["control", "ptq-control", "qat"] * 2]
    by_kind = {m["kind"]: m for m in models}

    # What it says of a run is what validation has said at the end of that run, and what mm_train.validate says.
    for name, kind in (("sft", "bf16"), ("control-1", "control"), ("qat-1", "qat")):
        last = {r["source"]: r["loss"] for r in read_metrics(runs / name)["validation"]}
        for source, score in by_kind[kind]["held_out"].items():
            assert score["loss"] == pytest.approx(last[source], rel=1e-5)
    # Rounding after training is what exporting would do.
    view = rounded(latest(runs / "sft"), config.Quant(enabled=True), tmp_path / "view")
    command = ["--data", str(data_set), "--sources", "code,chat", "--seq-len", "64", "--out", str(tmp_path / "v.json")]
    assert validate.main(["--model", str(view), *command]) == 0
    scores = json.loads((tmp_path / "v.json").read_text())
    assert models[1]["held_out"] == {name: pytest.approx(score, rel=1e-6) for name, score in scores.items()}

    layers = 2
    assert models[0]["changed_from_bf16"] == []
    assert all(len(m["changed_from_bf16"]) == layers for m in models[1:])
    assert all(0 < share < 0.5 for share in models[1]["changed_from_bf16"])
    assert [bool(m["changed_from_control"]) for m in models] == [False, False, *[False, True, True] * 2]
    # Four more steps move more of the choices than rounding does.
    assert sum(by_kind["control"]["changed_from_bf16"]) > sum(by_kind["ptq-control"]["changed_from_control"])

    gaps = facts["summary"]["gap"]
    for kind, reference in (("qat", "control"), ("ptq-control", "control"), ("ptq", "bf16")):
        losses = facts["summary"]["loss"]
        assert gaps[kind] == pytest.approx([a - b for a, b in zip(losses[kind], losses[reference], strict=True)])
    ratios = facts["summary"]["qat_gap_over_ptq_gap"]
    assert ratios["all"] == pytest.approx([q / p for q, p in zip(gaps["qat"], gaps["ptq-control"], strict=True)])
    chat = [m["held_out"]["chat"]["loss"] for m in models[2:5]]  # control, ptq-control, qat of the first seed
    assert ratios["chat"][0] == pytest.approx((chat[2] - chat[0]) / (chat[1] - chat[0]))
    assert facts["notes"] == []
    text = (tmp_path / "out/compare.md").read_text()
    assert "control: bf16, trained on as QAT" in text
    assert "which has trained on the same tokens as QAT" in text


def test_without_a_control_it_says_what_that_means(words, tmp_path, capsys):
    assert main(words()) == 0
    assert "which has trained on fewer tokens than QAT: add --control runs" in capsys.readouterr().out


def test_a_control_that_differs_in_more_is_noted(words, runs, tmp_path):
    assert main(words(("qat-0",), ("control-1",))) == 0
    (note,) = json.loads((tmp_path / "out/compare.json").read_text())["notes"]
    assert note.endswith("differs from " + str(runs / "qat-0") + " in more than quantisation: train.seed 1 (now 0)")


@pytest.mark.slow  # three processes that load lm-eval
def test_benchmarks_of_each_by_eval_run(words, runs, mirror, tmp_path):  # noqa: F811
    more = ["--eval", "piqa", "--limit", "2", "--eval-data", str(mirror.folder)]
    assert main(words(("qat-0",), (), "sft", *more)) == 0
    models = json.loads((tmp_path / "out/compare.json").read_text())["models"]
    assert [list(m["scores"]) for m in models] == [["piqa"]] * 3
    ptq = load_model(tmp_path / "out/eval/01-ptq/checkpoint")
    assert ptq.model.embed_tokens.fake_quant is not None
    assert "| piqa |" in (tmp_path / "out/compare.md").read_text()
    given = [f"qat={tmp_path / 'out/eval/02-qat/results.json'}"]
    assert main(words(("qat-0",), (), "sft", "--results", *given)) == 0
    again = json.loads((tmp_path / "out/compare.json").read_text())["models"]
    assert [m["scores"] for m in again] == [{}, {}, models[2]["scores"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("sft",),), "sft is not from quantisation-aware training (quant.enabled): not what it is given as"),
        ((("qat-0",), (), "qat-1"), "qat-1 is from quantisation-aware training (quant.enabled): not what it is given"),
        ((("qat-0", "qat-1"), ("control-0",)), "--control has 1 runs and --qat 2: they belong together in pairs"),
        ((("qat-0",), ("other",)), "is another model than"),
        ((("qat-0",), (), "sft", "--seq-len", "999"), "--seq-len 999 must lie in 1..256"),
        ((("qat-0",), (), "sft", "--results", "q=x"), "--results q=x: it must be KIND=results.json with KIND one of"),
        ((("qat-0",), (), "sft", "--results", "qat=none"), "none is no results.json of eval.run"),
        ((("none",),), "no checkpoint in"),
    ],
)
def test_what_cannot_be_compared_is_one_line(words, capsys, arguments, message):
    assert main(words(*arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_runs_for_different_formats_are_not_one_row(runs, tmp_path):
    shutil.copytree(runs / "qat-0", tmp_path / "in")
    view = rounded(latest(runs / "sft"), config.Quant(enabled=True, expert_group_axis="in"), tmp_path / "view")
    assert check(runs / "sft", [view], []).expert_group_axis == "in"
    with pytest.raises(Exception, match="trained for different quantisations"):
        check(runs / "sft", [runs / "qat-0", view], [])


def test_the_rounded_view_has_the_same_weights(runs, tmp_path):
    plain = load_model(runs / "sft")
    view = load_model(rounded(latest(runs / "sft"), config.Quant(enabled=True), tmp_path / "view"))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), view.parameters(), strict=True))
