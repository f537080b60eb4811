import pytest
import torch

from mm_train.bench_decode import WAYS, main
from mm_train.model import MobileMoE
from mm_train.release import load_release, save_release

TINY = ["configs/model/tiny.yaml", "model.num_hidden_layers=1", "--tokens", "2", "--repeats", "1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_computes_the_same(small_model, tmp_path, dtype):
    model = MobileMoE(small_model)
    model.init_weights(0)
    save_release(model, tmp_path / "out", "int4")
    model = load_release(tmp_path / "out", dtype)
    tokens, outputs = torch.arange(10)[None], []
    for kind in WAYS.values():
        for layer in model.moe_layers():
            layer.__class__ = kind
        cache = model.new_cache(1, 11)
        with torch.no_grad():
            model.hidden(tokens, cache)
            outputs.append(model.hidden(tokens[:, :1], cache))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=tolerance, atol=tolerance)


def test_the_command_shows_every_way_for_both_dtypes(capsys):
    assert main(TINY) == 0
    output = capsys.readouterr().out
    assert all(output.count(way) == 2 for way in WAYS)
    assert output.count("1 / 1.00") == 2


def test_what_cannot_be_measured_is_refused(capsys):
    assert main([*TINY, "--repeats", "0"]) == 2
    assert "--prompt-tokens, --tokens and --repeats must be at least 1" in capsys.readouterr().err
    assert main(["configs/model/s-dense.yaml"]) == 2
    assert "mobilemoe-s-dense is dense: there are no experts to loop over" in capsys.readouterr().err
