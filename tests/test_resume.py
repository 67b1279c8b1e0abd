"A run that is killed, stopped, cut off from its disk or given a torn checkpoint ends as the one that nothing happened to, to the bit."
import ctypes, os, random, resource, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.core import Callback

from kill_resume import ARMS, Arm, differences, end, killed_run, make_data, start, whole_run
from pcrl.cases import Cases
from pcrl.checkpoints import RunStopped, StopOnSignal, find_checkpoints, read_checkpoint
from pcrl.cli import stoppable
from pcrl.repeats import finetune_repeats
from pcrl.runs import RunFolder

PRETRAIN, SEGMENT = Arm(2, "pretrain", "pcrl/robust"), Arm(2, "segment", "")


@pytest.fixture(scope="module")
def folder():
    "With the data of all runs."
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        make_data(Path(name) / "data")
        yield Path(name)


@pytest.fixture(scope="module")
def wholes(folder):
    "Runs that are never stopped, each made once: the run and its seconds."
    made = {}
    def whole(arm):
        if arm not in made: made[arm] = whole_run(arm, folder / "data", folder)
        return made[arm]
    return whole


def wait_for(what, pid):
    "Until something holds; the process must not end before, and not hang."
    begin = time.monotonic()
    while not what():
        assert not os.waitpid(pid, os.WNOHANG)[0], "the process has ended"
        if time.monotonic() - begin > 120: os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def begun(arm, folder, name, before=lambda: None):
    "A run in a process of its own that has written its first checkpoint: its folder, what it said, its number."
    run = folder / name
    said = folder / f"{run.name}.txt"
    pid = start(arm.command(folder / "data", run), said, before)
    wait_for(lambda: run.exists() and find_checkpoints(run / "resume"), pid)
    return run, said, pid


def go_on(arm, folder, run):
    "Let it end; what it said."
    said = run.with_name(f"{run.name}-on.txt")
    assert end(start([*arm.command(folder / "data", run), "--resume"], said)) == 0, said.read_text()
    return said.read_text()


@pytest.mark.parametrize("arm", [PRETRAIN, Arm(3, "pretrain", "pcrl/paper"), Arm(2, "pretrain", "pcrl/official"), SEGMENT, Arm(3, "classify", "")], ids=str)
def test_killed_at_a_random_moment(arm, folder, wholes):
    rows = killed_run(arm, folder / "data", *wholes(arm), random.Random(f"{arm}"))
    assert [row["equal"] for row in rows] == [True], rows


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_killed_again_and_again(arm, folder, wholes):
    rows = killed_run(arm, folder / "data", *wholes(arm), random.Random(f"{arm} again"), kills=5)
    assert [row["equal"] for row in rows] == [True] * 5, rows


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_asks_to_be_resumed(number, folder, wholes):
    arm = PRETRAIN if number == signal.SIGTERM else SEGMENT
    run, said, pid = begun(arm, folder, number.name)
    os.kill(pid, number)
    assert end(pid) == 75, said.read_text()
    assert f"stopped by {number.name} in epoch" in said.read_text() and "all is saved: continue with --resume" in said.read_text()
    read_checkpoint(run / "resume")
    go_on(arm, folder, run)
    assert differences(wholes(arm)[0], run) == []


def test_two_processes_in_one_folder(folder, wholes):
    "The second is refused while the first lives, stopped or not; a kill gives the folder free."
    run, _, pid = begun(PRETRAIN, folder, "shared")
    os.kill(pid, signal.SIGSTOP)
    for more in ([], ["--resume"]):
        said = folder / f"second{len(more)}.txt"
        assert end(start([*PRETRAIN.command(folder / "data", run), *more], said)) == 1
        last = said.read_text().strip().splitlines()[-1]
        assert last.startswith("pcrl: ") and f"is being written to by process {pid} on" in last
    os.kill(pid, signal.SIGKILL)
    assert end(pid) == -signal.SIGKILL
    go_on(PRETRAIN, folder, run)
    assert differences(wholes(PRETRAIN)[0], run) == []


