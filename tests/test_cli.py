"The command on real files and folders, as a user types it: in a process of its own, but for refusals."
import json, os, shutil, subprocess, sys, time
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from kill_resume import differences
from pcrl.checkpoints import find_checkpoints
from pcrl.cli import app
from pcrl.datasets import brain_cases
from pcrl.store import Store

SMALL_2D = ["--dims", "2", "--crop", "32x32", "--size", "64", "--width", "4", "--bs", "4", "--lr", "0.05"]


def pcrl(*args, code=0):
    "Run the command; its standard output, or its standard error where it is to fail."
    done = subprocess.run([Path(sys.executable).with_name("pcrl"), *map(str, args)], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1", COLUMNS="200"))
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stderr if code else done.stdout


def complaint(*args, beside=None):
    "The one sentence with which the command refuses; there may be warnings with the words `beside`."
    done = CliRunner().invoke(app, [str(a) for a in args])
    lines = [line for line in done.stderr.strip().splitlines() if beside is None or beside not in line]
    assert done.exit_code == 1 and len(lines) == 1 and lines[0].startswith("pcrl: "), (done.exit_code, lines, done.exception)
    return lines[0]


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    "Axial slices of the embedded brain as PNG files, with masks, as a user's folder has them."
    folder, brain = tmp_path_factory.mktemp("slices"), brain_cases(2)
    for kind in ("images", "masks"): (folder / kind).mkdir()
    for i in range(0, 60, 3):
        Image.fromarray(brain.images[i][0]).save(folder / "images" / f"{i:03}.png")
        Image.fromarray(brain.targets[i]).save(folder / "masks" / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def run(slices, tmp_path_factory):
    "A pretraining run on them."
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    assert str(out) in pcrl("pretrain", slices / "images", "--out", out, "--epochs", 2, *SMALL_2D)
    return out


def test_pretrain_writes_a_run_folder_and_a_store(run):
    assert {p.name for p in run.iterdir()} == {"card.md", "config.json", "decoder.safetensors", "encoder.safetensors", "figures", "log.csv", "resume"}
    assert len(pd.read_csv(run.with_name("pretrained-store") / "manifest.csv")) == 20
    log = pd.read_csv(run / "log.csv")
    assert {"train_loss", "valid_contrast", "valid_reconstruction", "valid_positive", "valid_negative", "valid_logit_gap", "valid_rank"} <= set(log.columns)
    assert json.loads((run / "config.json").read_text())["recipe"]["name"] == "robust"


def test_pretrain_in_minutes_and_diagnose(run, slices, tmp_path):
    "A budget chooses what is not given; the run is then looked at on the images that it kept, also where its own store is named."
    store, out = run.with_name("pretrained-store"), tmp_path / "run"
    said = pcrl("pretrain", store, "--out", out, "--minutes", 0.1, "--dims", 2, "--width", 4, "--bs", 16, "--valid", 0.3)
    config = json.loads((out / "config.json").read_text())
    assert "steps" in said and "Epoch 1/" not in said                              # no bar in a file
    assert config["crop_size"] == [64, 64] and config["width"] == 4 and config["plan"]["steps"] == config["steps_per_epoch"] * config["epochs"]
    assert pcrl("diagnose", out, "--out", tmp_path / "seen").split(":")[0] in ("collapsed", "deaf to T", "leaning on skips", "under-trained", "sound")
    table = pd.read_csv(tmp_path / "seen" / "diagnose.csv").set_index("name")
    assert {"obedience", "wrong_over_right", "logit_gap", "top1", "rank", "width"} <= set(table.index) and table.value.images == 6
    pcrl("diagnose", out, "--out", tmp_path / "all", "--store", store)
    assert pd.read_csv(tmp_path / "all" / "diagnose.csv").set_index("name").value.images == 6


def test_pretrain_by_the_authors_recipe(run, slices, tmp_path):
    "Their three channels, their last epoch; what the command line says goes before what the recipe says."
    pcrl("pretrain", run.with_name("pretrained-store"), "--out", tmp_path / "run", "--epochs", 1, "--recipe", "official", *SMALL_2D)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["recipe"]["name"], config["in_channels"], config["batch_size"], config["crop_size"]) == ("official", 3, 4, [32, 32])
    assert "are those of epoch 0, the last" in (tmp_path / "run" / "card.md").read_text()


def test_pretrain_does_not_overwrite_a_run(run, slices):
    before = (run / "encoder.safetensors").read_bytes()
    assert "holds a run already" in complaint("pretrain", slices / "images", "--out", run, *SMALL_2D)
    assert (run / "encoder.safetensors").read_bytes() == before


def test_pretrain_resumes_where_it_stopped(run, tmp_path):
    "Killed once it has a checkpoint, and continued: the same log, weights, queue and optimiser as the run that was never stopped."
    out = tmp_path / "cut"
    command = ["pretrain", run.with_name("pretrained-store"), "--out", out, "--epochs", 2, *SMALL_2D]
    killed = subprocess.Popen([Path(sys.executable).with_name("pcrl"), *map(str, command), "--checkpoint-every", "1"], stdout=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1"))
    while not find_checkpoints(out / "resume"):
        assert killed.poll() is None
        time.sleep(0.001)
    killed.kill()
    assert killed.wait() == -9 and not (out / "card.md").exists()
    pcrl(*command, "--resume")
    assert differences(run, out) == []


def test_finetune_to_masks_from_a_run_and_from_scratch(run, slices, tmp_path):
    shared = ["--dims", 2, "--crop", "64x64", "--epochs", 2, "--lr", 0.003, "--repeats", 1, "--schedule", "frozen-then-full"]
    for arm, extra in (("scratch", ["--width", 4]), ("pcrl", ["--init", run])):
        out = pcrl("finetune", slices, "--out", tmp_path / arm, *shared, *extra)
        assert "dice" in out and "test cases" in out
        test = pd.read_csv(tmp_path / arm / "test.csv").set_index("metric").value
        assert test.filter(like="dice").between(0, 1).all() and len(test.filter(like="dice")) >= 3
    a, b = (json.loads((tmp_path / arm / "config.json").read_text()) for arm in ("scratch", "pcrl"))
    assert [k for k in a if a[k] != b[k]] == ["init"]
    told = CliRunner().invoke(app, ["compare", str(tmp_path / "scratch"), str(tmp_path / "pcrl")]).stdout
    assert all(name in told for name in (" Dice ", " surface Dice ", " HD95 ")) and "wilcoxon_p" not in told and "too few test patients for an interval. Nothing is claimed from one run" in told


def test_what_is_tested_later_is_not_pretrained_on(slices, tmp_path):
    "Where a folder has no split of its own, both commands draw the same, whatever their seeds."
    names = sorted(p.name for p in (slices / "images").iterdir())
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "images").symlink_to(slices / "images")
    pd.DataFrame(dict(image=names, bright=[0, 0, 1, 1] * 5)).to_csv(tmp_path / "own" / "labels.csv", index=False)
    pcrl("pretrain", tmp_path / "own", "--out", tmp_path / "run", "--epochs", 1, "--seed", 1, *SMALL_2D)
    pcrl("finetune", tmp_path / "own", "--out", tmp_path / "tuned", "--init", tmp_path / "run", "--epochs", 1, "--seed", 2, "--repeats", 1, "--dims", 2, "--size", 64)
    seen, tested = pd.read_csv(tmp_path / "run-store" / "manifest.csv").volume, pd.read_csv(tmp_path / "tuned" / "predictions.csv").case
    assert len(tested) and len(seen) + len(tested) == len(names) and not set(seen) & set(tested)
    assert "was pretrained on" not in (tmp_path / "tuned" / "report.md").read_text()


@pytest.fixture(scope="module")
def labelled(slices, tmp_path_factory):
    "The slices with labels in a table: two of each patient, and a split."
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "images").symlink_to(slices / "images")
    names = sorted(p.name for p in (slices / "images").iterdir())
    splits = ["train"] * 8 + ["valid"] * 4 + ["test"] * 8
    pd.DataFrame(dict(image=names, patient=[i // 2 for i in range(20)], split=splits, bright=[0, 0, 1, 1] * 5)).to_csv(folder / "labels.csv", index=False)
    return folder


def test_finetune_to_labels_in_repeats_and_compare(run, labelled, tmp_path):
    "Two repeats of two arms, a linear probe among them: every file that is promised, and the comparison's refusal to say more than it may."
    shared = ["--dims", 2, "--size", 64, "--epochs", 1, "--labelled", 6, "--lr", 0.003]
    out = pcrl("finetune", labelled, "--out", tmp_path / "scratch", "--width", 4, "--repeats", 2, "--class-weights", *shared)
    assert "auc bright" in out and "sd" in out and "seed 1" in out
    assert {p.name for p in (tmp_path / "scratch").iterdir()} == {"seed0", "seed1", "results.csv", "report.md", "split.csv", "options.json"}
    assert "labelled cases" in json.loads((tmp_path / "scratch" / "seed1" / "config.json").read_text())["data"]
    predictions = pd.read_csv(tmp_path / "scratch" / "seed0" / "predictions.csv")
    assert predictions.columns.tolist() == ["case", "patient", "label bright", "probability bright"] and len(predictions) == 8
    assert pd.read_csv(tmp_path / "scratch" / "seed0" / "test.csv").metric.tolist()[:2] == ["auc", "auc bright"]
    assert "2 repeats" in (tmp_path / "scratch" / "report.md").read_text()
    pcrl("finetune", labelled, "--out", tmp_path / "probe", "--init", run, "--repeats", 1, "--schedule", "frozen", "--patience", 1, *shared)
    frozen, given = (load_file(folder / "encoder.safetensors") for folder in (tmp_path / "probe", run))
    assert all(frozen[k].equal(v) for k, v in given.items())
    assert f"Mind: {run} was pretrained on 8 of 8 test cases, such as 036.png, without labels" in (tmp_path / "probe" / "report.md").read_text()
    told = pcrl("compare", tmp_path / "scratch", tmp_path / "probe")
    assert "probe minus scratch" in told and "Nothing is claimed from one run" in told
    assert "holds a run already" in complaint("finetune", labelled, "--out", tmp_path / "scratch", "--width", 4, *shared)
    assert "nothing to compare" in complaint("compare", tmp_path / "scratch")
    assert "no schedule 'melted'" in complaint("finetune", labelled, "--out", tmp_path / "none", "--width", 4, "--schedule", "melted", *shared)
    assert "there is no nowhere" in complaint("finetune", labelled, "--out", tmp_path / "none", "--width", 4, "--init", "nowhere", *shared)
    assert not (tmp_path / "none").exists()


def test_how_many_labels_pretraining_saved(run, labelled, tmp_path):
    "The issue's spelling of several ratios, what is refused before anything is read or trained, and a curve that gets another ratio."
    shared = ["finetune", labelled, "--init", run, "--dims", 2, "--size", 64, "--epochs", 1, "--lr", 0.003, "--repeats", 1, "--compare", "scratch"]
    for wrong, sentence in ((["--ratios", 0.01, 1], "finetuning needs 2"), (["--ratios", 0.5, 2], "2 is no share"), (["--ratios", 0.5, "--labelled", 2], "do not go together"),
                            ([], "--compare needs --ratios"), (["--ratios", 0.5, 1, "--init", "scratch"], "both arms start from scratch")):
        assert sentence in complaint(*shared, "--out", tmp_path / "none", *wrong, beside="was pretrained on")
    assert not (tmp_path / "none").exists()
    out = pcrl(*shared, "--out", tmp_path / "curve", "--ratios", 0.5, 1)
    assert "Nothing is claimed from 1 repeat" in out and "report.md" in out
    a, b = (json.loads((tmp_path / "curve" / cell / "config.json").read_text()) for cell in ("scratch-4", "pretrained-4"))
    assert [k for k in a if a[k] != b[k]] == ["init"]
    results = pd.read_csv(tmp_path / "curve" / "results.csv")
    assert set(zip(results.method, results.ratio)) == {("scratch", 0.5), ("pretrained", 0.5), ("scratch", 1), ("pretrained", 1)}
    assert "is there already" in complaint(*shared, "--out", tmp_path / "curve", "--ratios", 0.5, 1, beside="was pretrained on")
    pcrl(*shared, "--out", tmp_path / "curve", "--ratios", 0.25, 0.5, 1, "--resume")
    more = pd.read_csv(tmp_path / "curve" / "results.csv")
    assert len(more) == len(results) * 3 // 2 and len(results.merge(more)) == len(results)  # the rest was not made again
    assert {p.name for p in (tmp_path / "curve").iterdir()} >= {"efficiency.png", "report.md", "split.csv", "scratch-2", "pretrained-2"}


def test_export_to_onnx_and_to_a_hub(run, slices, tmp_path):
    "The printed lines load the file in a process of their own, with the run's features; a hub's folder is finetuned like the run; nothing is replaced."
    lines = pcrl("export", run, "--to", "onnx", "--out", tmp_path / "encoder.onnx")
    compare = f"""
import numpy as np, torch
from pcrl.weights import load_encoder
images = np.random.default_rng(0).random((3, 1, 64, 32), np.float32)
{lines}
with torch.no_grad(): ours = load_encoder({str(run)!r}).encoder.eval()(torch.from_numpy(images))
for a, b in zip(maps, ours, strict=True): assert abs(a - b.numpy()).max() <= 1e-5 * b.abs().max()
"""
    subprocess.run([sys.executable, "-c", compare], check=True)
    pcrl("export", run, "--to", "hub", "--out", tmp_path / "hub", "--license", "cc0-1.0")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "cc0-1.0" in card and "20 images of images" in card and "store's manifest" in card and str(run.parent) not in card
    assert str(run.parent) not in (tmp_path / "hub" / "config.json").read_text()
    pcrl("finetune", slices, "--out", tmp_path / "tuned", "--init", tmp_path / "hub", "--dims", 2, "--crop", "64x64", "--epochs", 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert "exists already" in complaint("export", run, "--to", "hub", "--out", tmp_path / "hub")
    assert "exists already" in complaint("export", run, "--to", "onnx", "--out", tmp_path / "encoder.onnx")
    assert "torchvision has no network" in complaint("export", run, "--to", "torchvision", "--out", tmp_path / "x.pth")
    assert "choose one of torchvision" in complaint("export", run, "--to", "keras", "--out", tmp_path / "x.h5")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_bad_input_gets_one_sentence(run, slices, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("precious")
    out = tmp_path / "out"
    assert "nowhere" in complaint("pretrain", "nowhere", "--out", out)
    assert "has no 3D images" in complaint("pretrain", tmp_path / "empty", "--out", out)
    assert "no recipe 'best'" in complaint("pretrain", slices / "images", "--out", out, "--recipe", "best", *SMALL_2D)
    assert "multiples of 32" in complaint("pretrain", slices / "images", "--out", out, "--dims", 2, "--crop", "40x40", "--size", 64, "--width", 4, "--bs", 4)
    assert "is not 2 sizes" in complaint("pretrain", slices / "images", "--out", out, "--dims", 2, "--crop", "40", "--size", 64)
    assert "width 4, but width 8" in complaint("finetune", slices, "--out", out, "--dims", 2, "--crop", "64x64", "--init", run, "--width", 8, beside="was pretrained on")
    assert "not empty" in complaint("demo", "--out", tmp_path / "mine")
    assert "no run to continue" in complaint("pretrain", slices / "images", "--out", tmp_path / "new", "--resume", *SMALL_2D)
    assert not out.exists() and [p.name for p in (tmp_path / "mine").iterdir()] == ["note.txt"]


def test_a_damaged_file_is_listed_and_left_out(slices, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for p in sorted((slices / "images").iterdir()): (folder / p.name).write_bytes(p.read_bytes())
    (folder / "torn.png").write_bytes(p.read_bytes()[:200])
    pcrl("pretrain", folder, "--out", tmp_path / "run", "--epochs", 1, *SMALL_2D)
    assert pd.read_csv(tmp_path / "run-store" / "skipped.csv").file.str.endswith("torn.png").tolist() == [True]


def test_volumes_of_real_patients(kit, tmp_path):
    "Hippocampus volumes as they lie on disk: pretrained on, then segmented, by two commands."
    for kind, theirs in (("images", "imagesTr"), ("masks", "labelsTr")):
        (tmp_path / "own" / kind).mkdir(parents=True)
        for p in sorted((kit / "hippocampus" / theirs).glob("*.nii.gz"))[:14]: shutil.copy(p, tmp_path / "own" / kind)
    pcrl("pretrain", tmp_path / "own" / "images", "--out", tmp_path / "run", "--epochs", 1, "--crop", "16x16x16", "--width", 4, "--bs", 4, "--lr", 0.05)
    out = pcrl("finetune", tmp_path / "own", "--out", tmp_path / "tuned", "--init", tmp_path / "run", "--epochs", 1, "--crop", "24x24x24", "--lr", 0.003, "--repeats", 1)
    assert "dice class 2" in out


def test_a_file_of_medmnist(tmp_path):
    "Pretrained on as it is, but for its test part, and finetuned on; a run that is resumed keeps its store."
    rng, file, arrays = np.random.default_rng(0), tmp_path / "breastmnist.npz", {}
    for part, n in (("train", 16), ("val", 8), ("test", 16)):
        arrays |= {f"{part}_images": rng.integers(0, 256, (n, 64, 64), np.uint8), f"{part}_labels": np.arange(n)[:, None] % 2}
    np.savez_compressed(file, **arrays)
    options = ["--dims", 2, "--crop", "32x32", "--width", 4, "--bs", 4, "--lr", 0.05]
    pcrl("pretrain", file, "--out", tmp_path / "run", "--epochs", 1, *options)
    pcrl("pretrain", file, "--out", tmp_path / "run", "--epochs", 1, "--resume", *options)
    seen = np.stack([image[0] for image in Store(tmp_path / "run-store")])
    assert sorted(x.tobytes() for x in seen) == sorted(x.tobytes() for part in ("train", "val") for x in arrays[f"{part}_images"])
    told = CliRunner().invoke(app, [*map(str, ("finetune", file, "--out", tmp_path / "tuned", "--init", tmp_path / "run", "--dims", 2, "--epochs", 1, "--repeats", 1))])
    assert told.exit_code == 0 and "auc" in told.stdout and "was pretrained" not in told.stderr + (tmp_path / "tuned" / "report.md").read_text()
    assert "24 images of 24 patients" in pcrl("store", file, tmp_path / "store", "--dims", 2)
    assert {x.shape for x in Store(tmp_path / "store")} == {(1, 64, 64)}
    assert "is 2D: give dims 2" in complaint("pretrain", file, "--out", tmp_path / "none", "--epochs", 1)


def test_reproduce_goes_on_and_makes_a_page(kit, tmp_path):
    "Both tables of one set at the smallest scale: the second finds the runs of the first, and a repeated call makes nothing anew."
    options = ["--out", tmp_path, "--scale", "smoke", "--data", "adrenalmnist3d", "--recipe", "robust", "--method", "contra", "--seeds", 1, "--draws", 1]
    pcrl("reproduce", "table2", *options)
    run = tmp_path / "runs" / "adrenalmnist3d-robust-contra-seed0" / "encoder.safetensors"
    made = run.stat().st_mtime
    pcrl("reproduce", "table1", *options)
    first = pd.read_csv(tmp_path / "ablations.csv")
    out = pcrl("reproduce", "table2", *options)
    assert run.stat().st_mtime == made and first.equals(pd.read_csv(tmp_path / "ablations.csv"))
    assert set(first[first.metric == "auc"].method) == {"pixels", "random weights", "scratch", "contra"} and "rotation accuracy" in set(first.metric)
    page = (tmp_path / "ablations.html").read_text()
    assert "ablations.html" in out and "Frozen encoders" in page and "Few labels" in page and "http" not in page


def test_demo_of_two_seeds_writes_all_it_promises(tmp_path):
    "The processes, the table and the page; with a story much shorter than the command's own."
    script = f"""
from dataclasses import replace
from pcrl.demo import STORIES, demo
tiny = replace(STORIES["brain", 2], crop=(32, 32), width=4, epochs=1, pairs_per_image=1, labelled=2, tune_epochs=1, tune_crop=(32, 32), tune_crops=8)
if __name__ == "__main__": demo("brain", 2, {str(tmp_path / 'demo')!r}, seeds=2, story=tiny)
"""
    (tmp_path / "run.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "run.py"], check=True, capture_output=True)
    results = pd.read_csv(tmp_path / "demo" / "results.csv")
    assert results.columns.tolist() == ["data", "arm", "seed", "metric", "value"]
    assert set(results.arm) == {"scratch", "pcrl"} and set(results.seed) == {0, 1}
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "Seed 1" in page and "http" not in page
    assert {p.name for p in (tmp_path / "demo" / "runs").iterdir()} == {f"{arm}-seed{s}" for arm in ("pretrain", "scratch", "pcrl") for s in (0, 1)}


def test_demo_that_fails_leaves_nothing_behind(tmp_path):
    script = f"""
from dataclasses import replace
from pcrl.demo import STORIES, demo
diverging = replace(STORIES["brain", 2], crop=(32, 32), width=4, epochs=1, pairs_per_image=1, tune_lr=1e30)
if __name__ == "__main__": demo("brain", 2, {str(tmp_path / 'demo')!r}, seeds=1, story=diverging)
"""
    (tmp_path / "run.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "run.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "lower the learning rate" in done.stderr
    assert not (tmp_path / "demo").exists() or not list((tmp_path / "demo").iterdir())
