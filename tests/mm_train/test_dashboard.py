import fnmatch
import re
import sys

import pytest

from mm_train.cli import UserError
from mm_train.dashboard import SECTIONS, create, main, outline, regex, workspace
from mm_train.metric_names import GROUPS, NAMES

PANELS = [panel for section in SECTIONS for panel in section.panels]
PRODUCED = {name for names in NAMES.values() for name in names.values()}


def test_every_metric_of_a_panel_is_one_that_is_recorded():
    for panel in PANELS:
        for metric in panel.metrics:
            fitting = [name for name in PRODUCED if fnmatch.fnmatch(metric, name) or fnmatch.fnmatch(name, metric)]
            assert fitting, f"{panel.title}: nothing is recorded as {metric}"


def test_everything_recorded_is_on_the_dashboard():
    shown = {metric for panel in PANELS for metric in panel.metrics}
    absent = {name for name in PRODUCED if not any(fnmatch.fnmatch(name, m) or fnmatch.fnmatch(m, name) for m in shown)}
    assert absent == {"train/tokens", "time/since_start"}  # what other values are drawn over
    assert {metric.split("/")[0] for metric in shown} == set(GROUPS)


def test_titles_are_different():
    assert len({panel.title for panel in PANELS}) == len(PANELS)


def test_a_pattern_as_a_regular_expression():
    pattern = re.compile(regex(("train/loss", "validation/*/loss")))
    names = ["train/loss", "validation/code/loss", "train/loss_of_time", "validation/code/bits", "xtrain/loss"]
    assert [name for name in names if pattern.search(name)] == ["train/loss", "validation/code/loss"]


def test_the_workspace_has_the_panels():
    pytest.importorskip("wandb_workspaces")
    spec = workspace("my-project", "me", "my view")._to_model().spec.model_dump(by_alias=True, exclude_none=True)
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [section.name for section in SECTIONS]
    charts = [panel["config"] for section in sections for panel in section["panels"]]
    assert [chart["chartTitle"] for chart in charts] == [panel.title for panel in PANELS]
    assert {chart["xAxis"] for chart in charts} == {"step"}
    for chart, panel in zip(charts, PANELS, strict=True):
        drawn = chart["metrics"] or [chart["metricRegex"]]
        assert drawn == (list(panel.metrics) if chart["metrics"] else [regex(panel.metrics)])
        assert (chart["plotType"] == "stacked-area") is panel.stacked


def test_a_dry_run_prints_the_panels(capsys):
    assert main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed == outline() + "\n"
    assert "  Gradient norm: grad_norm/*\n" in printed


def test_without_login_or_package_there_is_one_clear_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["--project", "p"]) == 2
    assert capsys.readouterr().err == "error: nobody is logged in to W&B here: wandb login, or set WANDB_API_KEY\n"
    with pytest.raises(
        UserError, match=r"^W&B did not take the dashboard of me/p \(is there a run in that project\?\):"
    ):
        create("p", "me", "n")
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match="the dashboard needs wandb-workspaces"):
        create("p", "me", "n")
