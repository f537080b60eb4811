"""eval.run on GGUF files: what llama.cpp says of benchmarks, beside what this project's own engine says."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.lm import OwnCodec
from eval.models import open_model
from eval.packed import PackedEngine
from eval.run import main
from eval.sequences import Prompt, Scored
from mm_train.export.__main__ import main as export
from mm_train.export.source import ExportSource
from mm_train.gguf.write import write
from mm_train.model import MobileMoE
from mm_train.quant import FakeQuant, enable_fake_quant
from mm_train.release import load_release, save_release

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

QUESTION = "Question: Which of these is a star?\nAnswer:"
CHOICES = (" the Sun", " the Moon", " a comet, é", " the", " the Sun and the Moon")


@pytest.fixture(scope="module")
def network(small_model, tokenizer) -> MobileMoE:
    """With a gap between the experts that are chosen and the others, so that rounding does not choose other ones."""
    model = MobileMoE(replace(small_model, vocab_size=tokenizer.vocab_size)).eval()
    model.init_weights(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1).copy_(parameter.bfloat16().float())
            if name.endswith("router.weight"):
                parameter.mul_(0.01)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.arange(len(buffer)) % 5 * 0.25)
    return model


@pytest.fixture(scope="module")
def files(network, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """The network as int4 release, the release's values as float32 GGUF, and the network as Q4_0 GGUF."""
    folder = tmp_path_factory.mktemp("gguf")
    for kind in ("bf16", "int4"):
        save_release(network, folder / kind, kind, tokenizer)
    write(folder / "values.gguf", ExportSource(folder / "int4"), tokenizer, {"name": "v"}, as_float32=True)
    assert export(["--checkpoint", str(folder / "bf16"), "--format", "gguf", "--out", str(folder / "q4_0")]) == 0
    return {"int4": folder / "int4", "values": folder / "values.gguf", "q4_0": folder / "q4_0"}


def sequences(tokenizer) -> list[Scored]:
    """Choices of two questions, one within a character and one that begins another, and one token choices."""
    found = []
    for group in range(2):
        head = [tokenizer.bos_id, *tokenizer.encode("Read on. " * 5 * group + QUESTION)]
        for choice in CHOICES:
            tail = tokenizer.encode(choice)
            found.append(Scored(np.array(head + tail, np.int32), len(tail), group, False))
        found += [Scored(np.array([*head, token], np.int32), 1, group, False) for token in (5, 6, 200)]
    return found


def answers(engine, wanted) -> list[tuple[float, bool]]:
    found = {}
    for batch in engine.score(wanted):
        found |= batch
    return [found[number] for number in range(len(wanted))]


def open_both(files, kind):
    return (open_model(str(files[name]), None, "cpu").engine for name in ("int4", kind))


def test_the_same_values_have_the_same_likelihoods(files, tokenizer):
    wanted = sequences(tokenizer)
    assert any(len(tokenizer.decode([int(s.ids[-1])]).strip("�")) == 0 for s in wanted)  # ends within a character
    ours, theirs = (answers(engine, wanted) for engine in open_both(files, "values"))
    np.testing.assert_allclose([a[0] for a in theirs], [a[0] for a in ours], atol=1e-4)  # 4e-6 here
    assert [a[1] for a in theirs] == [a[1] for a in ours]


def test_q4_0_is_near_the_network_rounded_along_in(files, network, tokenizer):
    """llama.cpp rounds activations to 8 bits in blocks of 32, so log-likelihoods are near, not the same."""
    wanted = sequences(tokenizer)
    rounded = load_release(files["int4"].parent / "bf16").eval()
    enable_fake_quant(rounded, FakeQuant(-2, activations_int8=False))
    ours = answers(PackedEngine(rounded, OwnCodec(tokenizer), 1000), wanted)
    theirs = answers(open_model(str(files["q4_0"]), None, "cpu").engine, wanted)
    distances = np.abs(np.array([a[0] for a in theirs]) - [a[0] for a in ours])
    assert 1e-4 < distances.max() < 0.5  # 0.14 here, of 8 to 52 nats


