import re

from eval import bench


def test_both_sides_are_counted_and_compared(mirror, moe_release, capsys):
    options = [
        "--model",
        str(moe_release),
        "--data",
        str(mirror.folder),
        "--items",
        "3",
        "--tasks",
        "hellaswag,boolq,bbh",
    ]
    assert bench.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["hellaswag", "boolq", "bbh"]
    ours, theirs = (int(lines[2].split()[k]) for k in (9, 10))
    total = re.fullmatch(r"all: ([\d,]+) tokens against ([\d,]+), ([\d.]+) times fewer; .* times faster", lines[5])
    assert int(total[1].replace(",", "")) == ours + int(lines[3].split()[9])
    assert int(total[2].replace(",", "")) == theirs + int(lines[3].split()[10])
    assert float(total[3]) > 1
