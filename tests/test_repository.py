"""The rules of the house that can be read from the files: README, imports, size, self-containment."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("mm_train", "kernels", "data_prep", "eval", "launch")
MAY_IMPORT = {  # the project's own packages that each may import
    "kernels": {"kernels"},
    "mm_train": {"mm_train", "kernels"},
    "data_prep": {"data_prep", "mm_train"},
    "eval": {"eval", "mm_train"},
    "launch": {"launch", "mm_train"},
}
ONLY_IN: dict[str, str | tuple[str, ...]] = {  # files or folders that alone may import a package
    "deepspeed": "mm_train/parallel/",
    "gguf": "mm_train/gguf/",
    "xllamacpp": "mm_train/gguf/",
    "executorch": "mm_train/pte/",
    "torchao": "mm_train/pte/",
    "megatron": ("mm_train/parallel/", "data_prep/megatron.py", "data_prep/bench_peers.py"),
    "wandb": "mm_train/metrics.py",
    "wandb_workspaces": "mm_train/dashboard.py",
}
DOCUMENTS = ("architecture", "cluster", "dashboard", "device", "kernels", "recipe", "scaling_law", "training")
TORCH_FREE = (
    "alerts",
    "anomalies",
    "block_cache",
    "budget",
    "checkpoint",
    "checkpoint.folders",
    "cli",
    "compare_quant_table",
    "config",
    "costs",
    "data_plan",
    "dashboard",
    "describe",
    "evaluations",
    "files",
    "gguf.layout",
    "gguf.read",
    "gguf.runtime",
    "hf",
    "inventory",
    "log_lines",
    "manifest",
    "memory",
    "metric_names",
    "metrics",
    "mixture_change",
    "model_card",
    "order",
    "output_folder",
    "processes",
    "recipe",
    "recipe_plan",
    "recipe_state",
    "release_format",
    "remote",
    "report",
    "read_ahead",
    "rules",
    "run_facts",
    "run_folder",
    "scaling_law.ablation",
    "scaling_law.fit",
    "scaling_law.plan",
    "scaling_law.spec",
    "scaling_law.sweep",
    "shard_file",
    "sharding",
    "shards",
    "simulated",
    "stopping",
    "tokenizer",
    "watchdog",
)


@cache
def tracked() -> list[str]:
    """Paths of the repository's files as git has them, staged ones included."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listing.stdout.split("\0") if path and (ROOT / path).exists()]


def sources() -> list[str]:
    return [path for path in tracked() if path.endswith(".py") and path.split("/")[0] in PACKAGES]


def imported(path: str) -> set[str]:
    """Full names of the modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # Code that travels without the project can only be relative.
            assert node.level == 0 or path.startswith("mm_train/hf/"), f"{path}: relative import of {node.module}"
            names.add(node.module or "")
    return names


def blocks(language: str) -> list[str]:
    """The README's fenced blocks in a language ("" for those without one)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [content for marked, content in fenced if marked == language]


def commands() -> list[list[str]]:
    """Every command line of the README's bash blocks, in words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def source_of(module: str) -> Path:
    """The file that `python -m module` runs."""
    path = ROOT / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def tree() -> dict[str, str]:
    """Path -> comment of every line of the README's tree."""
    entries, folder = {}, ""
    (block,) = blocks("")
    for line in block.splitlines():
        indent, name, comment = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        entries[(folder if indent else "") + name] = comment
        if not indent:
            folder = name
    return entries


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_exists(words):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {words[1]}"
        return
    if "-m" in words:
        module = source_of(words[words.index("-m") + 1])
        assert 'if __name__ == "__main__":' in module.read_text(), f"{module} is not a command"
    else:
        assert (ROOT / words[0]).stat().st_mode & 0o100, f"{words[0]} cannot be run"
    for word in words:
        if word.endswith((".yaml", ".sh", ".py")):
            assert (ROOT / word).exists(), word


def test_the_readme_starts_with_its_two_commands():
    assert [words[:2] for words in commands()[:2]] == [["make", "quickstart"], ["make", "test"]]


