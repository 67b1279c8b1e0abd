"Whole images by sliding window against MONAI's, for shapes, windows and overlaps that nobody chose."
import numpy as np, torch
from hypothesis import given, settings, strategies as st
from monai.inferers import sliding_window_inference
from torch import nn

from pcrl.sliding import predict_mask, sliding_slabs
from pcrl.transforms import to_unit

torch.manual_seed(0)
NETS = {(dims, c): (nn.Conv2d, nn.Conv3d)[dims - 2](c, 3, 5, padding=2).eval() for dims in (2, 3) for c in (1, 2)}  # what it says depends on the window's border


@st.composite
def jobs(draw):
    "A network, an image and a window, of sides from 1 voxel, some smaller than the window."
    dims, channels = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    sides = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))
    image = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (channels, *sides(1, 21)), np.uint8)
    return NETS[dims, channels], image, sides(4, 12), draw(st.sampled_from([0.0, 0.25, 0.5, 0.8])), draw(st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_slabs_put_together_are_monais_logits(job):
    model, image, size, overlap, bs = job
    slabs = list(sliding_slabs(*job))
    with torch.no_grad(): theirs = sliding_window_inference(to_unit(torch.from_numpy(image))[None], size, bs, model, overlap=overlap, mode="gaussian")[0]
    assert all(slab.shape[1] <= size[0] for slab in slabs)
    torch.testing.assert_close(torch.cat(slabs, 1), theirs, atol=1e-5, rtol=0)
    close_call = theirs.topk(2, 0).values.diff(dim=0)[0].abs() < 1e-4
    assert ((torch.from_numpy(predict_mask(*job)) == theirs.argmax(0)) | close_call).all()
