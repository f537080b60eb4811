"""A training job on the cluster of the tests, watched by the files that it writes."""

import json
from datetime import datetime
from pathlib import Path

from launch.restart import Start, read_starts
from mm_train import config
from tests.launch.cluster import OVER, Cluster

ROOT = Path(__file__).parents[2]
PATIENCE = 400.0  # for anything to happen, on a machine that is busy with other tests


class Job:
    """A training job on a cluster, watched by its files."""

    def __init__(self, cluster: Cluster, cfg: config.Config, *flags: str, stage: str = "pretrain", **variables: str):
        self.cluster, self.run = cluster, Path(cfg.run.dir)
        file = self.run.parent / f"{self.run.name}.yaml"
        config.save(cfg, file)
        script = ROOT / "launch" / f"slurm_{stage}.sh"
        words = [f"--chdir={ROOT}", f"--output={self.run.parent}/batch.log", *flags, script, file]
        self.id = cluster.submit(*words, cwd=ROOT, **{"MM_ROOT": str(ROOT), "MM_PREFLIGHT": "0"} | variables)

    @property
    def starts(self) -> list[Start]:
        return read_starts(self.run / "slurm/restarts.jsonl")

    @property
    def summary(self) -> str:
        return (self.run / "slurm/summary.log").read_text()

    @property
    def state(self) -> str:
        return self.cluster.job(self.id)["JobState"]

    def wait_for_steps(self, start: int, steps: int) -> int:
        """Until the start with this number (from 0) has done so many steps; the last one's number."""

        def there() -> int | None:
            assert self.state not in OVER, self.told()
            if len(self.starts) <= start or not (self.run / "metrics.jsonl").exists():
                return None
            assert len(self.starts) == start + 1, self.told()  # it has not failed meanwhile
            done, counts = list[int](), False
            for line in (self.run / "metrics.jsonl").read_text().splitlines(keepends=True):
                record = json.loads(line) if line.endswith("\n") else {}
                if record.get("kind") == "run":
                    began, mine = self.starts[start].began, datetime.fromisoformat(record["time"])
                    done, counts = [], mine >= datetime.fromisoformat(began)
                elif record.get("kind") == "train" and counts:
                    done.append(record["step"])
            return done[-1] if len(done) >= steps else None

        return self.cluster.until(there, PATIENCE, f"{steps} steps of start {start}")

    def wait(self) -> str:
        """The state when the job is over."""
        return self.cluster.wait(self.id, PATIENCE)["JobState"]

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        return int(json.loads((self.run / f"heartbeat/rank-{number:05d}.json").read_text())["pid"])

    def told(self) -> str:
        """All that the job has written, for a failed assertion."""
        logs = [self.run.parent / "batch.log", *sorted((self.run / "slurm").glob("*.log"))]
        logs += sorted((self.run / "slurm/ranks").glob("*.log"))
        return "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in logs if log.exists())
