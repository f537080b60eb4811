import pytest

from data_prep.docstrings import module_name, read_objects

TEXT = '''
"""Tools for cooking.

More words."""
import sys

class Pot(Vessel, metaclass=Meta):
    """A pot."""

    def boil(self, water, /, *extra, minutes: int = 3, salt=None, **more) -> "Soup":
        """Boil it."""
        def inner(): ...

    @staticmethod
    def measure(depth, width=2.5): ...

    @property
    def volume(self):
        """In litres."""

    @volume.setter
    def volume(self, value):
        """Set it."""

    class Lid:
        def lift(self): ...

if sys.platform == "linux":
    async def wash(pot): "First."
else:
    def wash(pot, soap): "Second."

def _hidden(): ...
'''


def test_objects_of_a_module():
    objects = {item.name: item for item in read_objects(TEXT, "kitchen")}
    assert [(item.kind, item.name) for item in objects.values()] == [
        ("module", "kitchen"),
        ("class", "kitchen.Pot"),
        ("method", "kitchen.Pot.boil"),
        ("method", "kitchen.Pot.measure"),
        ("property", "kitchen.Pot.volume"),
        ("class", "kitchen.Pot.Lid"),
        ("method", "kitchen.Pot.Lid.lift"),
        ("function", "kitchen.wash"),
        ("function", "kitchen._hidden"),
    ]
    assert objects["kitchen"].docstring == "Tools for cooking.\n\nMore words."
    assert objects["kitchen.Pot"].bases == ("Vessel",)
    boil = objects["kitchen.Pot.boil"]
    assert boil.signature == "boil(water, /, *extra, minutes: int=3, salt=None, **more) -> 'Soup'"
    assert boil.parameters == (("water", None), ("extra", None), ("minutes", "3"), ("salt", "None"), ("more", None))
    assert objects["kitchen.Pot.measure"].signature == "measure(depth, width=2.5)"
    assert objects["kitchen.Pot.volume"].docstring == "In litres."
    assert objects["kitchen.wash"].docstring == "First."
    assert objects["kitchen.Pot.Lid.lift"].signature == "lift()"
    assert not objects["kitchen._hidden"].is_public


def test_what_is_not_python():
    with pytest.raises(SyntaxError):
        read_objects("def", "x")
    with pytest.raises(SyntaxError):  # null bytes; a ValueError before Python 3.12
        read_objects("def f(:", "x")


def test_module_names():
    assert module_name("email/__init__.py") == "email"
    assert module_name("email/mime/text.py") == "email.mime.text"
