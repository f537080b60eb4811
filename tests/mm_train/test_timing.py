import pytest
import torch

from mm_train import timing
from mm_train.metric_names import PHASES
from mm_train.timing import Clock, phase


class Time:
    """A clock that the test turns, as the host's and as a GPU's."""

    def __init__(self):
        self.now = 100.0
        self.waits = 0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch) -> Time:
    time = Time()
    monkeypatch.setattr(timing, "perf_counter", time)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.now

        def synchronize(self):
            time.waits += 1

        def query(self):
            return True

        def elapsed_time(self, end):
            return (end.at - self.at) * 1000

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    return time


@pytest.fixture(params=["cpu", "cuda"])
def clock(request, time) -> Clock:
    return Clock(torch.device(request.param))


def nonzero(clock: Clock) -> dict[str, float]:
    return {name: pytest.approx(seconds) for name, seconds in clock.seconds().items() if seconds}


def test_phases_add_up_and_start_at_zero(clock, time):
    assert clock.seconds() == dict.fromkeys(PHASES, 0.0)
    for _ in range(2):
        with clock.phase("forward"):
            time.now += 2
        time.now += 5  # no phase
        with clock.phase("data"):
            time.now += 1
    assert nonzero(clock) == {"forward": 4, "data": 2}
    clock.reset()
    assert nonzero(clock) == {}


def test_what_runs_inside_takes_its_time_out_of_the_phase_around_it(clock, time):
    with clock.phase("backward"):
        time.now += 1
        with clock.phase("all_to_all"):
            time.now += 10
        time.now += 2
        with clock.phase("all_to_all"):
            time.now += 20
        time.now += 3
    assert nonzero(clock) == {"backward": 6, "all_to_all": 30}


def test_validation_and_checkpoints_are_not_told_apart_inside(clock, time):
    with clock.phase("validation"), clock.phase("all_to_all"):
        time.now += 1
    with clock.phase("forward"):
        time.now += 1
    assert nonzero(clock) == {"validation": 1, "forward": 1}


def test_an_error_ends_its_phase(clock, time):
    def broken():
        with clock.phase("forward"), clock.phase("all_to_all"):
            time.now += 1
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        broken()
    time.now += 7
    with clock.phase("optimizer"):
        time.now += 1
    assert nonzero(clock) == {"all_to_all": 1, "optimizer": 1}


def test_a_reset_within_a_phase_counts_from_there(clock, time):
    with clock.phase("forward"):
        time.now += 5
        clock.reset()
        time.now += 2
    assert nonzero(clock) == {"forward": 2}


def test_a_gpu_is_not_waited_for_before_the_sums_are_read(time):
    clock = Clock(torch.device("cuda"))
    for _ in range(timing.UNREAD):
        with clock.phase("forward"):
            time.now += 1
            with clock.phase("all_to_all"):
                time.now += 0.5
    assert time.waits == 0
    assert len(clock._unread) <= timing.UNREAD + 1  # what has happened is added up meanwhile
    assert nonzero(clock) == {"forward": timing.UNREAD, "all_to_all": timing.UNREAD / 2}
    assert time.waits > 0


def test_no_clock_is_no_phase():
    with phase(None, "forward"):
        pass


def test_an_unknown_phase_is_refused(clock):
    with pytest.raises(AssertionError, match="unknown phase lunch"), clock.phase("lunch"):
        pass


def test_the_backward_pass_may_time_from_its_own_thread():
    clock = Clock(torch.device("cpu"))

    class Timed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            with clock.phase("all_to_all"):
                return grad * 2

    x = torch.ones(3, requires_grad=True)
    with clock.phase("forward"):
        loss = Timed.apply(x).sum()
    with clock.phase("backward"):
        loss.backward()
    seconds = clock.seconds()
    assert all(seconds[name] > 0 for name in ("forward", "backward", "all_to_all"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_work_of_a_gpu_is_counted_where_it_was_started():
    device = torch.device("cuda")
    clock = Clock(device)
    x = torch.randn(4096, 4096, device=device)
    (x @ x).sum().item()  # the first product sets things up
    clock.reset()
    with clock.phase("forward"):
        for _ in range(20):
            x @ x
        with clock.phase("all_to_all"):
            for _ in range(200):
                x @ x
    seconds = clock.seconds()
    assert seconds["all_to_all"] > 3 * seconds["forward"] > 0
