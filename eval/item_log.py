"""What a model has answered so far, on disk: lines are only appended, so an evaluation that was killed loses nothing
that it finished, and goes on in any number of processes.

A folder belongs to one model (by hash) and has a file for each rank that ever worked there. A line is
{"key": hash of the request, "answer": [nats, greedy] or text}; the last line of a killed process may be half a line.
"""

import json
from pathlib import Path
from typing import Any

Answer = tuple[float, bool] | str


class ItemLog:
    """Answers by request hash: those of all files at the time of opening, and those added here."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        folder.mkdir(parents=True, exist_ok=True)
        self.answers: dict[str, Answer] = {}
        for file in sorted(folder.glob("rank-*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    self.answers[entry["key"]] = _answer(entry["answer"])
                except (ValueError, KeyError, TypeError):
                    continue  # the half line of a killed process
        self._file = (folder / f"rank-{rank}.jsonl").open("ab")
        if self._file.tell():
            self._file.write(b"\n")  # what comes next is not the rest of a half line
            self._file.flush()

    def add(self, answers: dict[str, Answer]) -> None:
        """Append new answers; they survive the end of this process."""
        lines = (json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items())
        self._file.write("".join(lines).encode())
        self._file.flush()
        self.answers |= answers

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _answer(value: Any) -> Answer:
    if isinstance(value, str):
        return value
    nats, greedy = value
    return float(nats), bool(greedy)
