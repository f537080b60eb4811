import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mm_train import hf
from mm_train.cli import UserError
from mm_train.release import load_release


def test_importing_it_loads_neither_torch_nor_transformers():
    code = "import sys, mm_train.hf; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_the_files_of_a_folder_need_nothing_but_torch_and_transformers():
    names = {file.name for file in hf.code_files()}
    assert names == {"configuration_mobilemoe.py", "modeling_mobilemoe.py"}
    for file in hf.code_files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in names
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
                for module in modules:
                    top = module.split(".")[0]
                    assert top in {"torch", "transformers"} | sys.stdlib_module_names, f"{file.name} imports {module}"


def test_the_auto_map_names_classes_that_exist():
    defined = {
        f"{file.stem}.{node.name}"
        for file in hf.code_files()
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    assert set(hf.AUTO_MAP.values()) <= defined


def test_registered_classes_need_no_trust(release, format, tokens_BT, tmp_path, byte_tokenizer):
    import transformers

    hf.register()
    hf.register()
    folder = release(format)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    assert type(model).__module__ == "mm_train.hf.modeling_mobilemoe"
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT).logits, load_release(folder)(tokens_BT))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert tokenizer("it").input_ids == [byte_tokenizer.bos_id, *byte_tokenizer.encode("it")]
    model.save_pretrained(tmp_path)
    assert {file.name for file in hf.code_files()} <= {path.name for path in tmp_path.iterdir()}


def test_without_transformers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"transformers is not installed: pip install 'mobilemoe-train\[hf\]'"):
        hf.register()


def test_an_old_transformers_is_refused(monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(UserError, match=r"transformers 4.57.1 is too old, it must be 5.0 or newer"):
        hf.register()


def test_the_python_of_the_projects_readme_runs(release, tmp_path, monkeypatch, tokens_BT):
    readme = (Path(hf.__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    folder = release("int4")
    monkeypatch.chdir(tmp_path)
    names = {"tokens_BT": tokens_BT}
    for block in blocks:
        assert '"runs/quickstart/export"' in block
        exec(block.replace("runs/quickstart/export", str(folder)), names)
    assert torch.equal(names["logits_BTV"], load_release(tmp_path / "out")(tokens_BT))
    assert names["model"](tokens_BT).logits.shape == names["logits_BTV"].shape
