import re
import xml.etree.ElementTree as ET

import pytest

from mm_train.dashboard import SECTIONS
from mm_train.metric_names import PHASES
from mm_train.metrics import Metrics
from mm_train.report_panels import POINTS, draw, drawn_sections, labels, load_history, thinned
from mm_train.run_folder import Stage, read_stage

pytest.importorskip("matplotlib")

PANELS = {panel.title: panel for section in SECTIONS for panel in section.panels}


@pytest.fixture
def stage(tmp_path) -> Stage:
    """A run of 5 intervals with everything that there is, resumed once."""
    metrics = Metrics(tmp_path, is_main=True, wandb_mode="disabled", config={}, project="p", run_name="r")
    metrics.run(stage="pretrain", global_batch_tokens=100, data_mixture={"code": 0.7, "docs": 0.3})
    for step in range(1, 6):
        metrics.train(
            step,
            tokens=step * 100,
            loss=9.0 - step,
            lr=1e-3,
            grad_norm=1.0,
            grad_norm_parts={"attention": 0.8, "router": 0.1},
            z_loss=9.0,
            router_entropy=[2.0, 1.9],
            router_entropy_share=0.9,
            dropped_fraction=0.01,
            expert_load=[[0.5 + step / 20, 0.5 - step / 20], [0.5, 0.5]],
            tokens_per_second=9000.0,
            tokens_per_second_per_gpu=4500.0,
            model_flops_per_second=1e9,
            mfu=0.4,
            step_seconds=1.0,
            phase_seconds=dict.fromkeys((*PHASES, "other"), 0.125),
            data_mixture={"code": 0.75, "docs": 0.25},
            memory_gib={"host": 1.0, "device": 20.0},
            skipped_steps=0,
            rollbacks=0,
        )
    metrics.checkpoint(3, seconds=1.0, stalled_seconds=0.1, bytes=10**6)
    metrics.validation(5, "code", loss=4.0, bits_per_byte=2.0)
    metrics.evaluation(3, scores={"piqa": 0.5, "boolq": 0.6}, average=0.55, bits_per_byte={"piqa": 2.0}, limit=None)
    metrics.skipped(4, float("nan"), 1.0, skipped_steps=1)
    metrics.run(stage="pretrain", global_batch_tokens=100, first_step=3, data_mixture={"code": 0.7, "docs": 0.3})
    metrics.close()
    return read_stage(tmp_path)


def test_every_panel_of_the_dashboard_is_drawn(stage):
    drawn = [chart.panel.title for _, charts in drawn_sections([stage]) for chart in charts]
    assert drawn == [title for title in PANELS if title not in ("Loss", "Held-out bits per byte")]
    for title in PANELS:
        chart = draw([stage], PANELS[title])
        ET.fromstring(chart.svg.replace("xlink:href", "href"))
        assert "#0a0b" not in chart.svg  # placeholder colours are all replaced
        assert not re.search(r'id="(?:FillBetween|PolyCollection|line2d)', chart.svg)  # ids would repeat on the page


def test_legends_name_what_differs(stage):
    def legend(title):
        return [label for label, _ in draw([stage], PANELS[title]).legend]

    assert legend("Gradient norm") == ["total", "attention", "router"]
    assert legend("Loss") == ["train", "validation/code"]
    assert legend("Where a step's time goes") == [*(p.replace("_", " ") for p in PHASES), "other"]
    assert legend("Memory") == ["host", "device"]
    assert legend("Router entropy") == legend("Learning rate") == []
    colours = [colour for _, colour in draw([stage], PANELS["Where a step's time goes"]).legend]
    assert len(set(colours)) == 8


def test_what_was_ordered_and_what_happened_is_marked(stage):
    dashed = r'stroke-dasharray="[^"]*"|stroke-dasharray: [\d.,]+'
    mixture, speed = (draw([stage], PANELS[title]).svg for title in ("Data mixture", "Tokens a second"))
    assert len(re.findall(dashed, speed)) == 2  # the resume and the skipped step
    assert len(re.findall(dashed, mixture)) == 4  # and two sources


def test_a_run_without_these_values_has_no_such_charts(tmp_path):
    metrics = Metrics(tmp_path, is_main=True, wandb_mode="disabled", config={}, project="p", run_name="r")
    metrics.train(1, tokens=100, loss=3.0, mfu=None, lr=1e-3)
    metrics.close()
    sections = list(drawn_sections([read_stage(tmp_path)]))
    assert [[chart.panel.title for chart in charts] for _, charts in sections] == [["Learning rate"]]


def test_labels():
    assert labels(["a/b/x", "a/c/x"]) == ["b", "c"]
    assert labels(["time/all_to_all", "time/data"]) == ["all to all", "data"]
    assert labels(["a", "a/b"]) == ["a", "a/b"]


def test_a_long_line_keeps_its_spikes():
    ys = [1.0] * 100_000
    ys[54_321], ys[77_777] = 9.0, -9.0
    xs, kept = thinned((list(range(100_000)), ys))
    assert len(xs) <= POINTS + 2
    assert (max(kept), xs[kept.index(9.0)]) == (9.0, 54_321)
    assert (min(kept), xs[kept.index(-9.0)]) == (-9.0, 77_777)
    assert xs == sorted(xs)
    assert thinned(([1, 2], [3, 4])) == ([1, 2], [3, 4])


def test_the_load_over_time(stage):
    first, second = load_history(stage)
    assert first == pytest.approx([1.1, 1.2, 1.3, 1.4, 1.5])
    assert second == [1.0] * 5
    stage.train = stage.train * 30
    assert len(load_history(stage)[0]) == 50
