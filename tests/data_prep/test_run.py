import contextlib
import fcntl
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import yaml
import zstandard

from data_prep import run
from data_prep.machine import LIBRARY
from mm_train.shards import ShardReader, check_one_tokenizer
from mm_train.tokenizer import load_tokenizer


@pytest.fixture
def config(tmp_path) -> Path:
    """A small data set: some library modules as text files, and conversations."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("bisect", "heapq", "textwrap", "shlex", "queue", "copy", "cmd", "csv", "fractions", "glob"):
        (texts / f"{name}.py").write_bytes((LIBRARY / f"{name}.py").read_bytes())
    (texts / "twice.py").write_bytes((LIBRARY / "glob.py").read_bytes())
    rows = [
        {"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": str(i + 1)}]}
        for i in range(200)
    ]
    rows.append({"messages": [{"role": "user", "content": "long?"}, {"role": "assistant", "content": "so " * 200}]})
    (texts / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"kind": "files", "licence": "PSF-2.0"}
    content = {
        "out": str(tmp_path / "out"),
        "validation_fraction": 0.2,
        "shard_tokens": 5_000,
        "tokenizer": {"kind": "train_bpe", "vocab_size": 600},
        "sources": {
            "code": {**common, "domain": "code", "paths": [f"{texts}/*.py"]},
            "chat": {
                **common,
                "domain": "chat",
                "paths": [f"{texts}/chat.jsonl"],
                "layout": "packed",
                "row_length": 65,
            },
        },
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def prepare(config: Path, *arguments: str) -> int:
    return run.main([str(config), "--workers", "1", *arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_data_set_from_end_to_end(config, tmp_path, capsys):
    assert prepare(config) == 0
    out = tmp_path / "out"
    summary = json.loads((out / "dataset.json").read_text())
    readers = {
        (name, split): ShardReader(out / name / split) for name in ("code", "chat") for split in ("train", "val")
    }
    tokenizer = load_tokenizer(out)
    check_one_tokenizer([reader.manifest for reader in readers.values()], tokenizer.sha256)
    assert tokenizer.vocab_size == summary["vocab_size"] == 600

    originals = {file.read_text() for file in (tmp_path / "texts").glob("*.py")}
    found = [tokenizer.decode(tokens) for split in ("train", "val") for tokens, _ in readers["code", split].documents()]
    assert len(found) == len(originals) == 10
    assert set(found) == originals
    assert readers["code", "val"].manifest.num_documents > 0
    assert len(readers["code", "train"].manifest.shards) > 1
    for (name, split), reader in readers.items():
        facts = summary["sources"][name][split]
        assert (facts["tokens"], facts["documents"]) == (reader.num_tokens, reader.manifest.num_documents)
        assert facts["manifest_sha256"] == reader.manifest.sha256
        assert (reader.manifest.licence, reader.manifest.domain) == ("PSF-2.0", name)
    assert summary["sources"]["code"]["dropped"] == {
        "duplicate": {"documents": 1, "bytes": len((LIBRARY / "glob.py").read_bytes()), "examples": []}
    }
    assert summary["sources"]["chat"]["dropped"] == {
        "longer than a row": {"documents": 1, "bytes": 605, "examples": []}
    }
    tokens, mask, _ = readers["chat", "train"].window(0, 64)
    assert tokenizer.decode(tokens[mask], skip_special=False).replace("<|eot|>", "").isdigit()

    scores = json.loads((out / "baselines.json").read_text())
    assert set(scores) == {"code", "chat"}
    assert 0 < scores["code"]["unigram_bits_per_byte"] < 8
    assert sorted(os.listdir(out)) == sorted(
        ["baselines.json", "chat", "code", "dataset.json", "tokenizer.json", "tokenizer_config.json"]
    )
    printed = capsys.readouterr().out
    assert "left out of code: 1 duplicate" in printed
    assert "left out of chat: 1 longer than a row" in printed


def test_two_runs_are_byte_identical_whatever_the_workers(config, tmp_path):
    assert prepare(config) == 0
    assert run.main([str(config), "--workers", "3", "--out", str(tmp_path / "again")]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_a_second_run_does_only_what_has_changed(config, tmp_path, capsys):
    out = tmp_path / "out"
    overrides = ["tokenizer.kind=folder", f"tokenizer.path={tmp_path / 'fixed'}"]
    assert prepare(config) == 0
    load_tokenizer(out).save(tmp_path / "fixed")
    assert prepare(config, *overrides) == 0  # the same tokenizer, so the same shards
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.tar")}

    capsys.readouterr()
    assert prepare(config, *overrides) == 0
    assert "up to date" in capsys.readouterr().out
    (tmp_path / "texts" / "chat.jsonl").write_text((tmp_path / "texts" / "chat.jsonl").read_text() + "\n")
    assert prepare(config, *overrides) == 0
    after = {file: file.stat().st_mtime_ns for file in out.rglob("*.tar")}
    changed = {file.relative_to(out).parts[0] for file in before if before[file] != after[file]}
    assert changed == {"chat"}

    (out / "code" / "val" / "00000.tar").unlink()
    assert prepare(config, *overrides) == 0
    ShardReader(out / "code" / "val").verify()


def kill_and_continue(config: Path, out: Path, whole: Path, kills: int, longest: float, seed: int) -> dict[str, int]:
    """Prepare with 2 workers, killed `kills` times at random instants: half of the time the parent, else a worker.

    Every completed run has to equal `whole`; after one, the next begins from nothing. Returns what was struck when.
    """
    command = [sys.executable, "-m", "data_prep.run", str(config), "--workers", "2", "--out", str(out)]
    chance, struck = random.Random(seed), dict.fromkeys(["starting", "reading", "encoding", "publishing"], 0)
    while sum(struck.values()) < kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0.3, longest))
        if process.poll() is None:
            work = out / ".work"
            step = (
                "publishing" if any(work.glob("*/shards-*/joined"))
                else "encoding" if any(work.glob("*/shards-*"))
                else "reading" if any(work.glob("*/read-*"))
                else "starting"
            )  # fmt: skip
            struck[step] += 1
            workers = [int(pid) for pid in children(process.pid)]
            victim = chance.choice([process.pid, *workers])
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            assert process.wait(120) in ((-signal.SIGKILL,) if victim == process.pid else (2, 0))
        if process.returncode == 0:
            assert files(out) == files(whole)
            shutil.rmtree(out)
        for manifest in out.glob("*/*/manifest.json"):
            ShardReader(manifest.parent).verify()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert files(out) == files(whole)
    return struck


def children(parent: int) -> list[str]:
    """Processes that `parent` has started."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return []


