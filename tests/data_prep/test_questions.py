from data_prep.docstrings import read_objects
from data_prep.questions import ask

KITCHEN = '''
"""Tools for cooking and for washing up."""

class Pot(Vessel):
    """A pot that holds   water
    and soup.

    Details nobody asked for."""

    def boil(self, water, minutes=3):
        """Heat the water until it moves."""

    def _secret(self, thing):
        """Not for the public at all."""

class Pan(Vessel):
    """What eggs are fried in, mostly."""

    def boil(self): ...

def wash(): ...

def dry(): ...
'''
GARDEN = "def dry(clothes): ..."


def answers() -> dict[str, dict[str, str]]:
    """{object name: {question: answer}} of two small modules."""
    found: dict[str, dict[str, str]] = {}
    for item, question, answer in ask([*read_objects(KITCHEN, "kitchen"), *read_objects(GARDEN, "garden")]):
        found.setdefault(item.name, {})[question] = answer
    return found


def test_answers_come_from_the_source():
    about_pot = answers()["kitchen.Pot"]
    assert "A pot that holds water and soup." in about_pot.values()
    assert "`boil`" in about_pot.values()
    assert "`Vessel`" in about_pot.values()
    assert "`kitchen`" in about_pot.values()
    assert "Tools for cooking and for washing up." in answers()["kitchen"].values()
    boil = set(answers()["kitchen.Pot.boil"].values())
    assert {"Heat the water until it moves.", "`boil`", "`3`"} < boil
    assert boil & {"`boil(water, minutes=3)`", "`water`, `minutes`"}


def test_a_name_is_asked_back_only_when_one_object_has_it():
    found = answers()
    assert set(found["kitchen.wash"].values()) == {"`kitchen`"}
    assert "kitchen.dry" not in found  # two modules define it, and it has no docstring or parameters
    assert "`kitchen.Pot`" not in found["kitchen.Pot.boil"].values()  # Pan has a boil too


def test_private_objects_are_left_alone():
    assert not any("_secret" in name for name in answers())


def test_questions_name_their_object_and_are_the_same_in_every_run():
    for name, pairs in answers().items():
        for question in pairs:
            assert name.rpartition(".")[2] in question or "descri" in question
    assert answers() == answers()
