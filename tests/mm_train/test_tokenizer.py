import base64
import json
import sysconfig
from pathlib import Path

import jinja2
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_train.cli import UserError
from mm_train.tokenizer import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    SPLIT_REGEX,
    Tokenizer,
    assemble,
    byte_alphabet,
    last_merge,
    load_tokenizer,
)

STDLIB = Path(sysconfig.get_path("stdlib"))
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <|eot|>?"},
    {"role": "assistant", "content": "  A control\n"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "token. ¿Sí?"},
]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """256 bytes and two merges."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, "th", "the"])}
    return assemble(vocab, [("t", "h"), ("th", "e")])


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    pytest.importorskip("llama_models", reason="the llama3 extra is not installed")
    return load_tokenizer("llama3")


@pytest.fixture(scope="module")
def oracle():
    """tiktoken over the ranks of the wheel: the reference for the Llama-3 vocabulary."""
    import llama_models
    import tiktoken

    lines = (Path(llama_models.__file__).parent / "llama3" / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return tiktoken.Encoding("llama3", pat_str=SPLIT_REGEX, mergeable_ranks=ranks, special_tokens={})


texts = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*CONTROL_TOKENS, "\n", " ", "the", "'S", "１２３", "e\u0301", "😀"])).map("".join),
)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_round_trip_and_bytes_of_any_text(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert small.decode(ids, skip_special=False) == text
    assert max(ids, default=0) < small.bos_id  # no control token, whatever the text spells
    assert int(small.token_bytes()[ids].sum()) == len(text.encode())
    assert small.encode_batch([text, text]) == [ids, ids]


def test_control_tokens_are_last_and_in_order(small):
    assert small.vocab_size == 258 + len(CONTROL_TOKENS)
    assert (small.bos_id, small.stop_ids, small.pad_id) == (258, (259, 266), 276)
    assert small.decode(range(258, small.vocab_size), skip_special=False) == "".join(CONTROL_TOKENS)
    assert small.decode(range(258, small.vocab_size)) == ""
    assert not small.token_bytes()[258:].any()


def test_merges_are_used(small):
    assert [small.decode([i]) for i in small.encode("the thin")] == ["the", " ", "th", "i", "n"]


def test_chat_mask_covers_answers_and_their_end(small):
    ids, mask = small.render_chat(CHAT)
    trained = [i for i, keep in zip(ids, mask, strict=True) if keep]
    assert small.decode(trained, skip_special=False) == "  A control\n<|eot|>token. ¿Sí?<|eot|>"
    assert ids.count(small.bos_id) == 1
    assert ids[0] == small.bos_id


def test_a_prompt_is_the_beginning_of_its_conversation(small):
    prompt, mask = small.render_chat(CHAT[:2], add_generation_prompt=True)
    assert small.render_chat(CHAT)[0][: len(prompt)] == prompt
    assert not any(mask)


def test_chat_template_gives_the_same_text(small):
    """What transformers renders from tokenizer_config.json is what `render_chat` encodes."""
    template = jinja2.Template(CHAT_TEMPLATE)
    for prompt in (False, True):
        text = template.render(messages=CHAT, bos_token="<|begin_of_text|>", add_generation_prompt=prompt)
        ids, _ = small.render_chat(CHAT, add_generation_prompt=prompt)
        assert small.decode(ids, skip_special=False) == text


def test_transformers_reads_it(small, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the eval extra is not installed")
    small.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the 's thin , <b>"
    assert loaded(text)["input_ids"] == [small.bos_id, *small.encode(text)]
    assert loaded.decode(small.encode(text)) == text
    chat = [{**message, "content": message["content"].replace("<|eot|>", "it")} for message in CHAT]
    assert loaded.apply_chat_template(chat, return_dict=False) == small.render_chat(chat)[0]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (small.bos_id, small.eos_id, small.pad_id)


@pytest.mark.parametrize(
    "message", [{"role": "human", "content": "x"}, {"role": "user"}, {"content": "x"}, {"role": "user", "content": 3}]
)
def test_bad_messages(small, message):
    with pytest.raises(UserError, match="role out of system, user, assistant, tool"):
        small.render_chat([message])


def test_save_and_load(small, tmp_path):
    small.save(tmp_path / "new")
    for spec in (tmp_path / "new", tmp_path / "new" / "tokenizer.json", str(tmp_path / "new")):
        loaded = load_tokenizer(spec)
        assert loaded.sha256 == small.sha256
        assert loaded.encode("the end") == small.encode("the end")
        np.testing.assert_array_equal(loaded.token_bytes(), small.token_bytes())
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|begin_of_text|>"
    assert config["clean_up_tokenization_spaces"] is False


def test_other_programs_put_bos_before_a_text(small, tmp_path):
    small.save(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode("the").ids == [small.bos_id, *small.encode("the")]


def test_unusable_tokenizers(small, tmp_path):
    small.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    good = json.loads(file.read_text())
    added = good["added_tokens"]
    cases = {
        "not a readable tokenizer.json": {},
        "byte-level tokenizers without": {**good, "normalizer": {"type": "Lowercase"}},
        "byte-level": {**good, "decoder": None},
        r"lacks the control token\(s\) <\|eot\|>:": {
            **good,
            "added_tokens": [added[0], *added[2:8], *added[9:], added[1]],
        },
        "not marked special": {**good, "added_tokens": [*added[:-1], {**added[-1], "special": False}]},
    }
    for message, content in cases.items():
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_damaged_model_is_one_clear_line_when_it_is_first_used(small, tmp_path):
    small.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for change in ({"merges": [["t", "nothing"]]}, {"type": "Riddle"}):
        changed = {**content, "model": {**content["model"], **change}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        loaded = load_tokenizer(tmp_path)
        with pytest.raises(UserError, match=r"tokenizer\.json is not a readable tokenizer\.json: "):
            loaded.encode("x")
    first, second, *others = content["added_tokens"]
    content["added_tokens"] = [second, first, *others]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not the one that its place in the list gives it"):
        load_tokenizer(tmp_path).encode("x")


@given(
    st.lists(st.text("abc", min_size=2, max_size=6), unique=True, max_size=12),
    st.lists(st.text("abc", max_size=40), max_size=5),
)
def test_one_merge_a_token_is_as_good_as_all_of_them(words, texts):
    """Whatever the ranks are, those out of order and tokens out of reach included: tiktoken merges by rank alone."""
    tiktoken = pytest.importorskip("tiktoken", reason="the llama3 extra is not installed")
    ranks = {token: i for i, token in enumerate([*(bytes([i]) for i in range(256)), *map(str.encode, words)])}
    spelt = {token: "".join(byte_alphabet()[byte] for byte in token) for token in ranks}
    merges = [tuple(spelt[part] for part in pair) for token in ranks if (pair := last_merge(token, ranks))]
    built = assemble({spelt[token]: rank for token, rank in ranks.items()}, merges)
    truth = tiktoken.Encoding("x", pat_str=SPLIT_REGEX, mergeable_ranks=ranks, special_tokens={})
    assert built.encode_batch(texts) == truth.encode_ordinary_batch(texts)
    assert built.ordinary_tokens == ranks


def test_llama3_pinned_ids(llama3):
    assert llama3.vocab_size == 128256
    assert (llama3.bos_id, llama3.eos_id, llama3.stop_ids) == (128000, 128001, (128001, 128008))
    assert (
        llama3.decode(range(128005, 128010), skip_special=False)
        == "<|header_start|><|header_end|><|eom|><|eot|><|step|>"
    )
    assert [llama3.bos_id, *llama3.encode("Hello, MobileMoE!")] == [128000, 9906, 11, 13716, 26694, 36, 0]
    ids, _ = llama3.render_chat([{"role": "user", "content": "Name one JVM language."}], add_generation_prompt=True)
    assert ids == [128000, 128005, 882, 128006, 271, 678, 832, 73479, 4221, 13, 128008, 128005, 78191, 128006, 271]


def test_llama3_equals_tiktoken_on_real_text(llama3, oracle):
    for file in [*sorted(STDLIB.glob("[a-d]*.py")), STDLIB / "pydoc_data" / "topics.py"]:
        text = file.read_text(encoding="utf-8")
        assert llama3.encode(text) == oracle.encode_ordinary(text), file
        assert llama3.decode(llama3.encode(text)) == text


def test_llama3_equals_tiktoken_on_every_unicode_block_and_awkward_runs(llama3, oracle):
    letters = [chr(code) for code in range(0, 0x110000, 13) if not 0xD800 <= code < 0xE000]
    lines = [f"a{letter}b {letter}{letter}1\n{letter}'" for letter in letters]
    runs = [unit * 3001 for unit in ("x", " ", "\n", "aa a", "0", "\r\n \t", "=", "é", "'ll")]
    for text in [*lines, *runs, *CONTROL_TOKENS, "'ſ 'LL it'S", "\x1c\x85\u2028 \u3000x"]:
        assert llama3.encode(text) == oracle.encode_ordinary(text), repr(text[:40])


def test_every_llama3_token_is_reached_from_its_own_text(llama3, oracle):
    """The 588 that merges do not reach are what `ignore_merges` is for."""
    own_text = [oracle.decode_single_token_bytes(i) for i in range(128000)]
    assert [len(text) for text in own_text] == llama3.token_bytes()[:128000].tolist()
    whole = [text.decode() for text in own_text if text.decode(errors="ignore").encode() == text]
    assert len(whole) > 126000
    for text, ids in zip(whole, llama3.encode_batch(whole), strict=True):
        assert ids == oracle.encode_ordinary(text), text
