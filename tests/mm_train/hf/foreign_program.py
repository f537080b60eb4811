"""A program that has transformers but not this project: loads folders, writes text, tokenises. Run by test_interop.py.

python foreign_program.py JOB.json RESULT.json
"""

import contextlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

# An editable installation answers imports through a finder of its own; sys.path has nothing of the project.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(getattr(finder, "__module__", ""))]
OURS = ("mm_train", "kernels", "data_prep", "eval", "launch")
visible = [name for name in OURS if importlib.util.find_spec(name) is not None]

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def write(folder: str, prompts: list[list[int]]) -> list[list[int]]:
    """20 likeliest tokens after each prompt, through the key-value cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]


def tokenise(folder: str, texts: list[str], chats: list[list[dict]]) -> dict:
    """Ids of texts and conversations, and texts there and back."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return {
        "ids": ids,
        "back": [tokenizer.decode(i, skip_special_tokens=True) for i in ids],
        "chats": [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats],
        "prompts": [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    }


def run_readme(folder: str) -> str:
    """What the Python block of the model card prints."""
    (code,) = re.findall(r"```python\n(.*?)```", (Path(folder) / "README.md").read_text(), re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"FOLDER": folder})
    return printed.getvalue()


def save_again(folder: str, out: str) -> None:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(out)


job = json.loads(Path(sys.argv[1]).read_text())
save_again(job["folders"]["int4"], job["saved"])
result = {
    "visible": visible,
    "written": {name: write(folder, job["prompts"]) for name, folder in job["folders"].items()},
    "saved": write(job["saved"], job["prompts"]),
    "tokenised": {name: tokenise(folder, job["texts"], job["chats"]) for name, folder in job["tokenizers"].items()},
    "readme": run_readme(job["folders"]["int4"]),
    "imported": [name for name in OURS if name in sys.modules],
}
Path(sys.argv[2]).write_text(json.dumps(result))
