"The tool that makes results/sound.csv, on slices of the embedded brain: PCRL by the command, contrast alone for as many steps, both under the instruments."
from PIL import Image

import pandas as pd

from pcrl.datasets import brain_cases
from pcrl.runs import read_config
from pcrl.store import build_store
from sound import contrast_alone, figures, keep, pretrain


def test_both_arms_have_the_same_steps_and_are_seen_on_the_same_images(tmp_path):
    (tmp_path / "slices").mkdir()
    for i, x in enumerate(brain_cases(2).images[:24:2]): Image.fromarray(x[0]).save(tmp_path / "slices" / f"{i}.png")
    store, run, alone = build_store(tmp_path / "slices", tmp_path / "store", 2, size=64).path, tmp_path / "pcrl", tmp_path / "contra"
    pretrain(store, 2, run, 1, 0.1, "--width", 4, "--bs", 4, "--valid", 0.3)
    contrast_alone(run, alone)
    rows = pd.concat([figures(run, "pcrl", 0.1), figures(alone, "contra", 0.1)])
    of = {method: part.set_index("name").value for method, part in rows.groupby("method")}
    assert rows.groupby("method").steps.first().nunique() == 1 and of["pcrl"].images == of["contra"].images == 4
    assert {"obedience", "top1"} <= set(of["pcrl"].index) and "obedience" not in of["contra"] and "top1" in of["contra"]
    assert read_config(alone)["recipe"]["reconstruction_weight"] == 0 and read_config(run)["seed"] == read_config(alone)["seed"] == 1
    keep(rows, tmp_path / "sound.csv")
    keep(pd.concat([rows.assign(seed=2), rows[rows.method == "pcrl"].assign(value=0.0)]), tmp_path / "sound.csv")
    table = pd.read_csv(tmp_path / "sound.csv")
    assert len(table) == 2 * len(rows) and (table[(table.method == "pcrl") & (table.seed == 1)].value == 0).all() and (table[table.method == "contra"].value != 0).any()
    contrast_alone(run, alone)                                                           # it is whole, and stays
