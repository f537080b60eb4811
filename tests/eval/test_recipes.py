import gzip
import json

import pytest

from eval import recipes


def test_rebuilt_questions(mirror):
    rows = list(mirror.load_dataset("allenai/ai2_arc", "ARC-Challenge", "test"))
    assert len(rows) == 3  # eight requests each
    assert rows[1] == {
        "id": "CS2",
        "question": "Water boils when it is",
        "choices": {"text": ["cooled", "heated", "stirred"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    assert mirror.load_dataset("allenai/openbookqa", "main", "test")[2]["question_stem"] == "What do plants take in?"


def test_rebuilt_boolq(mirror):
    rows = list(mirror.load_dataset("aps/super_glue", "boolq", "validation"))
    assert rows[0]["passage"].endswith("Question: marks like this stay.")
    assert (rows[0]["question"], rows[0]["label"]) == ("is tea made from leaves", 1)
    assert (rows[1]["passage"], rows[1]["label"]) == ("Iron -- Iron is a metal.\nIt rusts in damp air.", 0)


def test_rebuilt_drop_gives_lm_eval_the_accepted_answers(mirror):
    from lm_eval.tasks.drop.utils import process_docs

    (document,) = process_docs(mirror.load_dataset("EleutherAI/drop", split="validation"))
    assert [tuple(answer) for answer in document["answers"]] == [("3",), ("3", "yards")]


def test_examples_are_taken_out_of_finished_prompts(mirror):
    from lm_eval.tasks.drop.utils import process_docs

    found = process_docs(mirror.load_dataset("EleutherAI/drop", split="train"))
    assert [row["question"] for row in found] == [f"How many in {i}?" for i in range(5)]
    assert found[3]["passage"] == "They scored 3.\nTwice."
    assert [list(map(tuple, row["answers"])) for row in found][4] == [("4",)]


@pytest.mark.parametrize("path", ["mandarjoshi/trivia_qa", "google-research-datasets/nq_open"])
def test_items_that_serve_as_examples_are_not_scored(mirror, path):
    splits = mirror.load_dataset(path, "rc.nocontext" if "trivia" in path else None)
    scored, examples = ({row["question"] for row in splits[name]} for name in ("validation", "train"))
    assert not scored & examples
    assert (len(scored), len(examples)) == (694, 6)


def test_ifeval_rows_have_all_keys():
    lines = [{"key": 1, "kwargs": [{}, {"n": 3}]}, {"key": 2, "kwargs": [{"words": ["a"]}]}]
    rows = recipes.ifeval("\n".join(map(json.dumps, lines)).encode()).to_pylist()
    assert rows[0]["kwargs"] == [{"n": None, "words": None}, {"n": 3, "words": None}]
    assert rows[1]["kwargs"] == [{"n": None, "words": ["a"]}]


def test_documents_come_once_whatever_the_number_of_requests():
    lines = [json.dumps({"native_id": i // 4, "doc": {"id": i // 4}}) for i in range(12)]
    assert recipes.requests(gzip.compress("\n".join(lines).encode())) == [{"id": 0}, {"id": 1}, {"id": 2}]
