import json
import shutil

import datasets
import pytest

from eval.mirror import INDEX, Mirror, MissingDataError
from eval.suite import DatasetRef
from mm_train.cli import UserError


@pytest.fixture
def copy(mirror, tmp_path) -> Mirror:
    """A mirror that a test may damage."""
    return Mirror(shutil.copytree(mirror.folder, tmp_path / "mirror"))


def test_load_dataset_is_answered_from_disk_while_serving(mirror):
    original = datasets.load_dataset
    with mirror.serving():
        splits = datasets.load_dataset("cais/mmlu", "anatomy")
        assert {name: len(rows) for name, rows in splits.items()} == {"dev": 5, "test": 2}
        assert datasets.load_dataset("baber/piqa", split="validation")[1]["sol2"] == "Use clean tweezers."
        assert len(datasets.load_dataset(path="Rowan/hellaswag", name=None, trust_remote_code=True)["validation"]) == 3
    assert datasets.load_dataset is original


def test_serving_ends_after_an_error(mirror):
    original = datasets.load_dataset
    with pytest.raises(MissingDataError, match="no data set nobody/nothing"), mirror.serving():
        datasets.load_dataset("nobody/nothing")
    assert datasets.load_dataset is original


def test_absent_train_split_is_empty_and_any_other_is_an_error(mirror):
    splits = mirror.load_dataset("allenai/ai2_arc", "ARC-Easy")
    assert len(splits["train"]) == 0
    assert splits["train"].features == splits["test"].features
    with pytest.raises(MissingDataError, match="data set allenai/ai2_arc ARC-Easy has no split 'validation'"):
        splits["validation"]


def test_reading_leaves_no_files_in_the_mirror(copy):
    before = sorted(copy.folder.rglob("*"))
    copy.load_dataset("baber/piqa")["validation"].map(lambda row: {"goal": row["goal"].upper()})
    assert sorted(copy.folder.rglob("*")) == before


def test_count(mirror):
    assert mirror.count(DatasetRef("cais/mmlu", "test")) == 2 * 57
    assert mirror.count(DatasetRef("cais/mmlu", "test", "anatomy")) == 2
    assert mirror.count(DatasetRef("cais/mm", "test")) == 0


@pytest.mark.parametrize("harm", ["truncate", "flip", "delete"])
def test_damaged_file_is_refused(copy, harm):
    file = copy.folder / "baber/piqa/default/validation.arrow"
    data = bytearray(file.read_bytes())
    if harm == "truncate":
        file.write_bytes(data[:-8])
    elif harm == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"validation\.arrow: \d+ bytes differ from the \d+ that mirror\.json lists"):
        copy.load_dataset("baber/piqa")


def test_damaged_index_is_refused(copy):
    (copy.folder / INDEX).write_text("{")
    with pytest.raises(UserError, match=r"mirror\.json is damaged"):
        Mirror(copy.folder)


def test_mirror_of_another_format_counts_as_empty(copy):
    index = copy.folder / INDEX
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 0}))
    assert Mirror(copy.folder).files == {}


def test_folder_without_index_is_an_empty_mirror(tmp_path):
    assert Mirror(tmp_path / "none").count(DatasetRef("baber/piqa", "validation")) == 0
