import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_prep.config import SourceConfig, load
from data_prep.documents import Document
from data_prep.sources import find_input, read
from mm_train.cli import UserError
from tests.data_prep.fake_hub import COMMIT, serving

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PAIR = Document(messages=tuple(CHAT))

# A row of each data set of configs/data as its card shows it, the file that holds it, and the document in it.
LAYOUTS = {
    "HuggingFaceFW/fineweb-edu": ("data/CC-MAIN-2024-10/train-00000-of-00014.parquet", {"text": "t", "url": "u"}),
    "open-web-math/open-web-math": ("data/train-00000-of-00114.parquet", {"url": "u", "text": "t", "date": "d"}),
    "HuggingFaceTB/finemath": ("finemath-3plus/train-00000-of-00128.parquet", {"url": "u", "text": "t", "score": 3.0}),
    "typeof/algebraic-stack": ("data/train-00000-of-00010.parquet", {"text": "t", "meta": "{}"}),
    "bigcode/starcoderdata": ("python/train-00000-of-00059.parquet", {"max_stars_count": 1, "id": "1", "content": "t"}),
    "wikimedia/wikipedia": ("20231101.en/train-00000-of-00041.parquet", {"id": "1", "title": "T", "text": "t"}),
    "HuggingFaceTB/cosmopedia": ("data/web_samples_v2/train-00000-of-00118.parquet", {"prompt": "p", "text": "t"}),
    "common-pile/stackexchange_filtered": ("0000.json.gz", {"id": "1", "text": "t", "source": "s", "metadata": {}}),
    "common-pile/arxiv_papers_filtered": ("0000.json.gz", {"id": "1", "text": "t", "source": "s", "metadata": {}}),
    "allenai/dolmino-mix-1124": ("data/{part}/0000.json.gz", {"id": "1", "text": "t", "source": "s"}),
    "nvidia/Nemotron-Pretraining-Code-v1": ("Synthetic-Code/part_0.parquet", {"id": "1", "text": "t"}),
    "nvidia/Nemotron-CC-Math-v1": ("4plus/part_0.parquet", {"id": "1", "text": "t", "metadata": {"score": 4}}),
    "nvidia/OpenMathReasoning": ("data/cot-00000-of-00144.parquet", {"problem": "q", "generated_solution": "a"}),
    "nvidia/Nemotron-Post-Training-Dataset-v2": ("data/math-00000-of-00002.parquet", {"uuid": "1", "messages": CHAT}),
    "allenai/tulu-3-sft-olmo-2-mixture": ("data/train-00000-of-00006.parquet", {"id": "1", "messages": CHAT}),
    "nvidia/OpenCodeReasoning-2": ("train/python-00000.parquet", {"id": "1", "question": "q", "r1_generation": "a"}),
    "allenai/coconot": ("original/train-00000-of-00001.parquet", {"id": "1", "prompt": "q", "response": "a"}),
    "nvidia/Llama-Nemotron-Post-Training-Dataset": ("SFT/safety/safety.jsonl", {"input": CHAT[:1], "output": "a"}),
    "nvidia/OpenScienceReasoning-2": ("data/train-00000-of-00010.jsonl", {"input": "q", "output": "a"}),
    "NousResearch/hermes-function-calling-v1": ("func-calling.json", {"id": "1", "conversations": SHAREGPT}),
    "open-thoughts/OpenThoughts3-1.2M": ("data/train-00000-of-00120.parquet", {"conversations": SHAREGPT}),
}  # fmt: skip


