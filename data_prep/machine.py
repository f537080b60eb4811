"""Documents that every machine with Python carries: standard library, its documentation, questions about it."""

import fnmatch
import gzip
import importlib.metadata
import os
import re
import sysconfig
from ast import literal_eval
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.config import SourceConfig
from data_prep.docstrings import ApiObject, module_name, read_objects
from data_prep.documents import Document, Unusable
from data_prep.questions import ask

LIBRARY = Path(sysconfig.get_path("stdlib"))
TOPICS = LIBRARY / "pydoc_data" / "topics.py"
SYSTEM_DOCS = Path("/usr/share/doc")


def stdlib_files(source: SourceConfig) -> list[Path]:
    """The .py files of the running interpreter's standard library that `exclude` leaves."""
    names: list[str] = []
    for folder, folders, files in os.walk(LIBRARY):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages", "__pycache__")]
        names += (Path(folder, name).relative_to(LIBRARY).as_posix() for name in files if name.endswith(".py"))
    excluded = [re.compile(fnmatch.translate(pattern)) for pattern in source.exclude]
    return [LIBRARY / name for name in sorted(names) if not any(pattern.match(name) for pattern in excluded)]


def read_stdlib_code(source: SourceConfig, files: Sequence[Path]) -> Iterator[Document | Unusable]:
    """Each module as it is."""
    for file in files:
        text = _decode(file.read_bytes())
        yield Document(text, key=_module(file)) if isinstance(text, str) else text


def docs_files(source: SourceConfig) -> list[Path]:
    """Files behind the `parts` of machine_docs."""
    files: list[Path] = []
    if "topics" in source.parts:
        files.append(TOPICS)
    if "docstrings" in source.parts:
        files += stdlib_files(source)
    if "packages" in source.parts:
        found = (
            file.locate()
            for distribution in importlib.metadata.distributions()
            for file in distribution.files or []
            if file.name == "METADATA"
        )
        files += sorted(Path(str(path)) for path in found if Path(str(path)).is_file())
    if "system" in source.parts:
        patterns = ("*.txt", "*.md", "*.rst", "README*", "*.txt.gz", "README*.gz")
        found_texts = {file for pattern in patterns for file in SYSTEM_DOCS.rglob(pattern) if file.is_file()}
        files += sorted(file for file in found_texts if not file.is_symlink())
    return list(dict.fromkeys(files))


def read_docs(source: SourceConfig, files: Sequence[Path]) -> Iterator[Document | Unusable]:
    """Help topics, a page for each module, descriptions of installed packages, and the system's documentation."""
    for file in files:
        data = file.read_bytes()
        if file.suffix == ".gz":
            try:
                data = gzip.decompress(data)
            except (OSError, EOFError):
                yield Unusable("undecodable", len(data))
                continue
        text = _decode(data)
        if isinstance(text, Unusable):
            yield text
        elif file.name == "METADATA":
            yield Document(text.partition("\n\n")[2])
        elif file == TOPICS and "topics" in source.parts:
            yield from _topics(text)
        elif file.suffix == ".py":
            objects = _objects(text, file)
            yield Document(_page(objects), key=_module(file)) if isinstance(objects, list) else objects
        else:
            yield Document(text)


def read_docstring_chat(source: SourceConfig, files: Sequence[Path]) -> Iterator[Document | Unusable]:
    """Question and answer pairs about the standard library."""
    library: list[ApiObject] = []
    for file in files:
        text = _decode(file.read_bytes())
        objects = _objects(text, file) if isinstance(text, str) else text
        if isinstance(objects, Unusable):
            yield objects
        else:
            library += objects
    for item, question, answer in ask(library):
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        yield Document(messages=messages, key=item.module)


def _module(file: Path) -> str:
    return module_name(file.relative_to(LIBRARY).as_posix())


def _decode(data: bytes) -> str | Unusable:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return Unusable("undecodable", len(data))


def _objects(text: str, file: Path) -> list[ApiObject] | Unusable:
    try:
        return read_objects(text, _module(file))
    except (SyntaxError, ValueError):
        return Unusable("not parsable", len(text.encode()))


def _page(objects: list[ApiObject]) -> str:
    """What is documented in a module, in the manner of pydoc; "" when nothing is."""
    parts = []
    for item in objects:
        if item.docstring:
            title = item.name + item.signature.removeprefix(item.short_name)
            parts.append(f"{title}\n\n{item.docstring}\n")
    return "\n".join(parts)


def _topics(text: str) -> Iterator[Document]:
    """The texts of topics.py, which is one assignment of a dict of strings."""
    for title, topic in literal_eval(text[text.index("{") :]).items():
        yield Document(topic, key=f"topic {title}")
