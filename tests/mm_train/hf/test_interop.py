"""What another program sees of a release folder: one process without this project does everything, offline."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mm_train.release import load_release
from mm_train.tokenizer import load_tokenizer

TEXTS = ["Hello, MobileMoE!", "the 's thin , <b>\n\n  indented  text ", "naïve 数学 🙂", ""]
CHATS = [
    [{"role": "user", "content": "Name one JVM language."}],
    [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "  Why?\n\nAnd how?"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "Oh"},
    ],
]


@pytest.fixture(scope="module")
def tokenizers(byte_tokenizer):
    found = {"byte": byte_tokenizer}
    if importlib.util.find_spec("llama_models"):
        found["llama3"] = load_tokenizer("llama3")
    return found


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, release, prompts, tokenizers):
    """What the other program found out."""
    work = tmp_path_factory.mktemp("elsewhere")
    folders = {
        "bf16": release("bf16"),
        "int4": release("int4"),
        "sharded": release("int4", max_shard_bytes=20_000),
        "dense": release("int4", "dense"),
    }
    for name, tokenizer in tokenizers.items():  # a folder's tokenizer is looked for next to its config.json
        shutil.copytree(folders["int4"], work / name)
        tokenizer.save(work / name)
    job = {
        "folders": {name: str(folder) for name, folder in folders.items()},
        "tokenizers": {name: str(work / name) for name in tokenizers},
        "prompts": prompts,
        "texts": TEXTS,
        "chats": CHATS,
        "saved": str(work / "saved"),
    }
    (work / "job.json").write_text(json.dumps(job))
    program = shutil.copy(Path(__file__).with_name("foreign_program.py"), work)
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env = kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "HF_MODULES_CACHE": str(work / "modules")}
    done = subprocess.run(
        [sys.executable, program, "job.json", "result.json"],
        cwd=work,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((work / "result.json").read_text()) | {"folders": folders, "work": work}


def test_the_program_could_not_see_this_project(foreign):
    assert (foreign["visible"], foreign["imported"]) == ([], [])


@pytest.mark.parametrize("name", ["bf16", "int4", "sharded", "dense"])
def test_transformers_writes_what_the_trainer_writes(foreign, prompts, greedy, name):
    model = load_release(foreign["folders"][name])
    assert foreign["written"][name] == [greedy(model, prompt, 20) for prompt in prompts]


def test_a_folder_that_it_saved_loads_in_both(foreign, prompts, greedy):
    folder = foreign["work"] / "saved"
    assert (folder / "modeling_mobilemoe.py").exists()
    assert foreign["saved"] == [greedy(load_release(folder), prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("name", ["byte", "llama3"])
def test_auto_tokenizer_agrees(foreign, tokenizers, name):
    if name not in tokenizers:
        pytest.skip("llama-models is not installed")
    ours, theirs = tokenizers[name], foreign["tokenised"][name]
    assert theirs["ids"] == [[ours.bos_id, *ours.encode(text)] for text in TEXTS]
    assert theirs["back"] == TEXTS
    assert theirs["chats"] == [ours.render_chat(chat)[0] for chat in CHATS]
    assert theirs["prompts"] == [ours.render_chat(chat, add_generation_prompt=True)[0] for chat in CHATS]
    assert theirs["special"] == [ours.bos_id, ours.eos_id, ours.pad_id]
    if name == "llama3":
        assert theirs["ids"][0] == [128000, 9906, 11, 13716, 26694, 36, 0]
        want = [128000, 128005, 882, 128006, 271, 678, 832, 73479, 4221, 13, 128008, 128005, 78191, 128006, 271]
        assert theirs["prompts"][0] == want


def test_the_example_of_the_model_card_runs(foreign):
    assert foreign["readme"].startswith("<|begin_of_text|>Once upon a time")