def test_killed_at_any_moment_it_continues_and_leaves_no_half_file(config, tmp_path):
    assert prepare(config, "--out", str(tmp_path / "whole")) == 0
    kill_and_continue(config, tmp_path / "out", tmp_path / "whole", 3, 4.0, 1)


@pytest.mark.slow
def test_killed_twenty_times(config, tmp_path, capsys):
    content = yaml.safe_load(config.read_text())
    content.update(part_bytes=300_000, shard_tokens=60_000, tokenizer={"kind": "train_bpe", "vocab_size": 2000})
    content["sources"]["code"].update(paths=[f"{LIBRARY}/[a-p]*.py"])
    config.write_text(yaml.safe_dump(content))
    start = time.monotonic()
    assert prepare(config, "--out", str(tmp_path / "whole")) == 0
    seconds = time.monotonic() - start
    struck = kill_and_continue(config, tmp_path / "out", tmp_path / "whole", 20, 1.2 * seconds, 2)
    with capsys.disabled():
        shards = len(list((tmp_path / "whole").rglob("*.tar")))
        print(f"\n20 kills {struck}: {shards} shards identical to those of the undisturbed run ({seconds:.1f} s)")


def test_ranks_share_a_preparation(config, tmp_path, capsys):
    content = yaml.safe_load(config.read_text())
    content.update(part_bytes=20_000)
    config.write_text(yaml.safe_dump(content))
    assert prepare(config, "--out", str(tmp_path / "whole")) == 0
    ranks = [["--out", str(tmp_path / "out"), "--world", "3", "--wait", "0", "--rank", str(rank)] for rank in range(3)]
    assert prepare(config, *ranks[0]) == 75
    assert "rank 0 of 3 has done its part of the step 'read'" in capsys.readouterr().err
    statuses = [[prepare(config, *arguments) for arguments in ranks] for _ in range(5)]
    assert 0 in [status for some in statuses for status in some]
    assert files(tmp_path / "out") == files(tmp_path / "whole")

    command = [sys.executable, "-m", "data_prep.run", str(config), "--workers", "1", "--out", str(tmp_path / "again")]
    together = [subprocess.Popen([*command, "--world", "2", "--rank", str(rank)]) for rank in range(2)]
    assert [process.wait(120) for process in together] == [0, 0]
    assert files(tmp_path / "again") == files(tmp_path / "whole")


