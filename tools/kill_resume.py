"""Kill runs of every kind with SIGKILL at random moments, continue each to its end, and compare it with one that was never stopped.

python tools/kill_resume.py --kills 60    writes results/kill_resume.csv: dims, task, method, killed_at, equal"""
import argparse, itertools, json, os, random, shutil, signal, sys, tempfile, time, traceback, warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel, numpy as np, pandas as pd, torch
from PIL import Image
from safetensors.torch import load_file

from pcrl.checkpoints import find_checkpoints, read_checkpoint
from pcrl.cli import app
from pcrl.model import METHODS
from pcrl.store import build_store

SIDES = {2: (40, 40), 3: (24, 24, 24)}
CROPS = {2: "32x32", 3: "16x16x16"}


@dataclass(frozen=True)
class Arm:
    "A kind of run: a command and its tiny data."
    dims: int  # 2 or 3
    task: str  # "pretrain", "segment" or "classify"
    method: str  # method and recipe, "" for finetuning

    def command(self, data: Path, out: Path) -> list[str]:
        shared = ["--out", out, "--dims", self.dims, "--width", 4, "--checkpoint-every", 1]
        if self.dims == 2: shared += ["--size", 40 if self.task == "pretrain" else 32]
        if self.task == "pretrain":
            crop = ["--crop", CROPS[self.dims], "--bs", 4, "--pairs-per-image", 2, "--epochs", 2, "--lr", 0.05, "--recipe", self.method.split("/")[1]]
            return ["pretrain", data / f"store-{self.dims}d", *shared, *crop]
        bs = 16 if self.task == "segment" else 4  # crops, images
        return ["finetune", data / f"{self.task}-{self.dims}d", *shared, "--repeats", 1, "--crop", CROPS[self.dims], "--epochs", 2, "--bs", bs, "--lr", 0.003]


ARMS = [Arm(dims, "pretrain", f"{method}/{recipe}") for dims in (2, 3) for method in METHODS for recipe in ("robust", "paper", "official")]
ARMS += [Arm(dims, task, "") for dims in (2, 3) for task in ("segment", "classify")]


def save(array: np.ndarray, path: Path):
    "A PNG file or a NIfTI file."
    if array.ndim == 2: Image.fromarray(array).save(path.with_suffix(".png"))
    else: nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path.with_suffix(".nii.gz"))


def make_data(folder: Path):
    "Bright boxes on noise: images, masks, and labels that say whether there is one; and a store of the images."
    for dims, sides in SIDES.items():
        rng = np.random.default_rng(dims)
        segment, classify = folder / f"segment-{dims}d", folder / f"classify-{dims}d"
        for f in (segment / "images", segment / "masks", classify): f.mkdir(parents=True)
        for i in range(16):
            image, mask = rng.integers(0, 90, sides).astype(np.uint8), np.zeros(sides, np.uint8)
            mask[tuple(slice(s, s + 12) for s in rng.integers(0, np.subtract(sides, 12)))] = i % 2
            save(image + 150 * mask, segment / "images" / f"{i:02}")
            save(mask, segment / "masks" / f"{i:02}")
        (classify / "images").symlink_to(segment / "images")
        names = sorted(p.name for p in (segment / "images").iterdir())
        split = ["train"] * 10 + ["valid"] * 4 + ["test"] * 2
        pd.DataFrame(dict(image=names, split=split, box=[i % 2 for i in range(16)])).to_csv(classify / "labels.csv", index=False)
        store = lambda: build_store(segment / "images", folder / f"store-{dims}d", dims, size=40 if dims == 2 else None)
        assert end(fork(store, folder / "store.txt")) == 0, (folder / "store.txt").read_text()


def start(command: list, said: Path, before: Callable = lambda: None) -> int:
    "Run a command of `pcrl` in a process of its own, where `before` was called; its number."
    def run():
        before()
        app([str(a) for a in command])
    return fork(run, said)


def fork(call: Callable, said: Path) -> int:
    "Call something in a forked process, so that imports are paid once."
    sys.stdout.flush()
    if pid := os.fork(): return pid
    code = 1
    try:
        sys.stdout = sys.stderr = open(said, "a", buffering=1)
        for descriptor in (1, 2): os.dup2(sys.stdout.fileno(), descriptor)
        warnings.showwarning = lambda message, *_, **__: print(f"pcrl: {message}")  # not to whoever forked
        call()
        code = 0
    except SystemExit as e: code = e.code or 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)


