"""When a person should look at a run. Torch-free: rules over what is logged of each interval.

Rules for single steps, which act instead of telling, are in mm_train.anomalies.
"""

import math
from collections import deque
from statistics import median
from typing import Any, Protocol, TypeGuard

from mm_train.anomalies import NORMAL
from mm_train.log_lines import Record, short

WINDOW = 5  # intervals in the median that stands for the loss of now
DIVERGED = 1.3  # times the lowest such median
RECENT = 20  # intervals that a spike is compared with
SPIKE_DEVIATIONS, SPIKE_SHARE = 6.0, 0.1  # above their median, in robust deviations and as a share of it
STALLED = 0.5  # of the run's median speed
SPEEDS = 3  # intervals whose median is the run's speed, at least
PERSISTENT = 3  # intervals in a row before slow ones are a stall, and experts without tokens dead, not unlucky

TITLES = {"divergence": "training diverges", "spike": "loss jumps", "stall": "throughput falls", "dead": "dead experts"}
LEVELS = {"divergence": "error"}  # the others are warnings


class Tells(Protocol):
    """What of mm_train.metrics.Metrics is needed here."""

    def alert(self, step: int, title: str, text: str, level: str = "warn") -> None: ...


class History:
    """What the rules need to know of the intervals before."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.lowest = math.inf  # median loss of WINDOW intervals
        self.speeds: list[float] = []
        self.idle: deque[set[tuple[int, int]]] = deque(maxlen=PERSISTENT - 1)  # of each interval: _idle
        self.slow = 0  # intervals in a row with less than STALLED of the usual speed

    def add(self, values: Record) -> None:
        """Take the values of the latest interval in. What was not measured or is not finite is left out."""
        loss, speed = values.get("loss"), _speed(values)
        if _finite(loss):
            self.losses.append(loss)
            if len(self.losses) >= WINDOW:
                self.lowest = min(self.lowest, self.level())
        if _finite(speed):
            self.slow = self.slow + 1 if self.speeds and speed < STALLED * median(self.speeds) else 0
            self.speeds.append(speed)
        self.idle.append(_idle(values))

    def level(self) -> float:
        """The loss of now: the median of the last WINDOW intervals."""
        return median(list(self.losses)[-WINDOW:])


def alerts_of(values: Record, history: History) -> dict[str, str]:
    """Kind of alert -> what is the matter, for one interval after those in `history`.

    - divergence: the median loss of the last WINDOW intervals, this one included, is over DIVERGED times the lowest
      that it ever was. (A loss that is not finite never gets here: mm_train.anomalies skips its step.)
    - spike: a loss above the median of the last RECENT intervals by SPIKE_DEVIATIONS robust standard deviations and by
      SPIKE_SHARE of it.
    - stall: less than STALLED of the run's median tokens a second, in PERSISTENT intervals in a row.
    - dead: an expert without a token in PERSISTENT intervals in a row.
    """
    found: dict[str, str] = {}
    loss, speed = values.get("loss"), _speed(values)
    if _finite(loss) and len(history.losses) >= WINDOW:
        now = median([*list(history.losses)[1 - WINDOW :], loss])
        if now > DIVERGED * history.lowest:
            found["divergence"] = f"the loss is {now:.3f} and was {history.lowest:.3f}"
    if _finite(loss) and len(history.losses) >= RECENT // 2:
        usual = median(history.losses)
        deviation = NORMAL * median(abs(x - usual) for x in history.losses)
        if loss > usual + max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * usual):
            found["spike"] = f"the loss is {loss:.3f}; the median of {len(history.losses)} intervals is {usual:.3f}"
    if _finite(speed) and len(history.speeds) >= SPEEDS:
        usual = median(history.speeds)
        if speed < STALLED * usual and history.slow + 1 >= PERSISTENT:
            found["stall"] = f"{short(speed)} tokens/s; the median of this run is {short(usual)}"
    if len(history.idle) == PERSISTENT - 1 and (dead := _idle(values).intersection(*history.idle)):
        layers = ", ".join(str(layer) for layer in sorted({layer for layer, _ in dead}))
        found["dead"] = f"experts without a token in {PERSISTENT} intervals in a row: {len(dead)}, in layers {layers}"
    return found


class Alerts:
    """Tells every kind of alert once, and again only after it was over.

    Args:
        metrics: takes the alerts.
        quiet_until: the step up to which idle experts are no news (optim.warmup_steps): at first the router has its
            favourites, and nearly every run has idle experts.
    """

    def __init__(self, metrics: Tells, quiet_until: int = 0) -> None:
        self.metrics, self.quiet_until = metrics, quiet_until
        self.history = History()
        self.raised: set[str] = set()

    def look(self, step: int, values: Record) -> None:
        """Judge the interval that ended after `step`; `values` are those of Metrics.train.

        Every interval is to be shown, also one whose steps were all skipped.
        """
        if step <= self.quiet_until:
            values = values | {"expert_load": None}
        found = alerts_of(values, self.history)
        for kind in [kind for kind in found if kind not in self.raised]:
            self.metrics.alert(step, TITLES[kind], found[kind], level=LEVELS.get(kind, "warn"))
        self.raised = set(found)
        self.history.add(values)


def _finite(value: Any) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _speed(values: Record) -> float | None:
    """Tokens a second; None for an interval whose steps were all skipped, which says nothing of the machine."""
    return values.get("tokens_per_second") or None


def _idle(values: Record) -> set[tuple[int, int]]:
    """(layer, expert) of those that got no token."""
    load = values.get("expert_load") or []
    return {(layer, expert) for layer, shares in enumerate(load) for expert, share in enumerate(shares) if share == 0}