@pytest.mark.parametrize("forked", [False, True])
def test_workers_die_with_a_killed_parent(tmp_path, forked):
    script = (
        "import time\n"
        "from data_prep.workers import processes\n"
        "if __name__ == '__main__':\n"
        "    import os\n"
        f"    with processes(2, {forked}) as pool:\n"
        "        print(pool.call(os.getpid), flush=True)\n"
        "        time.sleep(60)\n"
    )
    file = tmp_path / "parent.py"
    file.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(run.__file__).parent.parent)}
    parent = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, env=environment, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_llama3_tokenizer(config, tmp_path):
    pytest.importorskip("llama_models", reason="the llama3 extra is not installed")
    assert prepare(config, "tokenizer.kind=llama3") == 0
    reader = ShardReader(tmp_path / "out" / "code" / "train")
    assert reader.manifest.vocab_size == 128256
    tokens, _ = next(iter(reader.documents()))
    assert (tokens[0], tokens[-1]) == (128000, 128001)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_conversations_in_a_stream_are_trained_on_in_their_answers_alone(config, tmp_path):
    stream = ["sources.chat.layout=stream", "sources.chat.row_length=null"]
    assert prepare(config, *stream) == 0
    reader = ShardReader(tmp_path / "out" / "chat" / "train")
    assert (reader.manifest.layout, reader.manifest.has_mask) == ("stream", True)
    assert not ShardReader(tmp_path / "out" / "code" / "train").manifest.has_mask
    tokenizer = load_tokenizer(tmp_path / "out")
    answers = [tokenizer.decode(tokens[mask], skip_special=False) for tokens, mask in reader.documents()]
    assert len(answers) > 100
    assert all(answer.removesuffix("<|eot|>").isdigit() for answer in answers if not answer.startswith("so "))


def test_nothing_held_out_is_said(config, capsys):
    assert prepare(config, "validation_fraction=0") == 0
    assert "warning: nothing is held out of code" in capsys.readouterr().out


BAD = {
    "config file not found: ": ["nowhere.yaml"],
    "unknown key shard_token (did you mean shard_tokens?)": ["CONFIG", "shard_token=3"],
    "no document source at /nowhere/*.txt": ["CONFIG", "sources.code.paths=[/nowhere/*.txt]"],
    "source code is empty: no document is left to train on (dropped shorter than min_bytes: 11;": [
        "CONFIG",
        "sources.code.min_bytes=1000000",
    ],
    "no tokenizer at /nowhere": ["CONFIG", "tokenizer.kind=folder", "tokenizer.path=/nowhere"],
    "too little to learn 60000 tokens": ["CONFIG", "tokenizer.vocab_size=60000"],
    "has no column 'body': it has messages": ["CONFIG", "sources.chat.column=body"],
    "the weights of all sources add up to 0": ["CONFIG", "sources.code.weight=0", "sources.chat.weight=0"],
    "no benchmark items in /nowhere: run python -m eval.prepare_data": ["CONFIG", "benchmarks.mirror=/nowhere"],
    "filter gopher_quality: ": ["CONFIG", "sources.code.filters={gopher_quality: {min_wrods: 5}}"],
    "--rank is 3; it must lie in 0..2, below --world": ["CONFIG", "--rank", "3", "--world", "3"],
    "a corpus file ends in .parquet": ["CONFIG", "sources.code.paths=[TEXTS/../config.yaml]"],
    "cannot read TEXTS/half.jsonl.gz: ": ["CONFIG", "sources.code.paths=[TEXTS/*.gz]"],
    "cannot read TEXTS/half.json.zst: ": ["CONFIG", "sources.code.paths=[TEXTS/*.zst]"],
    "cannot read TEXTS/half.parquet: ": ["CONFIG", "sources.code.paths=[TEXTS/*.parquet]"],
    "source code is empty: its 1 file(s) have no content": ["CONFIG", "sources.code.paths=[TEXTS/empty.jsonl]"],
    "tokenizer.json lacks the control token(s) <|begin_of_text|>": [
        "CONFIG",
        "tokenizer.kind=folder",
        "tokenizer.path=TEXTS/foreign",
    ],
    "cannot prepare CONFIG/out": ["CONFIG", "--out", "CONFIG/out"],
    "--workers is 0; it must be at least 1": ["CONFIG", "--workers", "0"],
}


