import html.parser
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mm_train.metrics import Metrics
from mm_train.report import align, main, read_report, score_table, stage_table, summary

TASK = {"status": "ok", "reason": "", "metric": "acc_norm", "stderr": 0.05, "n": 50, "n_total": 500, "chance": 0.25}


def write_stage(folder: Path, name: str, first: float, last: float, *, finished: bool = True) -> None:
    """A run of 40 steps, written by what the trainer writes it with; one value in it is not finite."""
    metrics = Metrics(folder, is_main=True, wandb_mode="disabled", config={}, project="p", run_name=name)
    metrics.run(
        stage=name,
        model="tiny",
        total_steps=40,
        world=2,
        expert_parallel=2,
        params_total=3000,
        params_active=1000,
        global_batch_tokens=100,
    )
    for step in range(10, 50, 10):
        metrics.train(
            step,
            tokens=step * 100,
            loss=first + (last - first) * (step - 10) / 30,
            lr=1e-3 * (1 - step / 40),
            grad_norm=math.nan if step == 20 else 1.0,
            dropped_fraction=0.01,
            tokens_per_second=9000.0,
            seconds=step,
            mfu=None,
            expert_load=[[0.5, 0.25, 0.25, 0.0], [0.25] * 4],
        )
    metrics.validation(40, "code", loss=last, bits_per_byte=last / 2)
    if finished:
        metrics.done(40, seconds=9.0)
        (folder / "DONE").write_text("{}")
    metrics.close()
    (folder / "config.yaml").write_text(f"stage: {name}\n")


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Two stages, an export, an evaluation, held-out scores and samples, as a finished quickstart leaves them."""
    folder = tmp_path / "chain"
    write_stage(folder / "pretrain", "pretrain", 8.0, 3.0)
    write_stage(folder / "sft", "sft", 2.5, 2.0)
    (folder / "export").mkdir()
    (folder / "export" / "model.safetensors").write_bytes(b"0" * 1234)
    (folder / "export" / "config.json").write_text('{"quantization": {"format": "mobilemoe-int4-g32"}}')
    (folder / "eval").mkdir()
    tasks = {"piqa": TASK | {"score": 0.625}, "drop": TASK | {"score": None, "status": "missing", "reason": "no data"}}
    results = {"format": "int4", "limit": 50, "average": 0.625, "tasks": tasks}
    (folder / "eval" / "results.json").write_text(json.dumps(results))
    for name, loss in (("bf16", 2.0), ("int4", 2.02)):
        (folder / f"validation-{name}.json").write_text(json.dumps({"code": {"loss": loss, "bits_per_byte": 1.0}}))
    samples = [{"prompt": "def f(", "text": "x):\n    <script>alert(1)</script>", "kind": "continuation"}]
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    baselines = {"code": {"bytes": 9, "unigram_bits_per_byte": 2.9, "zstd19_bits_per_byte": 1.7}}
    (folder / "baselines.json").write_text(json.dumps(baselines))
    return folder


def test_the_tables_hold_what_was_measured(chain, data):
    report = read_report(chain, data)
    assert stage_table(report) == [
        ["stage", "steps", "tokens", "first loss", "last loss", "code", "tokens/s"],
        ["pretrain", "40", "4k", "8.000", "3.000", "1.500", "9k"],
        ["sft", "40", "4k", "2.500", "2.000", "1.000", "9k"],
        ["unigram entropy", "", "", "", "", "2.900", ""],
        ["zstd -19", "", "", "", "", "1.700", ""],
    ]
    assert score_table(report)[1:] == [
        ["piqa", "0.625", "0.050", "0.250", "50/500", "acc_norm"],
        ["drop", "", "", "", "", "missing: no data"],
    ]


def test_the_command_prints_the_summary_and_writes_the_page(chain, data, capsys):
    assert main([str(chain), "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "mobilemoe-int4-g32, 1,234 bytes (the same weights in bf16: 6,000)" in printed
    assert "held-out code: loss 2.0000 in bf16, 2.0200 in int4 (+1.00%)" in printed
    assert "Sample (continuation): def f( >>> x): <script>" in printed
    assert f"Report: {chain / 'report.html'}" in printed

    page = (chain / "report.html").read_text()
    assert "<script" not in page  # what a model wrote is shown, never run
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"\b(src|href)\s*=\s*[\"'](?!#)|url\((?!#)|@import", page)  # self-contained
    assert "drop" in page
    assert "missing: no data" in page


def test_every_tag_of_the_page_is_closed_and_every_chart_is_xml(chain, data, capsys):
    main([str(chain), "--data", str(data)])
    page = (chain / "report.html").read_text()
    opened: list[str] = []

    class Balance(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in {"meta", "br"}:
                opened.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Balance().feed(page)
    assert opened == []
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    # loss, one source, 8 panels of the dashboard, two load maps for each of two stages, one score bar
    assert len(charts) == 1 + 1 + 8 + 4 + 1
    for chart in charts:
        ET.fromstring(chart.replace("xlink:href", "href"))
        assert "#0a0b" not in chart  # placeholder colours are all replaced


def test_what_went_on_beside_training_is_told(tmp_path, capsys):
    write_stage(tmp_path, "pretrain", 8.0, 3.0)
    metrics = Metrics(tmp_path, is_main=True, wandb_mode="disabled", config={}, project="p", run_name="r")
    metrics.run(stage="pretrain", first_step=20, global_batch_tokens=100)
    metrics.checkpoint(20, seconds=2.0, stalled_seconds=0.25)
    metrics.checkpoint(40, seconds=2.0, stalled_seconds=0.5)
    for step in (21, 22):
        metrics.skipped(step, math.nan, 1.0, skipped_steps=step - 20)
    metrics.alert(30, "loss jumps", "<b>from 2 to 3</b>")
    metrics.close()
    assert main([str(tmp_path)]) == 0
    told = "training stood still 0.8 s for 2 checkpoints, 1 resume, 2 skipped steps, 1 alert"
    assert f"\npretrain: {told}\n" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert f"Pretrain: {told}." in page
    assert "loss jumps: &lt;b&gt;from 2 to 3" in page
    assert "<h2>Events</h2>" in page


def test_names_are_shown_as_they_are(tmp_path, capsys):
    write_stage(tmp_path / "run", 'a"<b>$x_1$', 2.0, 1.0)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"source": "code"', '"source": "<i>\\"$y$"'))
    assert main([str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<b>$" not in page
    assert "<i>" not in page.replace("<i style", "")
    assert page.count("&lt;b&gt;$x_1$") > 5
    for chart in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(chart.replace("xlink:href", "href"))


def test_the_same_run_gives_the_same_page(chain, tmp_path, capsys):
    for name in ("a.html", "b.html"):
        assert main([str(chain), "--out", str(tmp_path / "new" / name)]) == 0
    assert (tmp_path / "new" / "a.html").read_bytes() == (tmp_path / "new" / "b.html").read_bytes()


def test_a_single_unfinished_run_says_what_is_missing(tmp_path, capsys):
    write_stage(tmp_path / "run", "pretrain", 8.0, 3.0, finished=False)
    assert main([str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "pretrain (unfinished)" in printed
    assert "Benchmarks: not run yet" in printed
    assert "Release: not exported yet" in printed
    assert "Not run yet." in (tmp_path / "run" / "report.html").read_text()


def test_a_run_that_has_only_just_begun(tmp_path, capsys):
    metrics = Metrics(tmp_path, is_main=True, wandb_mode="disabled", config={}, project="p", run_name="r")
    metrics.run(stage="pretrain")
    metrics.close()
    assert main([str(tmp_path)]) == 0
    assert "pretrain (unfinished)      0" in capsys.readouterr().out


def test_stages_are_in_the_order_in_which_they_began(chain):
    for name, year in (("pretrain", "2002"), ("sft", "2001")):
        path = chain / name / "metrics.jsonl"
        path.write_text(re.sub(r'"time": "\d{4}', f'"time": "{year}', path.read_text()))
    assert [stage.name for stage in read_report(chain).stages] == ["sft", "pretrain"]


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda folder: None, ["nowhere"], "no such folder: .*nowhere"),
        (lambda folder: (folder / "empty").mkdir(), ["empty"], "no metrics.jsonl in .*empty"),
        (lambda folder: None, ["chain", "--data", "chain"], "no baselines.json in .*chain"),
        (lambda folder: (folder / "chain" / "samples.json").write_text("{"), ["chain"], r"cannot read .*samples.json"),
        (lambda folder: None, ["chain", "--out", "data/baselines.json/x.html"], r"cannot write the report .*x\.html"),
    ],
)
def test_bad_input_is_one_clear_line(chain, data, tmp_path, monkeypatch, capsys, prepare, arguments, message):
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(rf"error: {message}.*\n", captured.err)
    assert captured.out == ""


def test_align_puts_numbers_to_the_right():
    rows = [["name", "n", "note"], ["a", "1", "yes"], ["long", "100", ""]]
    assert align(rows).splitlines() == ["name    n  note", "---------------", "a       1  yes", "long  100"]


def test_the_summary_fits_without_held_out_sources(tmp_path, capsys):
    write_stage(tmp_path, "sft", 2.0, 1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line for line in path.open() if '"validation"' not in line))
    assert "bits per byte" not in summary(read_report(tmp_path), Path("page.html"))
