import numpy as np
import pytest
from lm_eval.api.instance import Instance

from eval.lm import OwnCodec
from eval.sequences import MAX_NEW_TOKENS, Prompt, Scored, encode, finish


@pytest.fixture
def codec(tokenizer) -> OwnCodec:
    return OwnCodec(tokenizer)


def request(context: str, continuation: str) -> tuple[int, Instance]:
    return 0, Instance("loglikelihood", {}, (context, continuation), 0)


def prompt(context: str, **options: object) -> tuple[int, Instance]:
    return 3, Instance("generate_until", {}, (context, options), 0)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(codec, tokenizer):
    (found,) = encode([request("Tea is  ", "hot")], codec, 50)
    assert isinstance(found, Scored)
    assert found.ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("Tea is  hot")]
    assert found.num_targets == len(tokenizer.encode("Tea is  hot")) - len(tokenizer.encode("Tea is"))


@pytest.mark.parametrize("context", ["", "  "])
def test_an_empty_context_is_bos(codec, tokenizer, context):
    (found,) = encode([request(context, "Tea is")], codec, 50)
    assert found.ids[0] == tokenizer.bos_id
    assert found.num_targets == len(found.ids) - 1


def test_what_does_not_fit_is_cut_on_the_left(codec, tokenizer):
    whole, cut = encode([request("Tea is", " hot"), request("Tea is" * 30, " hot")], codec, 12)
    assert (whole.cut, cut.cut) == (False, True)
    assert len(cut.inputs) == 12
    assert cut.ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("Tea is" * 30 + " hot")][-13:]
    (long,) = encode([request("start", " word and" * 30)], codec, 12)
    assert long.num_targets == 12


def test_an_empty_continuation_is_refused(codec):
    with pytest.raises(ValueError, match="no token to score after the context 'Water'"):
        encode([request("Water", "")], codec, 50)


def test_a_prompt_leaves_room_for_its_answer(codec, tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("Tea is" * 30)]
    (found,) = encode([prompt("Tea is" * 30, until=["\n", ""], max_gen_toks=30)], codec, 100)
    assert isinstance(found, Prompt)
    assert found.ids.tolist() == ids[-70:]
    assert (found.cut, found.shortened, found.max_new, found.group) == (len(ids) > 70, False, 30, 3)
    assert found.stops == ("\n", "<|end_of_text|>")


def test_an_answer_longer_than_the_context_is_shortened(codec):
    (found,) = encode([prompt("Tea", until="Q")], codec, 100)
    assert MAX_NEW_TOKENS > 100
    assert (found.shortened, found.max_new) == (True, 50)


def test_keys_tell_apart_what_is_asked(codec):
    asked = [
        request("Tea is", " hot"),
        request("Tea", " is hot"),
        prompt("Tea is hot"),
        prompt("Tea is hot", until="."),
    ]
    asked += [prompt("Tea is hot", max_gen_toks=9)]
    keys = [item.key for item in encode(asked, codec, 1000)]
    assert len(set(keys)) == len(keys)
    assert keys == [item.key for item in encode(asked, codec, 1000)]


def test_a_text_ends_before_its_first_stop():
    assert finish("one. two\n", (".", "\n", "<|end_of_text|>")) == "one"
    assert finish("one two", (".",)) == "one two"


def test_number_of_targets_is_that_of_both_encodings(codec, tokenizer):
    """Even where the last token of the context merges with what follows."""
    for context, continuation in [("Wat", "er boils"), ("in damp", " air"), ("a wood", "en case")]:
        (found,) = encode([request(context, continuation)], codec, 50)
        head = tokenizer.encode(context)
        tail = tokenizer.encode(context + continuation)[len(head) :]
        assert found.ids.tolist() == [tokenizer.bos_id, *head, *tail]
        assert found.ids.dtype == np.int32
