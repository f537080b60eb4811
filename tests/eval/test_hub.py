"""The hub's client libraries, really run, against a small hub on this machine."""

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq

from eval.mirror import Mirror
from tests.data_prep.fake_hub import COMMIT, serving


def test_a_split_comes_from_the_hub_at_a_recorded_revision(tmp_path):
    rows = {"goal": ["g", "h"], "sol1": ["a", "b"], "sol2": ["c", "d"], "label": [0, 1]}
    (tmp_path / "hub/data").mkdir(parents=True)
    pq.write_table(pa.table(rows), tmp_path / "hub/data/validation-00000-of-00001.parquet")
    command = [sys.executable, "-m", "eval.prepare_data", "--source", "hub", "--tasks", "piqa,siqa"]
    with serving(tmp_path / "hub", "baber/piqa") as (address, _):
        online = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **online, "HF_DATASETS_OFFLINE": "0"}
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "out")], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    mirror = Mirror(tmp_path / "out")
    assert mirror.load_dataset("baber/piqa", split="validation").to_dict() == rows
    assert mirror.files["baber/piqa/default/validation"]["source"] == f"hub, revision {COMMIT}"
    assert "the hub does not give lighteval/siqa/default/validation" in done.stdout + done.stderr
