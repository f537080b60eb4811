"""The command: what the paper recommends, the model file, the refusal to extrapolate, and budgets that buy nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mm_train import describe
from mm_train.scaling_law import solve
from mm_train.scaling_law.__main__ import main
from mm_train.scaling_law.law import PUBLISHED

ROOT = Path(__file__).parents[3]
BUDGET = ("plan", "--memory-gib", "5", "--train-flops")


def best_of(active_max: float, tokens: float = 200e9) -> solve.Option:
    budget = solve.Budget(6 * active_max * tokens, 5 * solve.GIB, active_max=active_max)
    rows = solve.compare(PUBLISHED, solve.options(PUBLISHED, budget, PUBLISHED.expansions))
    return solve.recommend(rows, PUBLISHED.rmse).option


@pytest.mark.parametrize(
    ("active_max", "width", "layers", "active", "total"),
    [
        (0.272e9, 768, 20, 272_469_936, 1_263_374_256),
        (0.528e9, 1024, 26, 528_300_568, 2_818_390_552),
        (0.922e9, 1280, 32, 921_685_120, 5_325_704_320),
    ],
)
def test_s_m_and_l_are_recommended_within_a_tenth(active_max, width, layers, active, total):
    option = best_of(active_max)
    assert option.expansion == 8
    assert option.model.num_local_experts == 60
    assert option.active <= active_max
    for got, want in (
        (option.model.hidden_size, width),
        (option.model.num_hidden_layers, layers),
        (option.active, active),
        (option.total, total),
    ):
        assert got == pytest.approx(want, rel=0.1)


def test_the_command_recommends_e_8_and_its_file_is_what_describe_says(tmp_path, capsys):
    path = tmp_path / "new" / "model.yaml"
    words = [*BUDGET, "3.3e20", "--active-max", "0.3e9", "--device", "galaxy-s25", "--out", str(path)]
    assert main([*words, "--figures", str(tmp_path / "figures")]) == 0
    text = capsys.readouterr().out
    assert "Recommended: E = 8, g = 8, shared expert on" in text
    assert text.count("\n", 0, text.index("regret: loss")) == 10  # a line for each of six expansions
    assert "Samsung Galaxy S25" in text
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == ["plan.svg", "range.svg"]
    assert describe.main([str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for number in (facts["total_params"], facts["active_params"], facts["int4_bytes"]):
        assert f"{number:,}" in text
    assert f"{facts['kv_bytes_per_token'] // 2 * 8192:,}" in text


def test_the_optimum_is_no_worse_than_any_other_network_within_the_budget():
    budget = solve.Budget(3.3e20, 1 * solve.GIB, active_max=0.35e9)
    (option,) = solve.options(PUBLISHED, budget, [8])
    for model, active, _total in solve.candidates(8, 8, True):
        if active > 0.35e9:
            continue
        tokens = int(3.3e20 / (6 * active))
        memory = solve.file_bytes(model, "int4") + 8192 * solve.costs.kv_bytes_per_token(model, 1)
        if memory <= solve.GIB:
            assert option.loss <= PUBLISHED.loss(active, tokens, 8)
    assert option.memory <= solve.GIB
    assert 6 * option.active * option.tokens <= 3.3e20


def test_outside_of_the_range_it_warns_and_refuses_unless_told(tmp_path, capsys):
    words = [*BUDGET, "3.3e22", "--active-max", "0.93e9", "--out", str(tmp_path / "model.yaml")]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "times the most that the law was fitted to" in said.out
    assert "E = 8 is +0.0306 ahead of dense in range, and -0.0069 here" in said.out
    assert "--extrapolate" in said.err
    assert said.err.count("\n") == 1
    assert "Recommended" not in said.out
    assert not list(tmp_path.iterdir())
    assert main([*words, "--extrapolate"]) == 0
    assert "WARNING" in capsys.readouterr().out
    assert (tmp_path / "model.yaml").exists()
    assert main([*words[:-2], "--tokens-max", "500B"]) == 0
    assert "Recommended: E = 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("3.3e20", "--memory-gib", "0.001"), "no network fits the budget: the smallest"),
        (("3.3e20", "--active-max", "1M"), "no network fits the budget"),
        (("1", "--tokens-min", "1B"), "no network fits the budget"),
        (("lots",), "--train-flops is 'lots'"),
        (("-1",), "--train-flops"),
        (("nan",), "--train-flops"),
        (("3.3e20", "--tokens-min", "2T", "--tokens-max", "1T"), "exceeds --tokens-max"),
        (("3.3e20", "--expansions", "8,x"), "--expansions is '8,x'"),
        (("3.3e20", "--coefficients", "nowhere.json"), "cannot read the law"),
        (("3.3e20", "--tolerance", "-1"), "--tolerance"),
        (("3.3e20", "--context", "0"), "--context is 0"),
    ],
)
def test_a_budget_that_cannot_be_is_one_line(words, says, capsys):
    arguments = [*BUDGET, *words]
    if words == ("-1",):
        arguments[-2:] = ["--train-flops=-1"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_planning_needs_neither_scipy_nor_matplotlib_nor_torch():
    code = (
        "import sys, mm_train.scaling_law.__main__; sys.exit(bool({'scipy', 'matplotlib', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
