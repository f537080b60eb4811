import fsspec
import numpy as np
import pytest

from data_prep import peek
from mm_train.shards import ShardReader


def test_overview_of_a_data_set(data_set, capsys):
    assert peek.main([str(data_set)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    assert "rows of 65" in printed[0]
    assert "stream" in printed[-1]


def test_a_window_of_everything(data_set, capsys):
    assert peek.main([str(data_set), "-n", "1", "--colour", "always"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("=== ") == 4
    assert printed.count(" shard(s), ") == 4
    assert peek.GREEN in printed


def test_windows_show_borders_and_what_is_trained_on(data_set, capsys):
    assert peek.main([str(data_set / "chat" / "train"), "--window", "0", "-n", "1"]) == 0
    printed = capsys.readouterr().out
    _, mask, _ = ShardReader(data_set / "chat" / "train").window(0, 64)
    assert printed.startswith(f"=== chat/train window 0: 65 tokens, {mask.sum()} trained on\n--- document, ")
    assert "<|header_start|>user<|header_end|>\n\nnext?<|eot|>" in printed
    answer = printed[printed.index("«") + 1 : printed.index("»")]
    assert answer.endswith("<|eot|>")
    assert "--- padding, " in printed
    assert "\x1b" not in printed


def test_the_same_random_windows_for_the_same_seed(data_set, capsys):
    shown = []
    for seed in ("1", "1", "2"):
        assert peek.main([str(data_set / "code" / "train"), "--seed", seed, "--seq-len", "100", "--verify"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]
    assert shown[0].count("===") == 3
    assert "shard(s) intact" in shown[0]
    assert "document that began earlier" in shown[0]


def test_colours_follow_the_mask(byte_tokenizer):
    tokens = np.array([byte_tokenizer.bos_id, *byte_tokenizer.encode("ab"), byte_tokenizer.eos_id])
    mask = np.array([False, False, True, True])
    assert peek.mark(tokens, mask, byte_tokenizer, colour=True) == (
        f"{peek.YELLOW}<|begin_of_text|>{peek.RESET}{peek.GREY}a{peek.RESET}"
        f"{peek.GREEN}b{peek.RESET}{peek.YELLOW}<|end_of_text|>{peek.RESET}"
    )
    assert peek.mark(tokens, mask, byte_tokenizer, colour=False) == "<|begin_of_text|>a«b<|end_of_text|>»"


def test_control_characters_of_a_corpus_do_not_reach_the_terminal(byte_tokenizer):
    tokens = np.array(byte_tokenizer.encode("a\x1b[2Jb\tc\n\x9b"))
    shown = peek.mark(tokens, np.zeros(len(tokens), dtype=bool), byte_tokenizer, colour=False)
    assert shown == "a\\x1b[2Jb\tc\n\\x9b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA/nowhere"], "no data set in "),
        (["DATA/code/train", "--window", "99999"], "window 99999 is not among them"),
        (["DATA/chat/train", "--seq-len", "10"], "packed in rows of 65 tokens"),
    ],
)
def test_bad_input(data_set, capsys, arguments, message):
    assert peek.main([argument.replace("DATA", str(data_set)) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_data_set_behind_a_url_looks_the_same(data_set, capsys):
    files = fsspec.filesystem("memory")
    for file in data_set.rglob("*"):
        if file.is_file():
            files.pipe_file(f"/peek/data/{file.relative_to(data_set)}", file.read_bytes())
    shown = []
    for place in (str(data_set), "memory://peek/data"):
        assert peek.main([f"{place}/chat/train", "--window", "3", "-n", "2"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""
    assert peek.main(["memory://peek/data/code/val", "--verify"]) == 0
    assert "memory://peek/data/code/val: 1 shard(s) intact" in capsys.readouterr().out
    files.pipe_file("/peek/data/dataset.json", b'{"sources": {"code": {}, "chat": {}}}')
    assert peek.main(["memory://peek/data", "-n", "1"]) == 0
    assert capsys.readouterr().out.count("=== ") == 4
    assert peek.main(["memory://peek/nowhere"]) == 2
    assert "no shards in memory://peek/nowhere" in capsys.readouterr().err
    files.rm("/peek", recursive=True)