def test_the_options_in_the_readme_exist():
    for words in commands():
        if "-m" in words:
            module = words[words.index("-m") + 1]
            source = source_of(module)
            text = source.read_text()
            if source.name == "__main__.py":  # its subcommands may have files of their own
                text += "".join(path.read_text() for path in source.parent.glob("*.py"))
            for option in [w for w in words[words.index("-m") :] if w.startswith("--")]:
                assert f'"{option}"' in text, f"{module} has no {option}"


def test_every_path_of_the_tree_exists_and_every_file_is_explained():
    assert [path for path in tree() if not (ROOT / path).exists()] == []
    assert [path for path, comment in tree().items() if not comment and not path.endswith("/")] == []


def test_every_file_is_in_the_tree():
    """Under a folder with entries of its own each file needs one; a folder without covers what is in it."""
    entries = set(tree())
    covering = {
        e for e in entries if e.endswith("/") and not any(other != e and other.startswith(e) for other in entries)
    }
    absent = [
        path
        for path in tracked()
        if not path.endswith("__init__.py") and path not in entries and not path.startswith(tuple(covering))
    ]
    assert absent == []


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{name}.md" for name in DOCUMENTS)],
)
def test_files_that_a_document_names_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):  # links within the repository
        assert ((ROOT / document).parent / target).exists(), target
    for path in re.findall(r"(?<![\w/.])(?:[\w.]+/)+[\w.-]+\.(?:py|sh|yaml|md)\b", re.sub(r"\]\([^)]*\)", "", text)):
        # Files of the trainer are spoken of as mm_train's own.
        assert (ROOT / path).exists() or (ROOT / "mm_train" / path).exists(), path


def test_what_is_planned_does_not_exist_and_the_rest_does():
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    files = {name: what for names, what in rows for name in re.findall(r"`([\w/]+\.py)`", names)}
    assert len(files) > 15
    for name, what in files.items():
        assert (ROOT / "mm_train" / name).exists() is not what.startswith("*planned*"), name


@pytest.mark.parametrize("path", sources())
def test_imports_go_down_only(path):
    package = path.split("/")[0]
    for name in imported(path):
        top = name.split(".")[0]
        assert top not in PACKAGES or top in MAY_IMPORT[package], f"{path} imports {name}"
        assert path.startswith(ONLY_IN.get(top, path)), f"{path} imports {name}: only {ONLY_IN[top]} may"


def test_kernels_init_is_empty():
    assert (ROOT / "kernels/__init__.py").read_text() == ""


@pytest.mark.parametrize("module", TORCH_FREE)
def test_a_torch_free_module_does_not_load_torch(module):
    code = f"import sys, mm_train.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_no_source_file_is_over_400_lines():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in tracked() if path.endswith(".py")}
    assert {path: n for path, n in lengths.items() if n > 400 and not path.startswith("tests/")} == {}


def test_the_project_names_no_place_outside_itself():
    """Whoever clones it has no machine, folder or registry host of ours."""
    hosts = ("pypi", "files.pythonhosted", "registry.npmjs", "deb.debian")
    pattern = re.compile(
        r"\.\./shared|(?<![\w.])/(?:work|farm|root|opt)/|(?:%s)\.org" % "|".join(map(re.escape, hosts))  # noqa: UP031
    )
    found = {}
    for path in tracked():
        content = (ROOT / path).read_bytes()
        if b"\0" not in content and (match := pattern.search(content.decode())):
            found[path] = match.group()
    assert found == {}


def test_the_version_is_outside_the_range_that_transformers_mistakes_for_another_project():
    text = (ROOT / "pyproject.toml").read_text()
    version = tuple(map(int, re.search(r'^version = "([\d.]+)"', text, re.MULTILINE).group(1).split(".")))
    assert not (0, 18, 2) <= version < (0, 19, 0)


@pytest.mark.parametrize("script", [path for path in tracked() if path.endswith(".sh") or path == ".ci/run"])
def test_a_script_is_executable_and_valid_bash(script):
    assert (ROOT / script).stat().st_mode & 0o100
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0


def test_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    scripts = [path for path in tracked() if path.endswith(".sh") or path == ".ci/run"]
    done = subprocess.run(["shellcheck", "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""
