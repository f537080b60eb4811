"""Questions about documented objects, answered from their docstrings and signatures: a small instruction set."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeVar

from data_prep.docstrings import ApiObject

T = TypeVar("T")
MAX_ANSWER_BYTES = 700
MAX_LIST = 12  # a longer list of methods is no answer anyone wants


def ask(objects: Sequence[ApiObject]) -> Iterator[tuple[ApiObject, str, str]]:
    """Yield (object, question, answer) for the public objects of a library; the order and the wording are fixed.

    Questions that ask for a name back are put only where one object alone has that name.
    """
    public = [item for item in objects if item.is_public]
    names = Counter(item.short_name for item in public if item.kind in ("class", "function"))
    methods = Counter((item.module, item.short_name) for item in public if item.kind == "method")
    members: dict[str, list[str]] = {}
    for item in public:
        if item.kind == "method":
            members.setdefault(item.parent, []).append(item.short_name)
    for item in public:
        pairs = [*_meaning(item), *_call(item), *_class(item, members.get(item.name, []))]
        if item.kind in ("class", "function") and names[item.short_name] == 1:
            pairs.append((_pick(item, _WHERE).format(item), f"`{item.module}`"))
        if item.kind == "method" and methods[item.module, item.short_name] == 1:
            pairs.append((_pick(item, _WHICH_CLASS).format(item), f"`{item.parent}`"))
        for question, answer in pairs:
            if len(answer.encode()) <= MAX_ANSWER_BYTES:
                yield item, question, answer


_WHAT = {
    "module": ("What is the module `{0.name}` for?", "Describe the module `{0.name}`.", "What does `{0.name}` offer?"),
    "class": ("What is the class `{0.name}`?", "Describe `{0.name}`.", "What is a `{0.name}`?"),
    "function": ("What does `{0.name}` do?", "Explain the function `{0.name}`.", "Describe what `{0.name}` does."),
    "method": ("What does `{0.name}` do?", "Explain the method `{0.name}`.", "What is `{0.name}` used for?"),
    "property": ("What is the property `{0.name}`?", "What does `{0.name}` hold?"),
}
_NAME_IT = (
    "Which {0.kind} of `{0.parent}` fits this description? {1}",
    "Name the {0.kind} of `{0.parent}` that this describes: {1}",
)
_SIGNATURE = ("Write the signature of `{0.name}`.", "How is `{0.name}` called?", "What is the signature of `{0.name}`?")
_PARAMETERS = ("Which parameters does `{0.name}` take?", "List the parameters of `{0.name}`.")
_DEFAULT = ("What is the default of `{1}` in `{0.name}`?", "Which value does `{1}` of `{0.name}` have by default?")
_WHERE = ("Which module defines `{0.short_name}`?", "From which module can I import `{0.short_name}`?")
_WHICH_CLASS = (
    "In which class of `{0.module}` is `{0.short_name}` defined?",
    "Which class of `{0.module}` has the method `{0.short_name}`?",
)
_METHODS = ("Which public methods does `{0.name}` define?", "List the public methods of the class `{0.name}`.")
_BASES = ("What does `{0.name}` inherit from?", "Which base classes does `{0.name}` have?")


def _meaning(item: ApiObject) -> Iterator[tuple[str, str]]:
    paragraph = " ".join(re.split(r"\n\s*\n", item.docstring, maxsplit=1)[0].split())
    if len(paragraph) < 20:
        return
    yield _pick(item, _WHAT[item.kind]).format(item), paragraph
    if item.kind != "module" and item.short_name not in paragraph:
        yield _pick(item, _NAME_IT).format(item, paragraph), f"`{item.short_name}`"


def _call(item: ApiObject) -> Iterator[tuple[str, str]]:
    if not item.parameters:
        return
    listed = ", ".join(f"`{name}`" for name, _ in item.parameters)
    wordings, answer = _pick(item, ((_SIGNATURE, f"`{item.signature}`"), (_PARAMETERS, listed)))
    yield _pick(item, wordings).format(item), answer
    with_default = [(name, default) for name, default in item.parameters if default is not None]
    if with_default:
        name, default = _pick(item, with_default)
        yield _pick(item, _DEFAULT).format(item, name), f"`{default}`"


def _class(item: ApiObject, methods: list[str]) -> Iterator[tuple[str, str]]:
    if item.kind != "class":
        return
    unique = list(dict.fromkeys(methods))
    if 0 < len(unique) <= MAX_LIST:
        yield _pick(item, _METHODS).format(item), ", ".join(f"`{name}`" for name in unique)
    if item.bases:
        yield _pick(item, _BASES).format(item), ", ".join(f"`{base}`" for base in item.bases)


def _pick(item: ApiObject, choices: Sequence[T]) -> T:
    """One of several choices, by hash of the object: varied, and the same in every run."""
    return choices[hashlib.sha256(f"{choices[0]}{item.name}".encode()).digest()[0] % len(choices)]
