"""The items of benchmarks as runs of words, and the documents that share one: these must not be trained on.

An item is its question alone and with each answer. Of a text with at least `ngram` words, every run of that many
counts; of a shorter one, every run of `short_ngram`; one that is shorter still cannot be told from ordinary text, and
is counted as not covered. Runs that more than MAX_ITEMS items share are turns of phrase, not items.
"""

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import BenchmarksConfig
from data_prep.ngrams import Index, Words, find_words, search
from mm_train.cli import UserError, first_line

# Names of fields, in lower case, by what they hold; benchmarks differ little in them.
QUESTION = (
    *("context", "ctx", "question", "question_stem", "goal", "sentence", "problem", "prompt", "query", "input"),
    *("instruction", "text"),
)
ANSWERS = (
    *("choices", "options", "endings", "sol1", "sol2", "answera", "answerb", "answerc", "option1", "option2"),
    *("answer", "correct answer", "target", "solution", "canonical_solution", "code"),
)
PASSAGE = "passage"
MAX_ITEMS = 10
ITEMS_AT_A_TIME = 2000


@dataclass(frozen=True)
class Contamination:
    """A document that shares a run of words with an item: which words, which benchmark, which of its items (from 0)."""

    benchmark: str
    item: int
    words: str


class Benchmarks:
    """The index of all items, opened."""

    def __init__(self, folder: Path) -> None:
        """`folder` was written by `build`."""
        facts = json.loads((folder / "benchmarks.json").read_bytes())
        self.names, self.firsts = list(facts["items"]), np.array(facts["firsts"])
        self.indexes = [Index.load(folder, length) for length in facts["lengths"]]

    def search(self, texts: Sequence[str]) -> dict[int, Contamination]:
        """Text number -> what it shares with an item, for those that do."""
        found = {}
        for number, hit in search(self.indexes, texts).items():
            which = int(np.searchsorted(self.firsts, hit.owner, side="right")) - 1
            found[number] = Contamination(self.names[which], hit.owner - int(self.firsts[which]), hit.words)
        return found


def identity(config: BenchmarksConfig) -> str:
    """A hash of the items and of how they are compared; "" when there is nothing to compare with."""
    if not config.mirror and not config.extra:
        return ""
    hashed = sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name, entry in sorted(_mirror_files(config).items()):
        hashed.update(f"{name} {entry['sha256']}\n".encode())
    for file in _extra_files(config):
        hashed.update(file.read_bytes())
    return hashed.hexdigest()


def build(config: BenchmarksConfig, folder: Path) -> None:
    """Write the index of all items into `folder`. Raises UserError for a benchmark that cannot be read."""
    lengths = (config.ngram, config.short_ngram)
    runs: dict[int, list[np.ndarray]] = {length: [] for length in lengths}
    owners: dict[int, list[np.ndarray]] = {length: [] for length in lengths}
    counts: dict[str, int] = {}
    covered: dict[str, int] = {}
    total = 0
    for name, rows in _benchmarks(config):
        items = [texts_of(row, config.passages) for row in rows]
        known = np.zeros(len(items), dtype=np.bool_)
        for begin in range(0, len(items), ITEMS_AT_A_TIME):
            group = items[begin : begin + ITEMS_AT_A_TIME]
            words = find_words([text for texts in group for text in texts])
            item = np.repeat(np.arange(begin, begin + len(group)), [len(texts) for texts in group])
            for length, hashes, text in _choose(words, len(item), lengths):
                runs[length].append(hashes)
                owners[length].append((total + item[text]).astype(np.uint32))
                known[item[text]] = True
        counts[name], covered[name] = len(items), int(known.sum())
        total += len(items)
    folder.mkdir(parents=True, exist_ok=True)
    for length in lengths:
        _index(length, runs[length], owners[length]).save(folder)
    facts = {
        "lengths": lengths,
        "items": counts,
        "covered": covered,
        "firsts": np.cumsum([0, *counts.values()])[:-1].tolist(),
    }
    (folder / "benchmarks.json").write_text(json.dumps(facts))


