"""Where documents come from. A kind of source is two functions: which files it reads, and the documents in them."""

import fnmatch
import glob
import gzip
import importlib.metadata
import json
import os
import re
import sysconfig
from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.config import SourceConfig
from data_prep.docstrings import ApiObject, module_name, read_objects
from data_prep.questions import ask
from mm_train.cli import UserError
from mm_train.tokenizer import ROLES

LIBRARY = Path(sysconfig.get_path("stdlib"))
TOPICS = LIBRARY / "pydoc_data" / "topics.py"
SYSTEM_DOCS = Path("/usr/share/doc")
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")


@dataclass(frozen=True)
class Document:
    """A text, or a conversation as [{"role", "content"}].

    `key` decides between training and validation: documents with one key stay together, in every source. "" stands
    for a document of its own.
    """

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    key: str = ""

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text, or of the contents of the messages."""
        return len(self.text.encode()) + sum(len(message["content"].encode()) for message in self.messages)


@dataclass(frozen=True)
class Unusable:
    """Something that is no document, and why: it is counted like every other drop."""

    reason: str
    num_bytes: int


@dataclass(frozen=True)
class Kind:
    """`files` finds the input of a source, in a fixed order; `read` turns those files into documents."""

    files: Callable[[SourceConfig], list[Path]]
    read: Callable[[SourceConfig, Sequence[Path]], Iterator[Document | Unusable]]


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


def text_files(source: SourceConfig) -> list[Path]:
    """The files that the globs in `paths` match. Raises UserError for one that matches nothing or an unknown ending."""
    files: set[Path] = set()
    for pattern in source.paths:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        if not any(match.is_file() for match in matches):
            raise UserError(f"no document source at {pattern}: no file matches")
        files.update(match for match in matches if match.is_file())
    for file in sorted(files):
        if file.suffix not in TEXT_SUFFIXES:
            raise UserError(f"cannot read {file}: a text file ends in {', '.join(TEXT_SUFFIXES)}; narrow the glob")
    return sorted(files)


def read_text_files(source: SourceConfig, files: Sequence[Path]) -> Iterator[Document | Unusable]:
    """A file is a document; in a .jsonl file, a line is one, with a `text` or a `messages` field."""
    for file in files:
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                yield from (_json_line(line) for line in lines if line.strip())
        else:
            text = _decode(file.read_bytes())
            yield Document(text) if isinstance(text, str) else text


KINDS = {
    "stdlib_code": Kind(stdlib_files, read_stdlib_code),
    "machine_docs": Kind(docs_files, read_docs),
    "docstring_chat": Kind(stdlib_files, read_docstring_chat),
    "text_files": Kind(text_files, read_text_files),
}


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


def _json_line(line: bytes) -> Document | Unusable:
    try:
        row = json.loads(line)
        if "messages" in row:
            messages = tuple({"role": message["role"], "content": message["content"]} for message in row["messages"])
            if any(message["role"] not in ROLES for message in messages):
                return Unusable("unknown role", len(line))
            document = Document(messages=messages)
        else:
            document = Document(row["text"])
        _ = document.num_bytes  # JSON can spell lone surrogates, which have no UTF-8
    except UnicodeEncodeError:
        return Unusable("undecodable", len(line))
    except (ValueError, TypeError, KeyError, AttributeError):
        return Unusable("malformed line", len(line))
    return document
