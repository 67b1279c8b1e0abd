"The store on real files: killed at any point and built again, with readers that die, with hostile names and settings."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import nibabel, numpy as np, pandas as pd, pytest

from pcrl.check import verify_store
from pcrl.store import Store, build_store
from pcrl.workers import children

LUNG = dict(dims=3, spacing=(2., 1., 1.), window=(-1000., 1000.))


def command(src, dst, *args): return [Path(sys.executable).with_name("pcrl"), "store", src, dst, "--spacing", "2", "1", "1", "--window", "-1000", "1000", *args]


def until(ready):
    "Wait for something that another process does."
    while not ready(): time.sleep(0.01)


def lines(dst):
    "Rows in the journal; -1 where there is none."
    try: return (dst / "building.jsonl").read_text().count("\n{")
    except FileNotFoundError: return -1


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    "Thirty volumes, two of them broken."
    folder, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    for k in range(28):
        hu = rng.integers(-1000, 1000, (40, 40, 20 + k)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(hu, np.diag([1, 1, 1 + k % 3, 1])), folder / f"case{k:02}.nii.gz")
    (folder / "broken.nii.gz").write_bytes((folder / "case00.nii.gz").read_bytes()[:5000])
    (folder / "empty.nii.gz").touch()
    return folder


@pytest.fixture(scope="module")
def whole(scans, tmp_path_factory):
    "The store of a build that nothing disturbed, by the command."
    dst = tmp_path_factory.mktemp("whole") / "store"
    assert subprocess.run(command(scans, dst), capture_output=True).returncode == 3
    return dst


def same(a, b):
    "Two stores of the same bytes."
    names = ("manifest.csv", "skipped.csv", "store.json")
    assert [(a / n).read_bytes() for n in names] == [(b / n).read_bytes() for n in names]
    files = Store(a).manifest.file
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    assert {p.name for p in a.iterdir()} == {*names, "images"} and {f"images/{p.name}" for p in (a / "images").iterdir()} == set(files)


def test_a_build_skips_what_is_broken_and_says_so(scans, whole):
    store = Store(whole)
    assert len(store) == 28 and [Path(f).name for f in store.skipped.file] == ["broken.nii.gz", "empty.nii.gz"]
    assert all(name in reason for name, reason in zip(store.skipped.file, store.skipped.reason))
    assert len(verify_store(whole)) == 0


@pytest.mark.parametrize("group", [True, False], ids=["all", "parent"])
def test_killed_again_and_again_it_goes_on_where_it_stopped(scans, whole, tmp_path, group):
    "SIGKILL, to everybody or to the parent alone, whose readers then finish what they have in hand."
    dst, kept = tmp_path / "store", {}
    for rows in (-1, 3, 15):
        build = subprocess.Popen(command(scans, dst), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        until(lambda: lines(dst) >= rows or build.poll() is not None)
        os.killpg(build.pid, signal.SIGKILL) if group else build.kill()
        assert build.wait() == -signal.SIGKILL
        with pytest.raises(FileNotFoundError): Store(dst)
        done = [json.loads(line) for line in (dst / "building.jsonl").read_text().splitlines()[:-1] if line] if lines(dst) > 0 else []
        for row in done: kept.setdefault(row["file"], (dst / row["file"]).stat().st_mtime_ns)
    assert len(kept) >= 14
    assert subprocess.run(command(scans, dst), capture_output=True).returncode == 3
    assert {f: (dst / f).stat().st_mtime_ns for f in kept} == kept
    same(dst, whole)


def test_killed_while_it_grows_the_old_store_stays(scans, whole, tmp_path):
    "A store that is finished can be read while more is put in, and after that was killed."
    dst = tmp_path / "store"
    build_store(sorted(scans.glob("case0*.nii.gz")), dst, **LUNG)
    before = Store(dst).manifest
    build = subprocess.Popen(command(scans, dst), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until(lambda: lines(dst) >= 12)
    assert Store(dst).manifest.equals(before)
    os.killpg(build.pid, signal.SIGKILL)
    build.wait()
    assert Store(dst).manifest.equals(before) and len(verify_store(dst)) == 0
    assert subprocess.run(command(scans, dst), capture_output=True).returncode == 3
    assert sorted(Store(dst).manifest.volume) == sorted(Store(whole).manifest.volume)


def test_a_journal_cut_anywhere_costs_its_last_line(scans, whole, tmp_path):
    "Whatever is left of the last line, the build ends with the same store."
    dst, files = tmp_path / "store", sorted(scans.glob("case0[0-3].nii.gz"))
    build_store(files, dst, **LUNG)
    manifest = (dst / "manifest.csv").read_bytes()
    row = json.dumps(Store(dst).manifest.iloc[0].to_dict())
    for cut in (1, len(row) - 1, len(row)):
        (dst / "manifest.csv").unlink(missing_ok=True)
        (dst / "building.jsonl").write_text("\n" + row[:cut])
        build_store(files, dst, **LUNG)
        assert (dst / "manifest.csv").read_bytes() == manifest


def test_a_reader_that_dies_costs_the_file_in_hand(scans, tmp_path):
    "A pipe in the place of a file, on which the reader waits until it is killed: the others are read."
    os.mkfifo(tmp_path / "deadly.nii.gz")
    files = [*sorted(scans.glob("case0[0-4].nii.gz")), tmp_path / "deadly.nii.gz", *sorted(scans.glob("case1[0-4].nii.gz"))]
    before = children()

    def kill(done, of):
        if done == 5: os.kill(*children() - before, signal.SIGKILL)  # the pipe is in hand, or next
    store = build_store(files, tmp_path / "store", **LUNG, processes=1, progress=kill)
    assert len(store) == 10 and [Path(f).name for f in store.skipped.file] == ["deadly.nii.gz"]
    assert "ended the process that worked on it" in store.skipped.reason[0]


def test_exit_codes(scans, whole, tmp_path):
    "0: all read, 3: some skipped, 1: none."
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder, names in ((good, ["case00.nii.gz"]), (bad, ["broken.nii.gz", "empty.nii.gz"])):
        folder.mkdir()
        for name in names: (folder / name).write_bytes((scans / name).read_bytes())
    run = lambda src: subprocess.run(command(src, tmp_path / f"{src.name}-store"), capture_output=True, text=True)
    assert run(good).returncode == 0
    done = run(bad)
    assert done.returncode == 1 and "none of 2 files could be read" in done.stderr
    assert len(pd.read_csv(tmp_path / "bad-store" / "skipped.csv")) == 2


def test_verify_by_the_command(whole, tmp_path):
    run = lambda: subprocess.run([Path(sys.executable).with_name("pcrl"), "store", whole, "--verify"], capture_output=True, text=True)
    assert run().returncode == 0
    file = whole / Store(whole).manifest.file[3]
    bytes_ = file.read_bytes()
    try:
        file.write_bytes(bytes_[:-1])
        done = run()
        assert done.returncode == 1 and "1 files of" in done.stderr and file.name in done.stdout
    finally: file.write_bytes(bytes_)
