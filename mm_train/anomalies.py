"""What to do about a step whose loss or gradient is not right. Torch-free, and the same on every rank.

    verdict = anomalies.judge(loss, grad_norm)     # of the global batch, after the backward pass
    ok        apply the step
    skip      leave the step out: weights and moments stay as they are, the data moves on
    warn      apply the step, and tell that its loss is a spike
    rollback  go back to the last checkpoint and leave out the data since
    stop      end the run: `diverged` has the words

A loss or norm that is not finite is skipped; more than faults.max_skipped_steps in a row end the run. A loss is a
spike when it is above the median of the last WINDOW good ones by faults.spike_factor deviations. The deviation is
1.4826 times the median distance to that median, the standard deviation of a normal distribution: a few outliers move
neither. Spikes stay out of the window, so that one does not hide the next; LEVEL of them in a row are no spikes but
where the loss now is (other data, say), and the window starts anew.

`state` goes into every checkpoint, so that a resumed run decides as the uninterrupted one does.
"""

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from mm_train import config
from mm_train.cli import UserError

WINDOW = 64  # good losses that are remembered
ENOUGH = 16  # of them before anything is called a spike
LEVEL = 20  # spikes in a row that are a new level
NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
SMALLEST_DEVIATION = 1e-3  # of the median: a loss that hardly moves would make anything a spike


@dataclass(frozen=True)
class Verdict:
    """What to do with a step, and why; `reason` is "" for ok."""

    action: str  # ok | skip | warn | rollback | stop
    reason: str = ""


class Anomalies:
    """Judges one step after the other.

    All ranks must pass the same numbers (sums over all ranks), or they part ways.
    """

    def __init__(self, faults: config.Faults) -> None:
        self.faults = faults
        self.losses: list[float] = []  # the last good ones, oldest first
        self.skipped_steps = 0  # in the whole run
        self.skipped_in_a_row = 0
        self.spikes_in_a_row = 0
        self.rollbacks = 0

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """The verdict on a step: its loss in nats per token, its gradient norm before clipping."""
        reason = not_finite(loss, grad_norm)
        if reason:
            return self._skip(reason)
        self.skipped_in_a_row = 0
        reason = self._spike(loss)
        if reason:
            self.spikes_in_a_row += 1
            if self.spikes_in_a_row < LEVEL:
                return self._act(reason)
            self.losses = []
            reason += f"; {LEVEL} steps in a row: taken as the new level"
        self.spikes_in_a_row = 0
        self.losses = [*self.losses[1 - WINDOW :], loss]
        return Verdict("warn", reason) if reason else Verdict("ok")

    def roll_back(self, state: dict[str, Any]) -> None:
        """Take the checkpoint's state, and count the rollback: what was counted since is not forgotten."""
        skipped, rollbacks = self.skipped_steps, self.rollbacks + 1
        self.load(state)
        self.skipped_steps, self.rollbacks = skipped, rollbacks

    def state(self) -> dict[str, Any]:
        """Everything that later verdicts depend on, as JSON can hold it without loss."""
        return {
            "losses": list(self.losses),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spikes_in_a_row": self.spikes_in_a_row,
            "rollbacks": self.rollbacks,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a `state`; what is missing in it starts anew."""
        self.losses = [float(loss) for loss in state.get("losses", [])]
        self.skipped_steps = int(state.get("skipped_steps", 0))
        self.skipped_in_a_row = int(state.get("skipped_in_a_row", 0))
        self.spikes_in_a_row = int(state.get("spikes_in_a_row", 0))
        self.rollbacks = int(state.get("rollbacks", 0))

    def _skip(self, reason: str) -> Verdict:
        self.skipped_in_a_row += 1
        most = self.faults.max_skipped_steps
        if self.skipped_in_a_row > most:
            if most:
                reason += f", as in the {most} steps before it, which were skipped (faults.max_skipped_steps)"
            return Verdict("stop", reason)
        self.skipped_steps += 1
        return Verdict("skip", f"{reason}; skipped, {self.skipped_in_a_row} in a row of at most {most}")

    def _spike(self, loss: float) -> str:
        """Why this loss is a spike; "" when it is not, or spikes are not looked for."""
        if not self.faults.spike_factor or len(self.losses) < ENOUGH:
            return ""
        middle = median(self.losses)
        spread = NORMAL * median(abs(other - middle) for other in self.losses)
        deviation = max(spread, SMALLEST_DEVIATION * abs(middle))
        if loss <= middle + self.faults.spike_factor * deviation:
            return ""
        return (
            f"the loss is {loss:.4g}, {(loss - middle) / deviation:.1f} deviations above the median {middle:.4g} of the"
            f" last {len(self.losses)} good steps (faults.spike_factor {self.faults.spike_factor:g})"
        )

    def _act(self, reason: str) -> Verdict:
        """What faults.spike_action asks for."""
        action = self.faults.spike_action
        if action == "rollback" and self.rollbacks >= self.faults.max_rollbacks:
            return Verdict("stop", f"{reason}, after {self.rollbacks} rollbacks (faults.max_rollbacks)")
        return Verdict(action, reason)


def not_finite(loss: float, grad_norm: float) -> str:
    """Which of the two is not finite, in words; "" when both are."""
    wrong = []
    if not math.isfinite(loss):
        wrong.append(f"the loss is {loss}")
    if not math.isfinite(grad_norm):
        wrong.append(f"the gradient norm is {grad_norm}")
    return " and ".join(wrong)


def diverged(step: int, verdict: Verdict, last_checkpoint: object, optim: config.Optim) -> UserError:
    """The error that ends a run on the verdict "stop" in `step`, counted from 1."""
    where = f"the last checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint yet"
    return UserError(
        f"training diverged: in step {step} {verdict.reason}; {where}; try a lower optim.lr (now {optim.lr}) or more"
        f" optim.warmup_steps (now {optim.warmup_steps})"
    )
