"Files of weights as strangers may send them: nothing in them runs, what is no file of tensors gets a sentence, and names are found whatever stands before them."
import os, pickle
from argparse import Namespace

import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st

from pcrl.unet import UNet
from pcrl.weights import load_encoder, match_names, read_state_dict, to_channels

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
own = UNet(3, width=4).encoder.state_dict()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A checkpoint in the old format of torch, all of it one pickle, and the new one, a zip."
    folder, content = tmp_path_factory.mktemp("checkpoint"), dict(opt=Namespace(lr=.1), state_dict={k: v for k, v in own.items() if v.ndim < 2})
    for new in (False, True): torch.save(content, folder / f"{new}.pth", _use_new_zipfile_serialization=new)
    return {new: (folder / f"{new}.pth").read_bytes() for new in (False, True)}


@quick
@given(st.data())
def test_damaged_files_get_a_sentence(checkpoint, tmp_path, data):
    "Some bytes of a checkpoint changed, or cut off: tensors by name, or one sentence."
    damaged = bytearray(checkpoint[data.draw(st.booleans())])
    for _ in range(data.draw(st.integers(1, 8))): damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.pth").write_bytes(damaged[:data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged)
    try: found = read_state_dict(tmp_path / "x.pth")
    except ValueError as e: assert str(tmp_path / "x.pth") in str(e) and "\n" not in str(e)
    else: assert found and all(map(torch.is_tensor, found.values()))


@quick
@given(st.binary(max_size=200))
def test_any_bytes_get_a_sentence(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError): read_state_dict(tmp_path / "x.bin")


class Call:
    "Pickled, it asks for `function(*args)`."
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


@pytest.mark.parametrize("call", [
    lambda mark: Call(os.system, f"touch {mark}"), lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"), lambda mark: Call(exec, f"open({str(mark)!r}, 'w')"),
    lambda mark: Call(os.mkdir, str(mark)), lambda mark: Call(getattr, Call(__import__, "os"), "mkdir"), lambda mark: Call(Namespace, Call(os.mkdir, str(mark)))])
@pytest.mark.parametrize("new", [False, True])
def test_code_is_refused_and_not_run(tmp_path, call, new):
    mark = tmp_path / "mark"
    torch.save(dict(state_dict=own, opt=call(mark)), tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match="carries code"): read_state_dict(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="carries code"): load_encoder(tmp_path / "x.pth", UNet(3, width=4).encoder)
    (tmp_path / "y.pth").write_bytes(pickle.dumps(dict(own, opt=call(mark))))             # not even torch's own wrapping
    with pytest.raises(ValueError): read_state_dict(tmp_path / "y.pth")
    assert not mark.exists()


@quick
@given(st.lists(st.sampled_from(["module", "model", "encoder", "encoder_q", "backbone", "net", "0", "layer1", "levels"]), max_size=4), st.randoms())
def test_names_are_found_behind_any_prefix_in_any_order(parts, random):
    prefix = "".join(f"{p}." for p in parts)
    names = [prefix + k for k in own] + [f"{prefix}head.weight", "step"]
    random.shuffle(names)
    assert match_names(names, own) == {k: prefix + k for k in own}


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_a_repeated_grey_image_gives_the_same(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    kernel, grey = torch.randn(5, n, 3, 3, 3, generator=generator), torch.rand(1, 1, 6, 6, 6, generator=generator)
    before, after = (torch.conv3d(grey.expand(-1, k.shape[1], -1, -1, -1), k) for k in (kernel, to_channels(kernel, m)))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
