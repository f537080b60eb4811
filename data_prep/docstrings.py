"""The documented objects of a Python file, found by reading it: nothing is imported or run."""

import ast
import dataclasses
from collections.abc import Iterator

PROPERTIES = {"property", "cached_property", "functools.cached_property", "abc.abstractproperty"}


@dataclasses.dataclass(frozen=True)
class ApiObject:
    """A module, class, function, method or property.

    `name` is the full dotted name, `parent` that of the module or class it is in ("" for a module). For functions and
    methods, `signature` reads `name(parameters) -> result` and `parameters` is [(name, default or None)], both
    without self and cls.
    """

    kind: str  # module | class | function | method | property
    name: str
    parent: str
    module: str
    docstring: str
    signature: str = ""
    parameters: tuple[tuple[str, str | None], ...] = ()
    bases: tuple[str, ...] = ()

    @property
    def short_name(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))


def module_name(path: str) -> str:
    """The dotted name of a file given relative to the library: "email/__init__.py" -> "email"."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def read_objects(text: str, module: str) -> list[ApiObject]:
    """Objects of one module in the order of the file, itself first. Raises SyntaxError or ValueError if not Python.

    Where a name is defined more than once (for different platforms, or as getter and setter), the first one counts.
    """
    tree = ast.parse(text)
    objects = {module: ApiObject("module", module, "", module, _docstring(tree))}
    for item in _members(tree, module, module, "function"):
        objects.setdefault(item.name, item)
    return list(objects.values())


def _members(node: ast.AST, parent: str, module: str, function_kind: str) -> Iterator[ApiObject]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            name = f"{parent}.{child.name}"
            bases = tuple(ast.unparse(base) for base in child.bases)
            yield ApiObject("class", name, parent, module, _docstring(child), bases=bases)
            yield from _members(child, name, module, "method")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield _function(child, parent, module, function_kind)
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler):  # definitions that depend on the platform
            yield from _members(child, parent, module, function_kind)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, parent: str, module: str, kind: str) -> ApiObject:
    name = f"{parent}.{node.name}"
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if kind == "method" and decorators & PROPERTIES:
        return ApiObject("property", name, parent, module, _docstring(node))
    spec = node.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(positional) - len(spec.defaults)) + [ast.unparse(value) for value in spec.defaults]
    parameters = list(zip((argument.arg for argument in positional), defaults, strict=True))
    parameters += [(spec.vararg.arg, None)] if spec.vararg else []
    parameters += [
        (argument.arg, ast.unparse(value) if value else None)
        for argument, value in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    ]
    parameters += [(spec.kwarg.arg, None)] if spec.kwarg else []
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    written = ast.unparse(spec)
    if kind == "method" and positional and "staticmethod" not in decorators:
        parameters = parameters[1:]
        written = written.removeprefix(positional[0].arg).removeprefix(", ")
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return ApiObject(
        kind=kind,
        name=name,
        parent=parent,
        module=module,
        docstring=_docstring(node),
        signature=f"{node.name}({written}){result}",
        parameters=tuple(parameters),
    )


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return (ast.get_docstring(node) or "").strip()
