"""Is `robust` sound within 20 minutes? Pretrains by the command and contrast alone for as many steps, and diagnoses both on patients held out: results/sound.csv.

A run that is whole is not made again; one that was stopped goes on. Rows of other runs stay."""
import argparse, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pandas as pd, torch

from pcrl.pretrain import load_method, pretrain_learner, store_loaders
from pcrl.runs import read_config, resume, write_whole
from pcrl.store import Store, build_store
from pcrl.timing import conditions
from pcrl.why import curve_points

root, KEY = Path(__file__).resolve().parent.parent, ["dims", "method", "width", "seed"]
DATA = {2: ("nih_cxr14_subset", "labels.csv", "images/{image}", dict(size=256)),
        3: ("hippocampus", "splits.csv", "imagesTr/{case}.nii.gz", dict(spacing=(1.0, 1.0, 1.0)))}


def pcrl(*args):
    "The command."
    subprocess.run([Path(sys.executable).with_name("pcrl"), *map(str, args)], check=True)


def kit_store(dims: int, kit: Path, folder: Path) -> Path:
    "Radiographs in 2D, the hippocampus in 3D: all patients, those of the published test part marked, so that nothing trains on them."
    data, table, name, settings = DATA[dims]
    rows = pd.read_csv(kit / data / table, dtype=str).to_dict("records")
    facts = {kit / data / name.format(**row): dict(patient=row.get("patient_id", row.get("case")), split=row["split"]) for row in rows}
    return build_store([*facts], folder / f"{data}-store", dims, describe=facts.get, **settings).path


def pretrain(store: Path, dims: int, run: Path, seed: int, minutes: float, *options):
    "PCRL, by the command."
    goes_on = ["--resume"] if (run / "config.json").exists() else []
    pcrl("pretrain", store, "--out", run, "--dims", dims, "--seed", seed, "--minutes", minutes, *options, *goes_on)


def contrast_alone(of: Path, run: Path):
    "With the crops, the network and the steps of a run of PCRL."
    config = read_config(of)
    dls = store_loaders(Store(config["store"]), valid=config["valid"], seed=config["seed"], **config["loaders"])
    notes, epochs = {k: config[k] for k in ("store", "manifest", "valid", "loaders", "plan")}, len(pd.read_csv(of / "log.csv"))
    recipe = replace(load_method(of).recipe, reconstruction_weight=0.0)
    learn = pretrain_learner(dls, config["dims"], recipe=recipe, width=config["width"], run=run, seed=config["seed"], notes=notes)
    start = resume(learn) if (run / "config.json").exists() else 0
    if start < epochs:
        with learn.no_bar(), learn.no_logging(): learn.fit(epochs, start_epoch=start)


def figures(run: Path, method: str, minutes: float) -> pd.DataFrame:
    "What `pcrl diagnose` finds and how it came to that, a row a figure."
    pcrl("diagnose", run, "--out", run / "seen")
    config, log, seen = read_config(run), pd.read_csv(run / "log.csv"), pd.read_csv(run / "seen" / "diagnose.csv")
    found = dict(zip(seen.name, seen.value)) | curve_points(log)
    key = dict(dims=config["dims"], method=method, seed=config["seed"], minutes=minutes, crop="x".join(map(str, config["crop_size"])), width=config["width"],
               steps=int(log.steps.iloc[-1]), seconds=round(log.seconds.sum()), conditions=conditions(torch.device("cpu")))
    return pd.DataFrame(key | dict(name=found.keys(), value=found.values()))


def keep(rows: pd.DataFrame, path: Path):
    "Put them into the table, in the place of rows of the same runs."
    if path.exists():
        before = pd.read_csv(path)
        rows = pd.concat([before[~before.set_index(KEY).index.isin(rows.set_index(KEY).index)], rows])
    write_whole(path, lambda p: rows.to_csv(p, index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 3], choices=[2, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--width", type=int, help="channels of the first level; what the command chooses if left out")
    parser.add_argument("--out", type=Path, default=root / "results", help="folder of sound.csv")
    parser.add_argument("--runs", type=Path, default=root / "sound", help="folder of stores and runs")
    args = parser.parse_args()
    for seed in args.seeds:
        for dims in args.dims:
            store, width = kit_store(dims, Path(os.environ["PCRL_DATA"]), args.runs), f"-width{args.width}" if args.width else ""
            run, alone = (args.runs / f"{dims}d-{name}{width}-seed{seed}" for name in ("pcrl", "contra"))
            pretrain(store, dims, run, seed, args.minutes, *(["--width", args.width] if args.width else []))
            contrast_alone(run, alone)
            keep(pd.concat([figures(run, "pcrl", args.minutes), figures(alone, "contra", args.minutes)]), args.out / "sound.csv")
