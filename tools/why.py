"Runs the experiments of nbs/18b_why.ipynb; rows that results/why.csv, why-long.csv and air.csv have already are kept, so it goes on where it was stopped."
import os
from dataclasses import replace
from pathlib import Path

from pcrl.why import brain_setting, kit_setting, run_all

if __name__ == "__main__":
    results, kit = Path(__file__).resolve().parent.parent / "results", os.environ["PCRL_DATA"]
    run_all(results / "air.csv", 3, brain_setting(kit), names=["robust", "robust, crops of air"])
    for dims in (2, 3): run_all(results / "why.csv", dims, kit_setting(dims, kit))
    run_all(results / "why-long.csv", 2, replace(kit_setting(2, kit), epochs=28), (0,), ["paper, faster"])