def test_what_documents_share_is_computed_once(files, tokenizer):
    wanted = sequences(tokenizer)
    engine = open_model(str(files["values"]), None, "cpu").engine
    answers(engine, wanted)
    assert engine.work.tokens < 0.4 * sum(len(sequence.inputs) for sequence in wanted)
    nodes = {sequence.inputs[:n].tobytes() for sequence in wanted for n in range(1, len(sequence.inputs) + 1)}
    assert engine.work.tokens < len(nodes) + 2 * 2 * len(CHOICES)  # a choice may have to go back by one token


def test_a_target_that_is_most_unlikely_is_finite(files):
    engine = open_model(str(files["values"]), None, "cpu").engine
    log_probs, best = engine.model.likelihoods([1, 2, 3], range(engine.model.vocab_size))
    assert len(log_probs) == engine.model.vocab_size
    assert all(map(math.isfinite, log_probs.values()))
    assert max(log_probs, key=log_probs.__getitem__) == best
    assert sum(map(math.exp, log_probs.values())) == pytest.approx(1, abs=1e-4)


def test_texts_are_the_same_and_end_where_a_stop_is(files, tokenizer):
    ours, theirs = open_both(files, "values")
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(QUESTION)], np.int32)
    prompts = [Prompt(ids[: len(ids) - cut], ("<|end_of_text|>",), 12, cut, False) for cut in range(4)]

    def texts(engine, prompts):
        found = {}
        for batch in engine.write(prompts):
            found |= batch
        return [found[number] for number in range(len(prompts))]

    expected, found = texts(ours, prompts), texts(theirs, prompts)
    # Bytes that are no text are shown by each in its own way.
    whole = [(a.split("�")[0], b.split("�")[0]) for a, b in zip(expected, found, strict=True)]
    assert all(a == b for a, b in whole)
    text = max((a for a, _ in whole), key=len)
    number = [a for a, _ in whole].index(text)
    assert len(text) > 3
    stopped = [replace(prompts[number], stops=(text[2],))]
    assert texts(theirs, stopped) == texts(ours, stopped) == [text[: text.index(text[2])]]


def test_the_longest_sequence_has_room(files, tokenizer):
    engine = open_model(str(files["values"]), None, "cpu").engine
    ids = np.full(engine.context + 1, 7, np.int32)
    ((nats, _),) = answers(engine, [Scored(ids, 2, 0, True)])
    assert math.isfinite(nats)


def test_benchmarks_of_a_file_and_of_its_folder(mirror, files, tmp_path):
    flags = ["--data", str(mirror.folder), "--tasks", "piqa,arc_easy,nq", "--limit", "2"]
    found = {}
    for name, model in (("int4", files["int4"]), ("values", files["values"]), ("q4_0", files["q4_0"])):
        assert main([*flags, "--model", str(model), "--out", str(tmp_path / name)]) == 0
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert [found[name]["format"] for name in found] == ["int4", "gguf", "gguf"]
    facts = {name: found[name]["facts"] for name in found}
    assert facts["values"]["parameters"] == facts["int4"]["parameters"]
    assert [facts[name]["dtype"] for name in facts] == ["float32", "float32", "Q4_0"]
    assert facts["q4_0"]["runtime"].startswith("xllamacpp ")
    assert len({facts[name]["tokenizer_sha256"] for name in facts}) == 1
    for name in ("piqa", "arc_easy"):
        ours, theirs = found["int4"]["tasks"][name], found["values"]["tasks"][name]
        assert theirs["score"] == ours["score"]
        assert theirs["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], abs=1e-4)
    answers_before = sorted((tmp_path / "values" / "answers").rglob("*.jsonl"))[0].read_bytes()
    assert main([*flags, "--model", str(files["values"]), "--out", str(tmp_path / "values")]) == 0
    again = json.loads((tmp_path / "values" / "results.json").read_text())
    assert again["tokens"] == 0  # nothing was computed again
    assert sorted((tmp_path / "values" / "answers").rglob("*.jsonl"))[0].read_bytes().strip() == answers_before.strip()


def test_a_file_that_is_none(mirror, tmp_path, capsys):
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(50))
    for name, message in (("junk.gguf", "is not a readable GGUF file"), ("none.gguf", "no such folder")):
        flags = ["--data", str(mirror.folder), "--tasks", "piqa", "--out", str(tmp_path / "out")]
        assert main([*flags, "--model", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