def write_bad_files(texts: Path) -> None:
    """Files that were cut short, an empty one, and a tokenizer of somebody else's."""
    lines = "".join(json.dumps({"text": f"some text {i}"}) + "\n" for i in range(2000)).encode()
    (texts / "half.jsonl.gz").write_bytes(gzip.compress(lines)[:-500])
    (texts / "half.json.zst").write_bytes(zstandard.ZstdCompressor().compress(lines)[:-500])
    (texts / "half.parquet").write_bytes(b"PAR1" + bytes(500))
    (texts / "empty.jsonl").touch()
    (texts / "foreign").mkdir()
    foreign = tokenizers.Tokenizer(tokenizers.models.BPE())
    foreign.decoder = tokenizers.decoders.ByteLevel()
    foreign.save(str(texts / "foreign" / "tokenizer.json"))


def test_bad_documents_are_counted_and_skipped(config, tmp_path, capsys):
    """Undecodable, malformed and unanswered rows, a file that two globs name, and a file that is there twice."""
    texts = tmp_path / "texts"
    rows = [b'{"text": "fine"}', b'{"text": "\xff"}', b"{", b'{"text": 1}', b'{"title": "x"}', b'{"text": " "}']
    (texts / "rows.jsonl").write_bytes(b"\n".join(rows))
    (texts / "copy.jsonl").write_bytes(b"\n".join(rows))
    (texts / "latin.txt").write_bytes(b"\xe9t\xe9")
    paths = [f"{texts}/*.py", f"{texts}/[cr]o*.jsonl", f"{texts}/rows.jsonl", f"{texts}/*.txt"]
    assert prepare(config, f"sources.code.paths={json.dumps(paths)}") == 0
    dropped = json.loads((tmp_path / "out" / "dataset.json").read_text())["sources"]["code"]["dropped"]
    assert {reason: item["documents"] for reason, item in dropped.items()} == {
        "duplicate": 2,
        "empty": 2,
        "malformed line": 2,
        "malformed row": 2,
        "no column": 2,
        "undecodable": 3,
    }


def test_a_full_disk_is_one_line_and_the_same_command_continues(config, tmp_path):
    """The system refuses to let any file grow past a limit, as a full disk would."""
    assert prepare(config, "--out", str(tmp_path / "whole")) == 0
    limited = (
        "import resource, signal, sys; from data_prep import run; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1)); sys.exit(run.main(sys.argv[2:]))"
    )
    out = ["--workers", "1", "--out", str(tmp_path / "out")]
    for limit in (1_000, 8_000, 60_000, 150_000):
        command = [sys.executable, "-c", limited, str(limit), str(config), *out]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert f"cannot prepare {tmp_path / 'out'}" in line
        assert "File too large" in line
        assert "Traceback" not in done.stderr
    assert prepare(config, "--out", str(tmp_path / "out")) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gives_one_clear_line(config, capsys, message):
    if "TEXTS" in str(BAD[message]):
        write_bad_files(config.parent / "texts")
    texts = str(config.parent / "texts")
    arguments = [argument.replace("CONFIG", str(config)).replace("TEXTS", texts) for argument in BAD[message]]
    workers = [] if "--workers" in arguments else ["--workers", "1"]
    assert run.main([*arguments, *workers]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message.replace("CONFIG", str(config)).replace("TEXTS", texts) in line


def test_a_failed_run_leaves_the_finished_data_set_alone(config, tmp_path, capsys):
    assert prepare(config) == 0
    before = files(tmp_path / "out")
    assert prepare(config, "sources.code.min_bytes=1000000") == 2
    assert {name: data for name, data in files(tmp_path / "out").items() if not name.startswith(".work")} == before


def test_two_preparations_of_one_folder(config, tmp_path, capsys):
    work = tmp_path / "out" / ".work"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert prepare(config) == 2
    assert "another preparation is writing to" in capsys.readouterr().err