def end(pid: int) -> int:
    "Wait for a process; its exit code, or minus the signal that ended it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def parts(run: Path) -> list[str]:
    "Files of checkpoints and weights that are being written."
    return sorted(p.name for p in run.rglob(".*.part") if p.name != ".config.json.part") if run.exists() else []


def kill(pid: int, run: Path, seconds: float, in_write: bool) -> str | None:
    "SIGKILL after so many seconds, and if asked for as a file is being written; where that was, or None where the process was faster."
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or (in_write and not parts(run)):
        if os.waitpid(pid, os.WNOHANG)[0]: return None
        if not in_write: time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL: return None
    newest = next((p.stem for p in find_checkpoints(run / "resume")), "before the first checkpoint") if run.exists() else "before the first file"
    return f"{newest}, writing {parts(run)[0]}" if parts(run) else newest


def differences(a: Path, b: Path) -> list[str]:
    "In what two runs differ; times are left out."
    found = [] if {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()} else ["files"]
    tables = [pd.read_csv(run / "log.csv").drop(columns="seconds") for run in (a, b)]
    if not tables[0].equals(tables[1]): found.append("log.csv")
    if (a / "test.csv").exists() and (a / "test.csv").read_text() != (b / "test.csv").read_text(): found.append("test.csv")
    for path in a.glob("*.safetensors"):
        if not same_tensors(load_file(path), load_file(b / path.name)): found.append(path.name)
    (one, tensors), (other, others) = (read_checkpoint(run / "resume") for run in (a, b))
    if (one["epoch"], one["batch"], one["callbacks"]["keep_best"]) != (other["epoch"], other["batch"], other["callbacks"]["keep_best"]): found.append("place")
    return found if same_tensors(tensors, others) else [*found, "checkpoint"]


def same_tensors(a: dict, b: dict) -> bool:
    "To the bit."
    bits = lambda v: v.contiguous().view(torch.uint8) if v.ndim else v.reshape(1).view(torch.uint8)
    return a.keys() == b.keys() and all(v.dtype == b[k].dtype and torch.equal(bits(v), bits(b[k])) for k, v in a.items())


def whole_run(arm: Arm, data: Path, folder: Path) -> tuple[Path, float]:
    "A run that is never stopped, and how many seconds it took."
    run, begin = folder / f"{arm.task}-{arm.dims}d-{arm.method.replace('/', '-')}", time.perf_counter()
    code = end(start(arm.command(data, run), run.with_suffix(".txt")))
    assert code == 0, run.with_suffix(".txt").read_text()
    return run, time.perf_counter() - begin


def killed_run(arm: Arm, data: Path, whole: Path, seconds: float, rng: random.Random, kills: int = 1) -> list[dict]:
    "Kill a run so many times, let it end, compare it; a row for each kill."
    run, places = whole.with_name(f"{whole.name}-killed-{rng.random()}"), []
    said = run.with_suffix(".txt")
    while True:
        going_on = ["--resume"] if (run / "config.json").exists() else []
        pid = start(arm.command(data, run) + going_on, said)
        if len(places) == kills: break
        where = kill(pid, run, rng.random() * seconds, rng.random() < 0.5)
        if where is None: shutil.rmtree(run); places.clear()  # it was faster: again from the start
        else: places.append(where)
    code = end(pid)
    assert code == 0, said.read_text()
    unequal = differences(whole, run)
    shutil.rmtree(run)
    return [dict(dims=arm.dims, task=arm.task, method=arm.method, killed_at=where, equal=not unequal) for where in places]


def main(kills: int, out: Path, seed: int = 0):
    "Two kills a run, one run of each arm after the other, until there are enough; the table is written as it grows."
    torch.set_num_threads(1)
    rng, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_data(data := folder / "data")
        wholes = {}
        for arm in itertools.cycle(ARMS):
            if len(rows) >= kills: break
            if arm not in wholes: wholes[arm] = whole_run(arm, data, folder)
            rows += killed_run(arm, data, *wholes[arm], rng, kills=2)
            print(json.dumps(rows[-2:]), flush=True)
            pd.DataFrame(rows).to_csv(out, index=False)
    print(f"{len(rows)} kills, {sum('writing' in row['killed_at'] for row in rows)} of them in the middle of a write, {sum(row['equal'] for row in rows)} continued to equal bits")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=60)
    options.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "results" / "kill_resume.csv")
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    chosen = options.parse_args()
    main(chosen.kills, chosen.out, chosen.seed)
