import pytest

from mm_train.alerts import Alerts, History, alerts_of
from mm_train.metrics import Metrics, read_metrics


def history_of(*values: dict) -> History:
    history = History()
    for value in values:
        history.add(value)
    return history


FALLING = [{"loss": 8.0 - step / 5, "tokens_per_second": 1000.0, "grad_norm": 1.0} for step in range(20)]  # to 4.2


@pytest.mark.parametrize("values", [{"loss": 4.2, "tokens_per_second": 900.0}, {"loss": 4.3}, {"loss": None}, {}])
def test_a_good_interval_raises_nothing(values):
    assert alerts_of(values, history_of(*FALLING)) == {}


def test_a_young_run_raises_nothing():
    for length in range(10):
        assert alerts_of({"loss": 8.1, "tokens_per_second": 1000.0}, history_of(*FALLING[:length])) == {}


def test_intervals_of_skipped_steps_are_no_stall_and_no_loss():
    """What statistics.Interval says of them; anomalies judges such steps."""
    skipped = {"loss": None, "tokens_per_second": 0.0, "grad_norm": None}
    history = history_of(*FALLING, *[skipped] * 10)
    assert alerts_of(skipped, history) == {}
    assert alerts_of(FALLING[-1], history) == {}


def test_slow_intervals_are_a_stall_when_they_last():
    history = history_of(*FALLING)
    slow = {"tokens_per_second": 400.0}
    for _ in range(2):
        assert alerts_of(slow, history) == {}
        history.add(slow)
    assert alerts_of(slow, history) == {"stall": "400 tokens/s; the median of this run is 1k"}
    history.add({"tokens_per_second": 900.0})
    assert alerts_of(slow, history) == {}


def test_a_loss_far_above_the_recent_ones_is_a_spike():
    history = history_of(*({"loss": 4.0 + 0.1 * (step % 2)} for step in range(30)))
    assert alerts_of({"loss": 4.4}, history) == {}
    assert alerts_of({"loss": 4.6}, history) == {"spike": "the loss is 4.600; the median of 20 intervals is 4.050"}


def test_a_loss_that_climbs_is_divergence_and_one_spike_is_not():
    history = history_of(*FALLING)
    found = []
    for step in range(10):
        values = {"loss": 4.4 + step / 2}
        found.append(alerts_of(values, history))
        history.add(values)
    assert "divergence" not in found[2]
    assert found[9]["divergence"] == "the loss is 7.900 and was 4.400"


def test_experts_are_dead_after_a_while():
    def idle(*experts: int) -> dict:
        return {"loss": 4.2, "expert_load": [[0.5, 0.5] + [0.0] * 2, [0.0 if e in experts else 0.25 for e in range(4)]]}

    even = {"loss": 4.2, "expert_load": [[0.25] * 4] * 2}
    assert alerts_of(idle(0), history_of(*FALLING, even, idle(0))) == {}
    told = "experts without a token in 3 intervals in a row: 3, in layers 0, 1"
    assert alerts_of(idle(0, 1), history_of(*FALLING, idle(0), idle(0, 2))) == {"dead": told}
    taking_turns = [{"expert_load": [[0.5, 0.5, 0.0]]}, {"expert_load": [[0.0, 0.5, 0.5]]}]
    assert alerts_of(taking_turns[0], history_of(*FALLING, *taking_turns)) == {}
    assert alerts_of(even, history_of(*FALLING, idle(0), idle(0))) == {}


def test_an_alert_is_told_once_until_it_is_over(tmp_path):
    metrics = Metrics(tmp_path, is_main=True, wandb_mode="disabled", config={}, project="p", run_name="r")
    alerts = Alerts(metrics)
    speeds = [1000.0] * 6 + [100.0] * 4 + [1000.0] + [100.0] * 3
    for step, speed in enumerate(speeds):
        alerts.look(step, {"loss": 4.0, "tokens_per_second": speed})
    metrics.close()
    found = read_metrics(tmp_path)["alert"]
    assert [(r["step"], r["title"], r["level"]) for r in found] == [
        (8, "throughput falls", "warn"),
        (13, "throughput falls", "warn"),
    ]


class Told:
    """Takes alerts as Metrics does."""

    def __init__(self) -> None:
        self.alerts: list[tuple[int, str]] = []

    def alert(self, step: int, title: str, text: str, level: str = "warn") -> None:
        self.alerts.append((step, title))


def test_idle_experts_are_no_news_while_the_router_warms_up():
    told = Told()
    alerts = Alerts(told, quiet_until=20)
    for step in range(0, 50, 2):
        alerts.look(step, {"loss": 4.0, "expert_load": [[1.0, 0.0]]})
    assert told.alerts == [(26, "dead experts")]  # the third interval after step 20
