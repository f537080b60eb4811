import pytest

from mm_train.cli import LostContact, UserError, command


def run(error):
    @command
    def main():
        raise error

    return main()


def test_a_user_error_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert run(UserError("wrong:\n  value 3,\n  right: 4")) == 2
    assert capsys.readouterr().err == "error: wrong: value 3, right: 4\n"


def test_other_ranks_say_who_they_are(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run(UserError("disk full")) == 2
    assert capsys.readouterr().err == "[rank 3] error: disk full\n"


def test_interruption_is_quiet_and_a_defect_is_not(capsys):
    assert run(KeyboardInterrupt()) == 130
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError())


def test_status_of_main_is_kept():
    assert command(lambda: None)() == 0
    assert command(lambda: 3)() == 3


def test_losing_contact_has_a_status_of_its_own_and_an_odd_rank_changes_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run(LostContact("rank 2 is gone")) == 69
    assert capsys.readouterr().err == "[rank x] error: rank 2 is gone\n"
