"""Benchmark items planted in a corpus, as they are and reformatted: which are found, and what else is taken for one."""

import json
import random
import re
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import yaml

from data_prep import run
from data_prep.benchmarks import Benchmarks, _benchmarks, build, texts_of
from data_prep.config import BenchmarksConfig
from data_prep.machine import LIBRARY
from mm_train.shards import ShardReader
from mm_train.tokenizer import load_tokenizer

FORMS = {
    "exact": lambda text: text,
    "upper case": str.upper,
    "no punctuation": lambda text: re.sub(r"[^\w\s]", " ", text),
    "other punctuation": lambda text: re.sub(r"[,;]", " --", text).replace(".", " ...").replace("'", "’"),
    "wrapped lines": lambda text: "\n    > ".join(textwrap.wrap(text, 40)),
    "one line": lambda text: " ".join(text.split()),
    "markdown": lambda text: " ".join(f"**{word}**" if i % 5 == 0 else word for i, word in enumerate(text.split())),
}


def clean_texts() -> list[str]:
    """Docstrings and code of the standard library: no benchmark is made from these."""
    files = [file for file in sorted(LIBRARY.glob("*.py")) if file.stat().st_size > 2000]
    return [file.read_text(encoding="utf-8") for file in files]


def test_planted_items_are_dropped_and_named(tmp_path, capsys):
    items = [
        {"question": f"How many {noun} does the keeper of the old lighthouse at {place} count before breakfast today?"}
        for noun in ("gulls", "boats", "waves")
        for place in ("Skerry", "Mull", "Unst", "Iona")
    ]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    clean = clean_texts()[:40]
    rows = [{"text": text} for text in clean]
    planted = [
        f"{page[:400]}\n{form(item['question'])}\n{page[400:800]}"
        for item in items
        for page, form in zip(clean, FORMS.values(), strict=False)
    ]
    rows += [{"text": text} for text in planted]
    rows.append(
        {"messages": [{"role": "user", "content": items[0]["question"]}, {"role": "assistant", "content": "9"}]}
    )
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "files", "paths": [f"{tmp_path}/corpus.jsonl"], "licence": "PSF-2.0", "domain": "web"}
    content = {
        "out": str(tmp_path / "out"),
        "validation_fraction": 0,
        "tokenizer": {"kind": "train_bpe", "vocab_size": 600},
        "benchmarks": {"extra": [f"{tmp_path}/quiz.jsonl"]},
        "sources": {"web": source, "kept": {**source, "decontaminate": False}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert run.main([str(tmp_path / "config.yaml"), "--workers", "1"]) == 0
    sources = json.loads((tmp_path / "out" / "dataset.json").read_text())["sources"]
    assert sources["web"]["dropped"]["in a benchmark"]["documents"] == len(planted) + 1
    assert "in a benchmark" not in sources["kept"]["dropped"]
    found = [json.loads(line) for line in (tmp_path / "out" / "web" / "contamination.jsonl").read_text().splitlines()]
    assert Counter((hit["benchmark"], hit["item"]) for hit in found) == {
        ("quiz", i): len(FORMS) + (i == 0) for i in range(len(items))
    }
    assert all("keeper of the old lighthouse" in hit["words"] for hit in found)
    tokenizer = load_tokenizer(tmp_path / "out")
    kept = [tokenizer.decode(tokens) for tokens, _ in ShardReader(tmp_path / "out" / "web" / "train").documents()]
    assert kept == clean
    assert f"left out of web: {len(planted) + 1} in a benchmark" in capsys.readouterr().out


@pytest.mark.slow
def test_items_of_all_benchmarks_on_disk(tmp_path, capsys):
    if not Path("data/eval/mirror.json").is_file():
        pytest.skip("no benchmark items in data/eval: python -m eval.prepare_data")
    config = BenchmarksConfig(mirror="data/eval")
    build(config, tmp_path / "index")
    index = Benchmarks(tmp_path / "index")
    chance, clean = random.Random(0), clean_texts()
    planted: list[tuple[str, int, str]] = []
    texts: list[str] = []
    for name, rows in _benchmarks(config):
        for number in sorted(chance.sample(range(len(rows)), min(40, len(rows)))):
            text = max(texts_of(rows[number], passages=False)[:2], key=len)  # the question with its first answer
            for form, write in FORMS.items():
                page = chance.choice(clean)
                at = page.rfind("\n", 0, chance.randrange(len(page))) + 1
                planted.append((name.split("/")[1], len(re.findall(r"[0-9a-z]+", text.lower())), form))
                texts.append(f"{page[:at]}\n{write(text)}\n{page[at:]}")
    found = index.search(texts)
    missed = Counter(planted[i][2] for i in range(len(texts)) if i not in found and planted[i][1] >= 8)
    short = Counter(planted[i][2] for i in range(len(texts)) if planted[i][1] < 8)
    with capsys.disabled():
        print()
        for form in FORMS:
            total = sum(1 for _, length, other in planted if other == form and length >= config.short_ngram)
            print(f"{form:18} {total - missed[form]:5} of {total} found; {short[form]} with fewer than 8 words")
        print(f"clean texts taken for one: {len(index.search(clean))} of {len(clean)}")
    assert missed["exact"] == 0
    assert not index.search(clean)
