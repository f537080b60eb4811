from mm_train.data_plan import lines, plan, plan_folder, too_often
from mm_train.order import Mixture
from mm_train.shards import ShardReader

MIXTURE = Mixture({"web": 62, "math": 38}, {"web": 10_000_000, "math": 1_000}, seed=0)


def test_what_a_stage_reads():
    web, math = sorted(plan(MIXTURE, 2048, 20_000), key=lambda source: source.name, reverse=True)
    assert (web.share, web.available, web.tokens, web.epochs) == (0.62, 20_480_000_000, 12_400 * 2048, 0.00124)
    assert (math.tokens, math.epochs) == (7600 * 2048, 7.6)
    assert lines([web, math]) == [
        "data web: 62.0% of the rows, 25.4 M tokens of 20.5 B: 0.00124 epochs",
        "data math: 38.0% of the rows, 15.6 M tokens of 2.05 M: 7.6 epochs",
    ]


def test_a_warning_above_the_limit():
    sources = plan(MIXTURE, 2048, 20_000)
    assert too_often(sources, 7.6) is None
    assert too_often(sources, 4).startswith("this stage reads math 7.6 times; more than data.max_epochs (4): ")


def test_epochs_count_from_the_start_of_the_run():
    later = Mixture({"math": 1}, {"math": 1_000}, seed=0, start=5_000, used={"math": 2_000})
    assert plan(later, 1, 8_000)[0].epochs == 5.0


def test_what_is_in_a_folder(data_set):
    sources, missing = plan_folder(data_set, {"code": 3, "chat": 1, "books": 1, "off": 0}, 64, 1000)
    rows = {name: ShardReader(data_set / name / "train").num_windows(64) for name in ("code", "chat")}
    assert {s.name: s.epochs for s in sources} == {"chat": 200 / rows["chat"], "code": 600 / rows["code"]}
    assert missing == ["books"]
