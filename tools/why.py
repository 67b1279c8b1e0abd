"Runs the experiments of nbs/18b_why.ipynb; rows that results/why.csv has already are kept, so it goes on where it was stopped."
import os
from pathlib import Path

from pcrl.why import kit_setting, run_all

if __name__ == "__main__":
    out = Path(__file__).resolve().parent.parent / "results" / "why.csv"
    for dims in (2, 3): run_all(out, dims, kit_setting(dims, os.environ["PCRL_DATA"]))
