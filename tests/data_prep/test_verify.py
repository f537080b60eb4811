import hashlib
import io
import re
import shutil
import tarfile

import pytest

from data_prep import verify
from mm_train.manifest import read_manifest, write_manifest
from tests.mm_train import shards_format_1


@pytest.fixture
def folder(data_set, tmp_path):
    return shutil.copytree(data_set, tmp_path / "data")


def check(folder, capsys):
    """(exit status, what was said line by line, the last line of stderr)"""
    status = verify.main([str(folder)])
    printed = capsys.readouterr()
    return status, printed.out.strip().splitlines(), printed.err.strip().splitlines()[-1:]


def test_a_good_data_set(folder, capsys):
    status, (line,), _ = check(folder, capsys)
    assert (status, line) == (0, f"{folder}: 5 shard(s) intact")
    assert check(folder / "code" / "train", capsys)[0] == 0


def test_one_of_the_first_format(folder, capsys):
    shards_format_1.write(folder / "chat1" / "train")
    (folder / "chat1" / "train").rename(folder / "chat" / "train1")
    status, lines, _ = check(folder, capsys)
    assert status == 2  # in the wrong place, and of another tokenizer, but read
    assert len(lines) == 2
    assert "holds the shards of chat/train" in lines[0]
    assert "tokenizer mismatch" in lines[1]


def rewrite(folder, change):
    """The manifest of a source again, changed, and rightly signed."""
    manifest = read_manifest(folder)
    write_manifest(folder, change(manifest))


def flip(folder):
    file = folder / "code/train/00000.tar"
    data = bytearray(file.read_bytes())
    data[2000] ^= 1
    file.write_bytes(data)


def truncate(folder):
    file = folder / "code/train/00001.tar"
    file.write_bytes(file.read_bytes()[:-512])


def remove(folder):
    (folder / "code/train/00000.tar").unlink()


def leave_over(folder):
    shutil.copy(folder / "code/train/00000.tar", folder / "code/train/00007.tar")


def unfinished(folder):
    (folder / "code/val/manifest.json").unlink()


def damaged_manifest(folder):
    file = folder / "code/val/manifest.json"
    file.write_text(file.read_text().replace("code", "core"))


def duplicate(folder):
    source = folder / "code/train"
    manifest = read_manifest(source)
    (first, second), total = manifest.shards, manifest.num_tokens
    shutil.copy(source / first.file, source / second.file)
    twice = [first, first._replace(file=second.file)]
    facts = manifest.__dict__ | {"shards": twice, "num_tokens": total - second.num_tokens + first.num_tokens}
    write_manifest(source, type(manifest)(**facts))


def smaller_vocabulary(folder):
    rewrite(folder / "code/train", lambda m: type(m)(**m.__dict__ | {"vocab_size": 100}))


def other_tokenizer(folder):
    rewrite(folder / "code/train", lambda m: type(m)(**m.__dict__ | {"tokenizer_sha256": "f" * 64}))


def other_rows(folder):
    rewrite(folder / "chat/train", lambda m: type(m)(**m.__dict__ | {"row_length": 13}))


def no_licence(folder):
    rewrite(folder / "chat/val", lambda m: type(m)(**m.__dict__ | {"licence": ""}))


def repack(folder, name, **header):
    """A shard of code with one more member, and a manifest that owns to it."""
    source = folder / "code/val"
    file = source / "00000.tar"
    with tarfile.open(file, "a") as tar:
        info = tarfile.TarInfo(name)
        for key, value in header.items():
            setattr(info, key, value)
        info.size = 0 if header else 3
        tar.addfile(info, io.BytesIO(b"abc"))
    data = file.read_bytes()
    manifest = read_manifest(source)
    shard = manifest.shards[0]._replace(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_manifest(source, type(manifest)(**manifest.__dict__ | {"shards": [shard]}))


def absolute_path(folder):
    repack(folder, "/etc/cron.d/x")


def parent_path(folder):
    repack(folder, "../../x")


def a_link(folder):
    repack(folder, "x", type=tarfile.SYMTYPE, linkname="/etc/passwd")


def moved(folder):
    """Where the manifest says that tokens are, there are others, with the right checksums by chance of a lie."""
    source = folder / "code/val"
    manifest = read_manifest(source)
    (shard,) = manifest.shards
    members = shard.members | {"mask": shard.members["tokens"]._replace(size=shard.num_tokens)}
    facts = manifest.__dict__ | {"shards": [shard._replace(members=members)], "has_mask": True}
    write_manifest(source, type(manifest)(**facts))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip, ["corrupt shard .*00000.tar: sha256", "corrupt block in shard .*00000.tar: the tokens at byte"]),
        (truncate, ["truncated shard .*00001.tar", "00001.tar is not a tar|^$"]),
        (remove, [r"missing shard .*00000.tar: \d+ bytes expected"]),
        (leave_over, ["00007.tar is not in the manifest"]),
        (unfinished, ["no shards in .*val: manifest.json is missing"]),
        (damaged_manifest, ["damaged manifest .*checksum does not match"]),
        (duplicate, ["duplicate shard .*00001.tar: the same content as 00000.tar"]),
        (smaller_vocabulary, [r"00000.tar holds token \d+, and the vocabulary has 100", "00001.tar holds token"]),
        (other_tokenizer, ["tokenizer mismatch: source code/train"]),
        (other_rows, ["tokens are not whole rows of 13|^$", "00000.tar has a document across rows of 13 tokens"]),
        (no_licence, ["chat/val states no licence"]),
        (absolute_path, ["unsafe member '/etc/cron.d/x' in .*00000.tar"]),
        (parent_path, ["unsafe member '../../x' in "]),
        (a_link, ["unsafe member 'x' in "]),
        (moved, ["does not hold its mask where the manifest says", "corrupt|index"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_everything_that_is_wrong_is_a_line(folder, capsys, harm, said):
    harm(folder)
    status, lines, error = check(folder, capsys)
    assert status == 2
    for pattern in said:
        assert "|^$" in pattern or any(re.search(pattern, line) for line in lines), (pattern, lines)
    assert len(lines) <= len(said)
    (summary,) = error
    assert re.fullmatch(rf"error: {folder}: {len(lines)} problem\(s\) in [45] shard\(s\)", summary)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["nowhere"], "no data set in nowhere"), ([".", "--workers", "0"], "--workers is 0")]
)
def test_bad_input(capsys, arguments, message):
    assert verify.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_url_is_refused(capsys):
    assert verify.main(["https://me:secret@example.org/data"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: https://example.org/data is not on this machine")
