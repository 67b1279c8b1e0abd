"The tool that makes results/finetune.csv, on a toy set: its columns, what it says to be left, and that it makes no row twice."
from dataclasses import replace

from finetune_table import CELLS, finetunings_left, make, trials
from pcrl.ablations import COLUMNS, SMALL, Results, Trial
from pcrl.datasets import brain_cases


def test_each_set_has_a_trial_for_each_number_of_labels():
    for data in SMALL:
        cells = trials(data, "small")
        assert [t.labelled for t in cells] == [(n,) for n in CELLS[data]] and {t.crop for t in cells} == {SMALL[data].crop}
        assert {t.tune_epochs for t in trials(data, "smoke")} == {1}


def test_the_table_goes_on_where_it_was(tmp_path, capsys):
    brain = brain_cases(2)
    brain = brain.take([i for i, s in enumerate(brain.split) if s == "train"][:12] + [i for i, s in enumerate(brain.split) if s != "train"][::32])
    toy = Trial(lambda kit: brain, (32, 32), 4, 16, 1, 1, (2,), 2, 8, (1e-3, 3e-3), (32, 32), 16, ("full",))
    cells, results = [toy, replace(toy, labelled=(12,), tune_crops=24)], Results(tmp_path / "finetune.csv")
    assert [finetunings_left(results, brain, t, [0, 1], [0]) for t in cells] == [2 * (1 + 2), 2 * (1 + 2)]
    assert [finetunings_left(results, brain, t, [0, 1], [0, 1]) for t in cells] == [2 * (2 + 4), 2 * (1 + 2)]    # a choice by all draws; all cases are one
    make(results, brain, cells[:1], tmp_path / "runs", [0, 1], [0])
    told = capsys.readouterr().out
    assert "brain: " in told and "with 2 labelled 6 finetunings" in told
    table = Results(results.path).table
    chosen, tested = (table[(table.split == split) & (table.seed == 0) & (table.method == "pcrl")] for split in ("valid", "0"))
    assert chosen.seconds.iloc[0] > tested.seconds.iloc[0]                                # of both ways, and of the chosen one among them
    assert table.columns.tolist() == COLUMNS and set(table.method) == {"scratch", "pcrl"} and set(table.split) == {"valid", "0"}
    assert [finetunings_left(results, brain, t, [0, 1], [0]) for t in cells] == [0, 6]
    make(Results(results.path), brain, cells, tmp_path / "runs", [0, 1], [0])
    told = capsys.readouterr().out
    assert "pretraining 0 min; with 12 labelled 6 finetunings" in told and "with 2 labelled" not in told
    after = Results(results.path).table
    assert after[:len(table)].equals(table) and len(after[after.metric == "dice"]) == 4 + 4