def write_rows(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_bytes(gzip.compress(lines) if file.suffix == ".gz" else lines)


def write_card(folder: Path, name: str | None, split: str, pattern: str) -> None:
    """The head of a README.md that says which files a split of a configuration has."""
    config = {"config_name": name or "default", "data_files": [{"split": split, "path": pattern}]}
    (folder / "README.md").write_text("---\n" + yaml.safe_dump({"configs": [config]}) + "---\n")


def shipped() -> list:
    return [
        pytest.param(source, id=f"{file.stem}-{name}")
        for file in sorted(Path("configs/data").glob("*.yaml"))
        for name, source in load(file).sources.items()
        if source.kind == "hub"
    ]


@pytest.mark.parametrize("source", shipped())
def test_every_shipped_source_reads_the_layout_of_its_data_set(tmp_path, source):
    file, row = LAYOUTS[source.path]
    file = file.format(part=source.include[0].split("/")[1] if source.include else "")
    write_rows(tmp_path / file, [row, row])
    write_card(tmp_path, source.name, source.split, file)
    local = replace(source, path=str(tmp_path))
    (part,) = find_input("x", local, 1 << 30).parts
    expected = PAIR if source.domain in ("chat", "safety", "tools", "reasoning") or source.prompt else Document("t")
    if source.column == "messages":
        expected = PAIR
    assert list(read(local, part)) == [expected, expected]


def local(tmp_path: Path, **values) -> SourceConfig:
    for split in ("train", "test"):
        for i in range(3):
            write_rows(tmp_path / f"data/{split}-{i:05d}-of-00003.parquet", [{"text": f"{split} {i}"}])
    return SourceConfig("hub", "CC0-1.0", "web", path=str(tmp_path), **values)


def texts(source: SourceConfig) -> list[str]:
    return [document.text for part in find_input("x", source, 1).parts for document in read(source, part)]


def test_splits_and_names_of_a_folder(tmp_path):
    assert texts(local(tmp_path)) == ["train 0", "train 1", "train 2"]
    assert texts(local(tmp_path, split="test")) == ["test 0", "test 1", "test 2"]
    assert texts(local(tmp_path, include=["data/*-00001-*"])) == ["train 1"]
    with pytest.raises(UserError, match=r"has no split 'dev': it has train, test"):
        texts(local(tmp_path, split="dev"))
    with pytest.raises(UserError, match=r"has no file like \*\.zst in its split 'train'"):
        texts(local(tmp_path, include=["*.zst"]))
    with pytest.raises(UserError, match=r"data set .*: BuilderConfig 'nonsense' not found"):
        texts(local(tmp_path, name="nonsense"))


def test_a_snapshot_of_another_revision_is_refused(tmp_path):
    commit = "0123456789" * 4
    folder = tmp_path / "snapshots" / commit
    assert find_input("x", local(folder, revision=commit), 1).commit == commit
    assert find_input("x", local(folder, revision=commit[:8]), 1).commit == commit
    with pytest.raises(UserError, match=rf"is a snapshot of revision {commit}, not of main"):
        find_input("x", local(folder, revision="main"), 1)


@pytest.fixture
def hub(tmp_path, byte_tokenizer):
    """A hub with org/texts, two parquet files; a preparation of it in a process of its own; requests; its folder."""
    byte_tokenizer.save(tmp_path / "tokenizer")
    data = tmp_path / "hub"
    for i in range(2):
        write_rows(data / f"data/train-{i:05d}-of-00002.parquet", [{"text": f"text {i} {j} " * 20} for j in range(50)])
    write_card(data, None, "train", "data/train-*")
    with serving(data, "org/texts") as (address, requests):
        environment = {
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",  # other tests forbid this process the hub
            "HF_DATASETS_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_DATASETS_CACHE": str(tmp_path / "home/datasets"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

        def prepare(**values) -> subprocess.CompletedProcess:
            common = {"kind": "hub", "path": "org/texts", "licence": "CC0-1.0", "domain": "web"}
            config = {
                "out": str(tmp_path / "out"),
                "tokenizer": {"kind": "folder", "path": str(tmp_path / "tokenizer")},
                "sources": {"texts": {**common, **values}},
                "part_bytes": 2000,
            }
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
            command = [sys.executable, "-m", "data_prep.run", str(tmp_path / "config.yaml"), "--workers", "1"]
            return subprocess.run(
                command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=300
            )

        yield prepare, requests, tmp_path / "out"


def test_a_data_set_of_the_hub_at_its_commit(hub):
    prepare, requests, out = hub
    done = prepare(revision="main")
    assert done.returncode == 0, done.stderr
    source = json.loads((out / "dataset.json").read_text())["sources"]["texts"]
    assert source["revision"] == COMMIT
    assert source["train"]["documents"] + source["val"]["documents"] == 100
    assert any(f"/resolve/{COMMIT}/data/train-00000" in request for request in requests)


@pytest.mark.slow
def test_a_downloaded_data_set_is_that_which_is_streamed(hub):
    prepare, _, out = hub
    assert prepare(revision="main").returncode == 0
    streamed = (out / "texts" / "train" / "00000.tar").read_bytes()
    shutil.rmtree(out)
    assert prepare(revision=COMMIT, streaming=False).returncode == 0
    assert (out / "texts" / "train" / "00000.tar").read_bytes() == streamed


@pytest.mark.slow
def test_what_the_hub_does_not_have_is_one_line(hub):
    prepare, _, _ = hub
    for values, message in (
        ({"revision": "v9"}, "data set org/texts, revision v9: "),
        ({"path": "org/other"}, "data set org/other: "),
        ({"split": "test"}, "data set org/texts has no split 'test': it has train"),
        ({"column": "body"}, "has no column 'body': it has text"),
    ):
        done = prepare(**values)
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        assert line.startswith("error: ")
        assert message in line
