"""Round trips with megatron-core itself, on both sides."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import megatron
from mm_train.shards import ShardReader

pytest.importorskip("megatron.core", reason="megatron-core is not installed")


def build(prefix, documents, dtype=np.int32):
    """A corpus by megatron-core's own builder; a document is a list of sequences."""
    indexed = megatron._indexed_dataset()
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(np.concatenate([[], *sequences]), [len(s) for s in sequences])
    builder.finalize(f"{prefix}.idx")


def read(prefix):
    corpus = megatron._indexed_dataset().IndexedDataset(str(prefix))
    borders = corpus.document_indices.tolist()
    return [[corpus[i].tolist() for i in range(a, b)] for a, b in itertools.pairwise(borders)]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), max_size=4), max_size=12),
    st.sampled_from([np.uint16, np.int32]),
    st.integers(1, 40),
)
def test_a_corpus_comes_back(tmp_path_factory, byte_tokenizer, documents, dtype, shard_tokens):
    folder = tmp_path_factory.mktemp("corpus")
    documents = [[[1, 2]], *documents]
    build(folder / "in", documents, dtype)
    facts = {"licence": "CC0-1.0", "domain": "web", "revision": "r1", "shard_tokens": shard_tokens}
    manifest = megatron.import_corpus(folder / "in", folder / "data", byte_tokenizer, "web", **facts)
    joined = [[token for sequence in document for token in sequence] for document in documents]
    kept = [document for document in joined if document]
    reader = ShardReader(folder / "data/web/train")
    assert [tokens.tolist() for tokens, _ in reader.documents()] == kept
    assert (manifest.revision, manifest.extra["dropped"]["empty"]) == ("r1", len(joined) - len(kept))
    assert manifest.num_bytes == sum(map(len, kept))  # a token of this tokenizer is a byte
    megatron.export_corpus(folder / "data/web/train", folder / "out")
    assert read(folder / "out") == [[document] for document in kept]


def test_shards_to_megatron_and_back_are_the_same_bytes(data_set, tmp_path, byte_tokenizer):
    megatron.export_corpus(data_set / "code/train", tmp_path / "code")
    manifest = ShardReader(data_set / "code/train").manifest
    facts = {"licence": manifest.licence, "domain": manifest.domain, "shard_tokens": 9000}
    megatron.import_corpus(tmp_path / "code", tmp_path / "data", byte_tokenizer, "code", **facts)
    for shard in manifest.shards:
        assert (tmp_path / "data/code/train" / shard.file).read_bytes() == (
            data_set / "code/train" / shard.file
        ).read_bytes()


def test_padding_and_masks_are_left_out_when_asked_to(data_set, tmp_path, capsys):
    chat = data_set / "chat/train"
    assert megatron.main(["export", str(chat), str(tmp_path / "chat")]) == 2
    assert "has loss masks, which Megatron's format cannot keep: --drop-mask" in capsys.readouterr().err
    assert megatron.main(["export", str(chat), str(tmp_path / "chat"), "--drop-mask"]) == 0
    manifest = ShardReader(chat).manifest
    documents = read(tmp_path / "chat")
    assert len(documents) == manifest.num_documents
    assert sum(len(tokens) for (tokens,) in documents) == manifest.num_tokens - manifest.num_padding
    assert sorted(file.name for file in tmp_path.iterdir()) == ["chat.bin", "chat.idx"]


def test_the_commands(data_set, tmp_path, capsys):
    assert megatron.main(["export", str(data_set / "code/train"), str(tmp_path / "a/code")]) == 0
    words = ["import", str(tmp_path / "a/code"), str(tmp_path / "data"), "--source", "code"]
    words += ["--tokenizer", str(data_set), "--licence", "PSF-2.0", "--domain", "code"]
    assert megatron.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("data/code/train: 4 documents, 21,206 tokens, 1 shard(s)")


@pytest.mark.filterwarnings("error")  # also for what is thrown where nobody can catch it
def test_bad_input(data_set, tmp_path, capsys):
    def refused(*words):
        assert megatron.main([str(word) for word in words]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    def importing(prefix, out="new"):
        facts = ["--source", "x", "--licence", "CC0-1.0", "--domain", "web", "--tokenizer", data_set]
        return refused("import", tmp_path / prefix, tmp_path / out, *facts)

    assert "no corpus at" in importing("none")
    build(tmp_path / "large", [[[1, 2, 70_000]]])
    assert "document 0 of" in (line := importing("large"))
    assert "has token 70000, and the tokenizer's ids are 0 to" in line
    build(tmp_path / "negative", [[[1]], [[-1]]])
    assert "document 1 of" in importing("negative")
    build(tmp_path / "floats", [[[1.5]]], np.float32)
    assert "it holds float32, not token ids" in importing("floats")
    build(tmp_path / "empty", [[]])
    assert "it has no tokens" in importing("empty")
    build(tmp_path / "good", [[[1, 2, 3]]])
    content = (tmp_path / "good.bin").read_bytes()
    (tmp_path / "good.bin").write_bytes(content[:-4])
    assert "8 bytes of tokens, 12 expected" in importing("good")
    (tmp_path / "good.bin").write_bytes(content)
    index = (tmp_path / "good.idx").read_bytes()
    for broken in (b"", b"x" * 40, index[:20], index[:-8], index + b"12345678", index[:17] + b"\x63" + index[18:]):
        (tmp_path / "good.idx").write_bytes(broken)
        assert "damaged corpus" in importing("good")
    (tmp_path / "good.idx").write_bytes(index)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/tokenizer.json").write_text("{}")
    assert "tokenizer" in importing("good", "data")
    assert "good.bin exists" in refused("export", data_set / "code/train", tmp_path / "good")
    assert "no shards in" in refused("export", tmp_path, tmp_path / "out")
