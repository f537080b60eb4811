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


def test_counting_alone_finds_the_same_tokens(mirror, moe_release, capsys):
    options = ["--model", str(moe_release), "--data", str(mirror.folder), "--items", "3", "--tasks"]
    columns = []
    for more in ([], ["--count"], ["--count", "--row-a-choice"]):
        assert bench.main([*options, "piqa,mmlu", *more]) == 0
        lines = capsys.readouterr().out.splitlines()[2:4]
        columns.append([tuple(int(line.split()[k]) for k in (9, 10)) for line in lines])
    computed, counted, row_a_choice = columns
    assert counted == computed
    assert row_a_choice[0] == computed[0]  # choices of several tokens have a row each, cache or not
    assert row_a_choice[1][1] == 4 * computed[1][1]