@pytest.mark.parametrize("torn", ["tensors", "record", "both gone"])
def test_a_torn_checkpoint_is_told_and_the_one_before_is_taken(torn, folder, wholes):
    whole, _ = wholes(PRETRAIN)
    run = folder / f"torn {torn}"
    shutil.copytree(whole, run)
    newest = find_checkpoints(run / "resume")[0]
    for path in (newest, newest.with_suffix(".safetensors")):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        if torn == "both gone" or (path is newest) == (torn == "record"): path.write_bytes(b"" if torn == "both gone" else content)
    said = go_on(PRETRAIN, folder, run)
    assert "is torn, or was altered" in said and newest.stem in said
    assert differences(whole, run) == []


def obey_modes():
    "Give up root's right to write where nobody may (CAP_DAC_OVERRIDE, the second bit of what counts and of what can be had)."
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for i in (0, 1): sets[i] &= ~2
    assert libc.capset(header, sets) == 0


def one_fault(fault, folder, wholes, hurt, heal):
    "Hurt the folder of a run that goes on, heal it once the run has said so; it ends equal, and its checkpoint was whole all the while."
    def before():
        RunFolder.pause = 0.01
        obey_modes()
    run, said, pid = begun(PRETRAIN, folder, fault, before)
    hurt(run, pid)
    wait_for(lambda: "cannot be written to" in said.read_text(), pid)
    read_checkpoint(run / "resume")
    heal(run, pid)
    assert end(pid) == 0, said.read_text()
    assert "training goes on" in said.read_text() and "can be written to again" in said.read_text()
    assert differences(wholes(PRETRAIN)[0], run) == []


def test_no_room_for_a_file(folder, wholes):
    "The system refuses every file above 100 kB, as a full disk or a quota does, and then no more."
    limit = lambda size: lambda run, pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    one_fault("no room", folder, wholes, limit(100_000), limit(resource.RLIM_INFINITY))


def test_a_folder_is_made_read_only(folder, wholes):
    def change(mode):
        def set_modes(run, pid):
            for path in (run, run / "resume"): path.chmod(mode)
        return set_modes
    one_fault("read-only", folder, wholes, change(0o555), change(0o755))


@pytest.mark.slow
def test_a_disk_that_is_full(folder, wholes):
    "A disk of 8 MB and a file that fills it; needs the right to mount."
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode: pytest.skip("no right to mount a disk")
    def fill(run, pid):
        with open(disk / "ballast", "wb", buffering=0) as f:
            try:
                while f.write(bytes(4096)): pass
            except OSError: pass
    try: one_fault("disk/run", folder, wholes, fill, lambda run, pid: (disk / "ballast").unlink())
    finally: subprocess.run(["umount", "-l", disk])


def test_many_readers_of_one_store(folder):
    "Three processes read the same crops at once, while two trainings use the store."
    read = f"""
import hashlib
from pcrl.crops import CropPairs
from pcrl.store import Store
pairs = CropPairs(Store({str(folder / 'data' / 'store-2d')!r}), 32)
print(hashlib.sha256(b"".join(pairs[e, i].tobytes() for e in range(5) for i in range(len(pairs)))).hexdigest())
"""
    trainings = [start(PRETRAIN.command(folder / "data", folder / f"reader{i}"), folder / f"reader{i}.txt") for i in range(2)]
    readers = [subprocess.Popen([sys.executable, "-c", read], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({reader.communicate()[0] for reader in readers}) == 1 and all(reader.returncode == 0 for reader in readers)
    assert [end(pid) for pid in trainings] == [0, 0]
    assert differences(folder / "reader0", folder / "reader1") == []


class SignalAtTheEnd(Callback):
    "Between the last step of a run and the end of its fit."
    order = 66
    def after_validate(self):
        if self.epoch + 1 == self.n_epoch: os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_after_the_last_step_ends_what_comes_next(tmp_path):
    images = [np.full((1, 32, 32), 90 + 40 * (i % 2), np.uint8) for i in range(12)]
    cases = Cases("bright", 2, "classify", images, np.float32([[0], [1]] * 6), ["bright"], [*map(str, range(12))], ["train"] * 6 + ["valid"] * 2 + ["test"] * 4)
    def repeats(**how): return finetune_repeats(cases, tmp_path / "out", repeats=2, width=4, epochs=2, bar=False, **how)
    with pytest.raises(RunStopped), stoppable(): repeats(cbs=[StopOnSignal(), SignalAtTheEnd()])
    assert (tmp_path / "out" / "seed0" / "card.md").exists() and not (tmp_path / "out" / "seed1").exists()
    assert repeats(resume=True).seed.unique().tolist() == [0, 1]