def texts_of(row: dict[str, Any], passages: bool) -> list[str]:
    """The question of an item, and the question with each of its answers."""
    fields = {name.lower(): value for name, value in row.items()}
    stem = "\n".join(text for name in QUESTION for text in _strings(fields.get(name)))
    answers = [text for name in ANSWERS for text in _strings(fields.get(name))]
    texts = [stem] if stem else []
    if "_" in stem and "option1" in fields:  # WinoGrande: the answers belong into the gap
        texts += [stem.replace("_", answer) for answer in answers]
    else:
        texts += [f"{stem}\n{answer}" for answer in answers]
    return texts + (_strings(fields.get(PASSAGE)) if passages else [])


def _strings(value: Any) -> list[str]:
    """The texts in a field: a string, a list of them, or a struct with the texts under `text` or `value`."""
    if isinstance(value, dict):
        value = value.get("text", value.get("value"))
    if isinstance(value, str):
        return [value] if value else []
    return [text for text in value if isinstance(text, str) and text] if isinstance(value, list) else []


def _choose(words: Words, num_texts: int, lengths: tuple[int, int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(length, hashes, texts) of the runs that count."""
    size = np.bincount(words.texts, minlength=num_texts)
    for length, counts in ((lengths[0], size >= lengths[0]), (lengths[1], size < lengths[0])):
        hashes, first = words.runs(length)
        texts = words.texts[first]
        yield length, hashes[counts[texts]], texts[counts[texts]]


def _index(length: int, runs: list[np.ndarray], owners: list[np.ndarray]) -> Index:
    """Each run once, with its first owner, without those that many items share unless an item has no other."""
    hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *runs])
    owner = np.concatenate([np.zeros(0, dtype=np.uint32), *owners])
    order = np.lexsort((owner, hashes))
    hashes, owner = hashes[order], owner[order]
    new = np.ones(len(hashes), dtype=np.bool_)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    hashes, owner = hashes[new], owner[new]
    _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
    common = np.bincount(number, minlength=len(first))[number] > MAX_ITEMS
    has_other = np.zeros(int(owner.max(initial=0)) + 1, dtype=np.bool_)
    has_other[owner[~common]] = True
    keep = ~common | ~has_other[owner]
    hashes, owner = hashes[keep], owner[keep]
    unique, first = np.unique(hashes, return_index=True)
    return Index(length, unique, owner[first])


def _benchmarks(config: BenchmarksConfig) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(name, items) of every benchmark."""
    for name, entry in _mirror_files(config).items():
        yield name, _arrow(Path(str(config.mirror)) / f"{name}.arrow", entry["sha256"])
    for file in _extra_files(config):
        try:
            text = file.read_text(encoding="utf-8")
            rows = json.loads(text) if text.lstrip()[:1] in "[{" and file.suffix == ".json" else None
            if rows is None:
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            if isinstance(rows, dict):
                rows = next(value for value in rows.values() if isinstance(value, list))
            rows = [row for row in rows if isinstance(row, dict)]
        except (ValueError, StopIteration) as error:
            raise UserError(f"benchmark items {file} cannot be read: {first_line(error)}") from None
        yield file.stem, rows


def _arrow(file: Path, checksum: str) -> list[dict[str, Any]]:
    import pyarrow

    data = file.read_bytes() if file.is_file() else b""
    if sha256(data).hexdigest() != checksum:
        raise UserError(f"benchmark items {file} are not what mirror.json lists: run python -m eval.prepare_data again")
    return pyarrow.ipc.open_stream(pyarrow.py_buffer(data)).read_all().to_pylist()


def _mirror_files(config: BenchmarksConfig) -> dict[str, dict[str, Any]]:
    """ "PATH/NAME/SPLIT" -> entry of mirror.json (the format is eval.mirror's)."""
    if not config.mirror:
        return {}
    index = Path(config.mirror) / "mirror.json"
    try:
        return json.loads(index.read_bytes())["files"]
    except FileNotFoundError:
        raise UserError(
            f"no benchmark items in {config.mirror}: run python -m eval.prepare_data --out {config.mirror}, or set "
            "benchmarks.mirror=null to prepare text that is not compared with them"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{index} is damaged: run python -m eval.prepare_data again") from None


def _extra_files(config: BenchmarksConfig) -> list[Path]:
    files: set[str] = set()
    for pattern in config.extra:
        found = glob.glob(pattern, recursive=True)
        if not found:
            raise UserError(f"no benchmark items at {pattern}: no file matches")
        files.update(found)
    return [Path(file) for file in sorted(files)]
