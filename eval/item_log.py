"""What a model has answered so far, on disk: lines are only appended, so an evaluation that was killed loses nothing
that it finished, and goes on in any number of processes.

A folder belongs to one model (by hash) and has a file for each rank that ever worked there. A line is
{"key": hash of the request, "answer": [nats, greedy] or text}; the last line of a killed process may be half a line.
After the answers of a batch there may be a line of what they used of the model's experts, all together:
{"benchmark": name, "requests": how many answers, "experts": counts (eval.expert_counts)}.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Answer = tuple[float, bool] | str
READ, SCORED = 0, 1  # the first axis of counts of experts


@dataclass
class Used:
    """How often each expert was chosen for `requests` answers of a benchmark: [2, L, E], see eval.expert_counts."""

    requests: int
    counts: np.ndarray

    def __add__(self, other: "Used") -> "Used":
        return Used(self.requests + other.requests, self.counts + other.counts)


def add_used(total: dict[str, Used], more: dict[str, Used]) -> None:
    """Add to `total`, by benchmark."""
    for name, used in more.items():
        total[name] = total[name] + used if name in total else used


class ItemLog:
    """Answers by request hash: those of all files at the time of opening, and those added here."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        folder.mkdir(parents=True, exist_ok=True)
        self.answers: dict[str, Answer] = {}
        self.used: dict[str, Used] = {}
        for file in sorted(folder.glob("rank-*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    if "experts" in entry:
                        counts = np.array(entry["experts"], dtype=np.int64)
                        add_used(self.used, {entry["benchmark"]: Used(int(entry["requests"]), counts)})
                    else:
                        self.answers[entry["key"]] = _answer(entry["answer"])
                except (ValueError, KeyError, TypeError):
                    continue  # the half line of a killed process
        self._file = (folder / f"rank-{rank}.jsonl").open("ab")
        if self._file.tell():
            self._file.write(b"\n")  # what comes next is not the rest of a half line
            self._file.flush()

    def add(self, answers: dict[str, Answer], used: dict[str, Used] | None = None) -> None:
        """Append new answers, and what they used of the experts; both survive the end of this process."""
        lines = [json.dumps({"key": key, "answer": answer}) for key, answer in answers.items()]
        for name, found in (used or {}).items():
            entry = {"benchmark": name, "requests": found.requests, "experts": found.counts.tolist()}
            lines.append(json.dumps(entry, separators=(",", ":")))
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        self.answers |= answers
        add_used(self.used, used or {})

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _answer(value: Any) -> Answer:
    if isinstance(value, str):
        return value
    nats, greedy = value
    return float(nats), bool(greedy)
