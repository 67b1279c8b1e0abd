"Runs every demonstration and writes results/demo.csv: data, dims, arm, seed, metric, value, commit. The sets of the data kit need PCRL_DATA."
import os, tempfile
from pathlib import Path

import pandas as pd

from pcrl.ablations import commit_or_version
from pcrl.demo import STORIES, demo

root = Path(__file__).resolve().parent.parent

if __name__ == "__main__":  # a demonstration starts processes that import this file
    if "PCRL_DATA" not in os.environ: raise SystemExit("PCRL_DATA is not set, and two of the demonstrations read the data kit: set it to its folder")
    commit = commit_or_version()
    with tempfile.TemporaryDirectory() as folder:
        tables = [demo(data, dims, Path(folder) / f"{data}-{dims}").assign(dims=dims, commit=commit) for data, dims in STORIES]
    (root / "results").mkdir(exist_ok=True)
    pd.concat(tables)[["data", "dims", "arm", "seed", "metric", "value", "commit"]].to_csv(root / "results" / "demo.csv", index=False)
