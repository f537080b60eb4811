import dataclasses

import pytest

from mm_train import budget, config, describe
from mm_train.cli import UserError
from mm_train.data import Loader
from mm_train.metrics import read_metrics
from mm_train.order import Mixture
from mm_train.train import train


@pytest.fixture
def epochs(small_config):
    """The shared run, for two epochs of its data instead of 12 steps."""
    small_config.train.tokens, small_config.train.epochs = 0, 2.0
    config.validate(small_config)
    return small_config


def test_an_epoch_is_all_rows_of_the_sources_rounded_up_to_whole_steps(epochs):
    windows = {"code": 100, "chat": 31, "unused": 10**6}
    resolved = budget.with_tokens(epochs, windows)
    rows = 2 * (100 + 31)  # 64 tokens each, in batches of 512
    assert (resolved.train.tokens, resolved.train.epochs) == (-(-rows * 64 // 512) * 512, 0)
    assert resolved.total_steps == 33
    assert budget.with_tokens(resolved, windows) is resolved


def test_with_weights_in_proportion_to_size_every_source_is_read_so_often(epochs):
    windows = {"code": 3000, "chat": 1000}  # the mixture is 3 to 1
    resolved = budget.with_tokens(epochs, windows)
    read = Mixture(resolved.data.mixture, windows, seed=0).epochs(resolved.train.tokens // 64)
    assert read == {"code": pytest.approx(2, rel=1e-3), "chat": pytest.approx(2, rel=1e-3)}


def test_the_folder_tells_what_training_finds(epochs):
    loader = Loader(epochs.data.path, epochs.data.mixture, 64, seed=0)
    assert budget.from_folder(epochs) == budget.with_tokens(epochs, loader.mixture.num_windows)


def test_training_says_what_came_of_it_and_trains_so_long(epochs, capsys):
    epochs.train.epochs = 0.2
    steps = budget.from_folder(epochs).total_steps
    assert train(epochs) == 0
    assert f"train.epochs 0.2 of {epochs.data.path}: {steps * 512:,} tokens, {steps} steps" in capsys.readouterr().out
    assert read_metrics(epochs.run.dir)["train"][-1]["step"] == steps
    assert config.load([f"{epochs.run.dir}/config.yaml"]).train == dataclasses.replace(
        epochs.train, tokens=steps * 512, epochs=0
    )


def test_data_that_is_not_there_cannot_be_counted(epochs):
    epochs.data.path = "nowhere"
    with pytest.raises(UserError, match=r"train.epochs is 2: .* and nowhere has no code, chat; prepare it, or set"):
        budget.from_folder(epochs)
    epochs.data.path = "s3://bucket/data"
    with pytest.raises(UserError, match=r"s3://bucket/data is not a folder here"):
        budget.from_folder(epochs)


def test_a_schedule_longer_than_the_epochs_is_refused(epochs):
    epochs.optim.warmup_steps = 1000
    with pytest.raises(UserError, match=r"optim.warmup_steps \(1000\) must be below"):
        budget.from_folder(epochs)


def test_describe_counts_epochs_too(epochs, tmp_path, capsys):
    config.save(epochs, tmp_path / "cfg.yaml")
    assert describe.main([str(tmp_path / "cfg.yaml"), "--json"]) == 0
    assert f'"tokens": {budget.from_folder(epochs).train.tokens}' in capsys.readouterr().out
    assert describe.main([str(tmp_path / "cfg.yaml"), "--json", "--tokens", "1M"]) == 0
    assert '"tokens": 1000000' in capsys.readouterr().out
