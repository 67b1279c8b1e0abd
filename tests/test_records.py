"Files that a run writes: what was written is read, what was altered is told, what could carry code is refused, everywhere in the package."
import ast, json, math, os, pickle, tempfile, warnings
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from pcrl.cli import app
from pcrl.records import TornError, read_record, read_tensors, write_record, write_tensors

root = Path(__file__).resolve().parent.parent
numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(numbers, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12)
records = st.dictionaries(st.text().filter(lambda name: name not in ("schema", "sha256")), values, max_size=5)


@pytest.fixture(scope="module")
def path():
    with tempfile.TemporaryDirectory() as folder: yield Path(folder) / "file"


@settings(max_examples=60, deadline=None)
@given(record=records)
def test_a_record_is_read_as_it_was_written(path, record):
    write_record(path, record, schema=7)
    read = read_record(path, schema=7)
    assert read == dict(schema=7, **record) and json.dumps(read, sort_keys=True) == json.dumps(dict(schema=7, **record), sort_keys=True)


@settings(max_examples=150, deadline=None)
@given(record=records, at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_bit_that_flips_in_a_record_changes_nothing_unnoticed(path, record, at, bit):
    write_record(path, record, schema=7)
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try: assert read_record(path, schema=7) == dict(schema=7, **record)  # in a blank between two names, say
    except TornError: pass


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=4), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
       cut=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 2**31))
def test_tensors_are_read_as_they_were_written_or_not_at_all(path, shape, dtype, cut, seed):
    tensor = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, shape)).to(dtype)
    write_tensors(path, dict(a=tensor))
    read = read_tensors(path)["a"]
    assert read.dtype == dtype and read.shape == tensor.shape and torch.equal(read, tensor)
    content = path.read_bytes()
    path.write_bytes(content[:int(cut * len(content))])
    with pytest.raises(ValueError, match="is torn"): read_tensors(path)


class Bite:
    "A pickle of it makes a folder when it is opened."
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_by_name_whatever_it_is_called(tmp_path, protocol):
    bitten, path = tmp_path / "bitten", tmp_path / "encoder.safetensors"
    path.write_bytes(pickle.dumps(Bite(bitten), protocol))
    with pytest.raises(ValueError, match="encoder.safetensors is a pickle, which can carry code"): read_tensors(path)
    assert not bitten.exists()


def test_weights_that_are_a_pickle_are_refused_by_the_command(tmp_path):
    "In the place of a run's encoder, and as a file given to --init; nothing of them is run."
    bitten = tmp_path / "bitten"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(dict(dims=2, in_channels=1, width=4)))
    torch.save(dict(weight=torch.zeros(2), bite=Bite(bitten)), run / "encoder.safetensors")
    (tmp_path / "model.pth").write_bytes((run / "encoder.safetensors").read_bytes())
    data = tmp_path / "data"
    for kind in ("images", "masks"): (data / kind).mkdir(parents=True)
    from PIL import Image
    for i in range(10):
        square = np.zeros((32, 32), np.uint8); square[8:20, 8:20] = 1
        Image.fromarray(square * (200 + i)).save(data / "images" / f"{i}.png"); Image.fromarray(square).save(data / "masks" / f"{i}.png")
    for init, said in ((run, "encoder.safetensors is a pickle, which can carry code"), (tmp_path / "model.pth", "model.pth")):
        done = CliRunner().invoke(app, ["finetune", str(data), "--out", str(tmp_path / "out"), "--dims", "2", "--crop", "32x32", "--size", "32", "--init", str(init), "--width", "4"])
        assert done.exit_code == 1 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not bitten.exists() and not (tmp_path / "out").exists()


def test_nothing_of_the_package_opens_a_pickle():
    """No import of a module that unpickles, no call that would: torch.load only with weights_only=True, np.load never with allow_pickle.

    A worker alone unpickles, what the process that started it sends; what it answers is JSON."""
    found, workers = [], (root / "pcrl" / "workers.py").read_text(encoding="utf-8")
    assert workers.count("pickle.load") == workers.count("pickle.load(requests)") == 2
    for path in [*sorted((root / "pcrl").glob("*.py")), *sorted((root / "tools").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if {n.split(".")[0] for n in names} & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} or "load_learner" in names:
                if path.name != "workers.py": found.append((path.name, node.lineno, names))
            if not isinstance(node, ast.Call): continue
            call, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if call == "torch.load" and given.get("weights_only") != "True": found.append((path.name, node.lineno, call))
            if given.get("allow_pickle", "False") != "False" or call.endswith(("load_learner", "read_pickle")): found.append((path.name, node.lineno, call))
    assert not found, found
