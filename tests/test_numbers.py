"Numbers stay sane: what must be float32 is, nothing turns NaN on images without content, and a run stops before a bad step."
import json, math

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastcore.basics import AttrDict
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pcrl.contrast import Projector, logit_stats, nce_loss
from pcrl.crops import crop_loaders
from pcrl.model import PCRL
from pcrl.pretrain import pretrain_learner
from pcrl.guards import check_bfloat16, gradient_norm
from pcrl.transforms import apply_transforms, blur, sample_transforms

SMALLEST = {2: (32, 32), 3: (8, 8, 8)}
SOUND_IN_BF16 = {2: (32, 32), 3: (24, 16, 16)}  # no map 2 voxels deep: see `check_bfloat16`
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def extreme(kind, size, n=2, device="cpu"):
    "Crop pairs, (n, 2, 1, ...), with nothing in them or next to nothing."
    crops = torch.zeros(n, 2, 1, *size, device=device)
    if kind == "one": crops += 1
    if kind == "voxel": crops[(..., *[s // 2 for s in size])] = 1
    if kind == "noise": crops.uniform_()
    return crops


def train(dims, size, steps, kinds, dtype=torch.float32, device="cpu", lr=1e-2):
    """Steps of PCRL at batch 2, the kinds of images in turn; every loss, gradient, figure, weight, statistic and key must be finite; in float16 a scaler skips the step of a gradient that is not.

    Steps are cut to a length of 1: where nothing varies, each BatchNorm makes gradients up to 300 times as long (1/sqrt(eps)), and whether weights survive a step of length 1e9 is chance."""
    torch.manual_seed(0)
    model = PCRL(dims, width=4, queue_size=12, projection=16).to(device)
    optimizer, generator = torch.optim.SGD(model.parameters(), lr, momentum=.9), torch.Generator(device).manual_seed(0)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16, init_scale=2.**12)
    for i in range(steps):
        views = model.views(extreme(kinds[i % len(kinds)], size, device=device), generator)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            outputs = model(views)
            terms, figures = model.loss(outputs, views), model.monitors(outputs, views)
        optimizer.zero_grad()
        scaler.scale(terms.loss).backward()
        scaler.unscale_(optimizer)
        for name, v in {**terms, "norm": gradient_norm(model)}.items(): assert v.isfinite() or (name == "norm" and scaler.is_enabled()), (name, i, v)
        for name, v in figures.items(): assert v.isfinite() or len(model.queue.keys) == 0, (name, i, v)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer); scaler.update()
        model.finish_step(outputs)
    for name, v in model.state_dict().items(): assert v.isfinite().all(), name


# --- precision ------------------------------------------------------------------------------------------------------------

class Dtypes(TorchDispatchMode):
    "The operations that ran and the types of what they gave."
    def __init__(self): super().__init__(); self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and out.is_floating_point(): self.seen.setdefault(func._schema.name.split("::")[1], set()).add(out.dtype)
        return out


def half(device): return torch.autocast(device, torch.bfloat16)


def test_logits_and_softmax_are_float32_under_autocast():
    q, k, queue = (nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (4, 4, 32))
    for given in (torch.float32, torch.bfloat16):
        with half("cpu"), Dtypes() as dtypes: loss = nce_loss(q.to(given), k.to(given), queue.to(given))
        assert loss.dtype == torch.float32
        for name in ("mm", "logsumexp", "mean"): assert dtypes.seen[name] == {torch.float32}, name
    torch.testing.assert_close(loss, nce_loss(q.bfloat16(), k.bfloat16(), queue.bfloat16()))


def test_norm_is_float32_under_autocast():
    torch.manual_seed(0)
    projector, features = Projector(32, 16), torch.randn(8, 32, 4, 4)
    with half("cpu"), Dtypes() as dtypes: g = projector(features)
    assert torch.bfloat16 in set.union(*dtypes.seen.values())             # its layers did run in bfloat16
    assert g.dtype == torch.float32 and dtypes.seen["linalg_vector_norm"] == {torch.float32}
    torch.testing.assert_close(g.norm(dim=1), torch.ones(8), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_losses_are_float32_under_autocast(dims):
    torch.manual_seed(0)
    model = PCRL(dims, width=4, queue_size=12, projection=16)
    views = model.views(extreme("noise", SOUND_IN_BF16[dims]), torch.Generator().manual_seed(0))
    with half("cpu"):
        outputs = model(views)
        model.finish_step(outputs)
        with Dtypes() as dtypes: terms = model.loss(outputs, views)
    assert (outputs.features.dtype, outputs.reconstructions.dtype) == (torch.bfloat16, torch.float32)
    assert all(v.dtype == torch.float32 for v in terms.values())
    assert set.union(*dtypes.seen.values()) == {torch.float32}
    assert model.queue.rows.dtype == torch.float32 and all(outputs[g].dtype == torch.float32 for g in ("g_o", "g_m", "g_h"))


def test_cosines_of_the_log_are_float32_under_autocast():
    q, k, queue = (nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (4, 4, 32))
    with half("cpu"): figures = logit_stats(q, k, queue)
    for name, v in logit_stats(q, k, queue).items(): assert figures[name].dtype == torch.float32 and (figures[name] == v), name


def test_transforms_are_exact_under_autocast():
    x, vec = torch.rand(8, 1, 320, 320), sample_transforms(8, 2, torch.Generator().manual_seed(0))
    sigma = torch.linspace(0, 2, 8)
    with half("cpu"): turned, blurred = apply_transforms(x, vec), blur(x, sigma)
    assert (turned == apply_transforms(x, vec)).all() and (blurred == blur(x, sigma)).all()


def test_bfloat16_is_refused_where_a_cpu_computes_it_wrongly():
    volumes = {depth: torch.zeros(1, 1, depth, 8, 8) for depth in (8, 16, 24, 32)}
    for depth in volumes: check_bfloat16((volumes[depth],))
    with half("cpu"):
        for depth in (24, 32): check_bfloat16((volumes[depth],))
        check_bfloat16((torch.zeros(1, 1, 16, 16),))                       # 2D is sound
        for depth in (8, 16):
            with pytest.raises(ValueError, match=f"crops of {depth} slices"): check_bfloat16((dict(corrupt_o=volumes[depth]),))


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_gradients_in_bfloat16_are_right_at_other_depths(depth):
    torch.manual_seed(0)
    conv, maps, out_grad = nn.Conv3d(32, 32, 3, padding=1), torch.randn(2, 32, depth, 2, 2), torch.randn(2, 32, depth, 2, 2)
    right, = torch.autograd.grad(conv(maps), conv.weight, out_grad)
    with half("cpu"): out = conv(maps)
    ours, = torch.autograd.grad(out, conv.weight, out_grad.bfloat16())
    assert (ours - right).norm() < .02 * right.norm()


# --- images without content -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dims", [2, 3])
def test_many_steps_stay_finite(dims):
    train(dims, SMALLEST[dims], 500, ["noise", "air", "one", "voxel"])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["air", "one", "voxel"])
def test_bfloat16_stays_finite_on_empty_images(dims, kind):
    train(dims, SOUND_IN_BF16[dims], {2: 40, 3: 10}[dims], [kind], torch.bfloat16)


@pytest.mark.parametrize("dims", [2, 3])
def test_float16_stays_finite(dims): train(dims, SOUND_IN_BF16[dims], 4, ["noise", "air", "one", "voxel"], torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["noise", "air", "one", "voxel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_steps_stay_finite(dims, kind, dtype):
    train(dims, SMALLEST[dims] if dtype == torch.float32 else SOUND_IN_BF16[dims], 1000, [kind], dtype)


def learn_from(dims, kind, recipe, steps):
    "A pretraining as users run it, at batch 2, on such images alone; FiniteGuard ends it at the first loss or gradient that is not finite."
    same = [crops[0].numpy() for crops in extreme(kind, SMALLEST[dims])]
    dls = crop_loaders(same, same, SMALLEST[dims], bs=2, pairs_per_image=steps, scales=(1.,) * (4 - dims), min_iou=0., device="cpu")
    learn = pretrain_learner(dls, dims, recipe=recipe, width=4, projection=16, queue_size=12)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.train_iter == steps
    for name, v in learn.model.state_dict().items(): assert v.isfinite().all(), name


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["air", "one", "voxel"])
def test_robust_learns_from_empty_images(dims, kind): learn_from(dims, kind, "robust", 60)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["air", "one", "voxel"])
@pytest.mark.parametrize("recipe", ["paper", "robust"])
def test_a_thousand_steps_of_a_pretraining_stay_finite(dims, kind, recipe): learn_from(dims, kind, recipe, 1000)


@gpu
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["noise", "air", "one", "voxel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_on_a_gpu(dims, kind, dtype):
    train(dims, SMALLEST[dims], 200, [kind], dtype, "cuda")


# --- a run that goes wrong ------------------------------------------------------------------------------------------------

class Before(Callback):
    "Remember the weights as they were when the batch began."
    def before_batch(self): self.weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}


def stopped(dims, run, images, **settings):
    "The complaint with which a pretraining stops, and its learner."
    dls = crop_loaders(images, images[:2], SMALLEST[dims], bs=2, pairs_per_image=2, min_iou=0., device="cpu")
    learn = pretrain_learner(dls, dims, width=4, run=run, seed=5, **settings).add_cb(Before())
    with pytest.raises(FloatingPointError) as complaint, learn.no_bar(), learn.no_logging(): learn.fit(3)
    for name, p in learn.model.named_parameters(): assert torch.equal(p, learn.before.weights[name]) and p.isfinite().all(), name
    return str(complaint.value), learn


def images(dims): return list(np.random.default_rng(0).random((6, 1, *[2 * s for s in SMALLEST[dims]]), dtype=np.float32))


def kept(run, learn):
    "The batch that a stopped run kept, and where it was in the run."
    tensors, place = sorted((run / "failed").iterdir(), key=lambda p: p.suffix, reverse=True)
    assert tensors.stem == place.stem == f"train-epoch-{learn.epoch}-batch-{learn.iter}"
    place = json.loads(place.read_text())
    assert (place["epoch"], place["iter"], place["seed"]) == (learn.epoch, learn.iter, 5)
    return {name.removeprefix("x0."): v for name, v in load_file(tensors).items()}


@pytest.mark.parametrize("dims", [2, 3])
def test_a_nan_voxel_stops_the_run(dims, tmp_path):
    spoilt = images(dims)
    for image in spoilt[3:]: image[:] = math.nan
    complaint, learn = stopped(dims, tmp_path / "run", spoilt)
    assert "repair the images" in complaint and "clean_o" in complaint and str(tmp_path) in complaint
    views = AttrDict(kept(tmp_path / "run", learn))
    fresh = PCRL(dims, learn.model.recipe, width=4)
    assert fresh.loss(fresh(views), views).loss.isnan()
    views = AttrDict({name: v.nan_to_num(.5) for name, v in views.items()})
    assert fresh.loss(fresh(views), views).loss.isfinite()


@pytest.mark.parametrize("dims", [2, 3])
def test_a_huge_learning_rate_stops_the_run(dims, tmp_path):
    complaint, learn = stopped(dims, tmp_path / "run", images(dims), lr=1e12, recipe="literal")     # where no norm bounds the gates
    assert "lower the learning rate (now" in complaint and not list((tmp_path / "run").glob("*.safetensors"))
    views = AttrDict(kept(tmp_path / "run", learn))
    outputs = learn.model(views)                                           # the weights at fault and the batch give the fault again
    learn.model.zero_grad()
    loss = learn.model.loss(outputs, views).loss
    loss.backward()
    assert not (loss.isfinite() and gradient_norm(learn.model).isfinite())


def test_a_run_without_a_folder_stops_too():
    complaint, _ = stopped(2, None, images(2), lr=1e12)
    assert "lower the learning rate" in complaint and "kept" not in complaint
