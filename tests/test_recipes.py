"""The recipes differ as their table says: a test for each setting that differs between the paper, read literally,
and the authors' code, or `robust`.

Each test takes one recipe, gives it the other's value of one setting, and compares both with a slow reading of that point,
mostly in plain NumPy."""
import math
from dataclasses import asdict
from functools import cache, partial

import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastcore.basics import AttrDict
from scipy import stats
from torch.nn.modules.batchnorm import _BatchNorm

from pcrl.crops import CropPairs, box_iou, crop_loaders, random_pair
from pcrl.model import PCRL
from pcrl.pretrain import pretrain_learner
from pcrl.recipes import ITEMS, RECIPES, get_recipe, loader_settings, recipe_table, store_settings
from pcrl.transforms import distinct_transforms

TESTS = {}


def row(item, *settings, dims=None):
    "Register a test for settings of a row of the table; with `dims` one for each of them, which the test is told."
    def register(test):
        test = cache(test)                                                        # of two settings: run once
        for setting in settings: TESTS.update({(item, setting, d): partial(test, d) for d in dims} if dims else {(item, setting, None): test})
        return test
    return register


# --- values, written out by hand ------------------------------------------------------------------------------------------

SIZES = (1, 1, 1), (1.5, 1.5, 1.5), (3, 1.5, 1.5), (.5, .5, .5), (2, 1.75, 1.75)                # of 32 x 64 x 64 voxels
LITERAL = dict(
    transatt="outer", transatt_rank=None, skips=True, projection=128, projector_norm=False, sigmoid_output=True, decode_together=True,
    reconstructed=("o", "m", "h"), reconstruction_mean=False, target="clean", turn_clean=True, transforms="all", hybrid_transform=True,
    mixup_pass=False, alpha=1., lam_per_sample=True, lam_larger_share=False, lam_apart=False,
    contrast="softmax", contrasted="attended", tau=.2, positive_in_denominator=False, nce_n=None,
    queue_size=16384, queue_keys=("o", "m", "h"), queue_noise=False, beta=.99, ema_statistics=True, shuffle_keys=False,
    contrast_weight=.5, reconstruction_weight=.5, rotation_weight=0.,
    lr=1e-3, momentum=.9, weight_decay=0., clip=None, warmup=0., cosine="step", epochs=None, patience=30, keep="best", bs=None,
    crop=(32, 64, 64), crop_scales=SIZES, min_iou=.25, pairs_per_image=1, air=None, max_air=.15, margin=0, spacing=None, window=None,
    input_channels=None, imagenet=False,
    p_flip=0., degrees=0., stretch=0., p_grey=0., jitter=0., p_blur=.5, blur_sigma=(.1, 2.), p_shuffle=0., p_paint=.9, p_inpaint=.2,
    holes=0, hole_side=32)
LITERAL_2D = dict(crop=(224, 224), crop_scales=(.2, 1.), min_iou=0.)
PAPER = dict(transatt="centred", projector_norm=True, transforms="distinct", clip=100., p_paint=.5, p_inpaint=.9)
ROBUST = PAPER | dict(
    transatt="open", skips=False, turn_clean=False, contrasted="deepest", queue_size=512, beta=.9, lr=.1, clip=20., warmup=.03, patience=None, keep="last")
OFFICIAL = dict(
    transatt="fc", decode_together=False, reconstructed=("o", "h"), reconstruction_mean=True, target="corrupt", turn_clean=False,
    hybrid_transform=False, mixup_pass=True, lam_per_sample=False, lam_larger_share=True, lam_apart=True,
    contrast="nce", contrasted="deepest", queue_keys=("m", "m2", "mix"), queue_noise=True, beta=.999, ema_statistics=False, shuffle_keys=True,
    contrast_weight=1., reconstruction_weight=1., weight_decay=1e-4, cosine="epoch", epochs=240, patience=None, keep="last",
    p_flip=.5, degrees=10.)
DEPARTURES = {
    ("literal", 2): {}, ("literal", 3): {},
    ("paper", 2): PAPER | dict(crop_scales=(.5, 1.)), ("paper", 3): PAPER | dict(crop_scales=(1.5, 2.), air=.04, max_air=None),
    ("robust", 2): ROBUST | dict(crop_scales=(.5, 1.), contrast_weight=.3, reconstruction_weight=1., bs=32),
    ("robust", 3): ROBUST | dict(crop_scales=(1.5, 2.), air=.04, max_air=None, contrast_weight=.03, reconstruction_weight=3., bs=16),
    ("official", 2): OFFICIAL | dict(sigmoid_output=False, bs=64, input_channels=3, imagenet=True, p_grey=.2, jitter=.4, p_paint=0., holes=3),
    ("official", 3): OFFICIAL | dict(bs=16, pairs_per_image=16, air=.425, margin=(15, 70, 70), spacing=(1., 1., 1.), window=(-1000., 1000.),
                                     stretch=.1, p_blur=1., blur_sigma=(0., 2.), p_shuffle=.5)}


def changed_settings(recipe): return set(DEPARTURES[recipe, 2]) | set(DEPARTURES[recipe, 3])


@pytest.mark.parametrize("recipe, dims", DEPARTURES)
def test_values(recipe, dims):
    here = LITERAL | (LITERAL_2D if dims == 2 else {}) | DEPARTURES[recipe, dims]
    assert asdict(RECIPES[recipe][dims]) == here | dict(name=recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_table_of_differences(recipe):
    "The table names the settings above, and each has a test of what it does."
    differs = recipe_table("literal", recipe).differs
    assert {setting for (_, setting), word in differs.items() if word} == changed_settings(recipe)
    assert changed_settings(recipe) <= {setting for _, setting, _ in TESTS}


def test_every_item_of_the_table_is_tested(): assert {item for item, *_ in TESTS} == set(ITEMS)


# --- helpers --------------------------------------------------------------------------------------------------------------

def model(recipe, dims=3, **settings):
    "A small model; equal seeds, so that models whose layers agree have the same weights."
    torch.manual_seed(0)
    return PCRL(dims, recipe, width=4, **dict(queue_size=16, projection=8, hole_side=8) | settings)


def both(recipe, setting, dims=3, **more):
    "A recipe as it is, and with the other recipe's value of one setting."
    theirs = get_recipe({"literal": "official", "official": "literal"}[recipe], dims)
    return model(recipe, dims, **more), model(recipe, dims, **{setting: getattr(theirs, setting)}, **more)


def crops(dims=3, n=4, channels=1):
    size = (16, 16, 16) if dims == 3 else (32, 32)
    return torch.rand(n, 2, channels, *size, generator=torch.Generator().manual_seed(1))


def views(m, seed=0, x=None): return m.views(crops(m.dims) if x is None else x, torch.Generator().manual_seed(seed))


def close(a, b, tol=1e-5): np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=tol)


def array(x): return x.detach().double().numpy()


def differ(a, b): return not torch.equal(a, b)


def turned(images, vec):
    "T, one image and one operation after the other."
    out = []
    for image, v in zip(array(images), vec.int().tolist()):
        for axis, on in zip((-1, -2, -3), v[:-4]):
            if on: image = np.flip(image, axis)
        out.append(np.rot90(image, v[-4:].index(1), (-2, -1)))
    return np.stack(out)


def mixed(a, b, lam): return np.stack([l * x + (1 - l) * y for l, x, y in zip(array(lam), a, b)])


def embedding(projector, features):
    "Pooling, FC, ReLU, FC, and then length 1."
    w1, b1, w2, b2 = map(array, projector.parameters())
    long = np.maximum(pooled(features) @ w1.T + b1, 0) @ w2.T + b2
    return long / np.linalg.norm(long, axis=1, keepdims=True), long


def count(module, calls):
    "Note the inputs that a module is given."
    module.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    return calls


def learner(recipe, setting=None, dims=3, **more):
    "A learner on noise, as the recipe is or with the other's value of one setting."
    theirs = get_recipe({"literal": "official", "official": "literal"}[recipe], dims)
    settings, size = {setting: getattr(theirs, setting)} if setting else {}, crops(dims).shape[3:]
    images = list(np.random.default_rng(0).integers(0, 256, (4, 1, *size), dtype=np.uint8))
    dls = crop_loaders(images[:3], images[3:], size=size, bs=2, pairs_per_image=2, device="cpu", scales=(1.,) * (4 - dims))
    return pretrain_learner(dls, dims, recipe=recipe, width=4, **dict(projection=8, queue_size=8, hole_side=8) | settings | more)


def fit(learn, epochs, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=cbs)
    return learn


# --- network and outputs --------------------------------------------------------------------------------------------------

def pooled(features): return features.mean(tuple(range(2, features.ndim)))


def each_channel(features, gates): return features * gates.reshape(*gates.shape, *[1] * (features.ndim - 2))


def read_outer(transatt, features, vec):
    "Eqs. 1-4 with the outer product built."
    w1, b1, w2, b2 = map(array, transatt.embed.parameters())
    f_p, f_l = np.maximum(vec @ w1.T + b1, 0) @ w2.T + b2, pooled(features)
    f_q = np.einsum("kij,bi,bj->bk", array(transatt.outer.weight), f_p, f_l)
    weighed = each_channel(features, 1 / (1 + np.exp(-np.maximum(f_q, 0))))
    conv = {4: F.conv2d, 5: F.conv3d}[features.ndim]
    return array(conv(torch.tensor(weighed), transatt.conv.weight.double(), transatt.conv.bias.double(), padding=1))


def read_fc(transatt, features, vec):
    w1, b1, w2, b2 = map(array, transatt.embed.parameters())
    assert w1.shape == (256, {4: 6, 5: 7}[features.ndim])
    return each_channel(features, 1 / (1 + np.exp(-(np.maximum(vec @ w1.T + b1, 0) @ w2.T + b2))))


@row("TransAtt", "transatt", dims=(2, 3))
def transatt(dims):
    for recipe, readers in (("literal", (read_outer, read_fc)), ("official", (read_fc, read_outer))):
        for m, read in zip(both(recipe, "transatt", dims), readers):
            v = views(m)
            pyramid, m_pyramid = m.encode(v.corrupt_o, v.corrupt_m)
            told = m.attend(pyramid, m_pyramid, v)["o"]
            close(array(told[-1]), read(m.ordinary.transatt, array(pyramid[-1]), array(v.vec_o)))


@row("what is contrasted", "contrasted", dims=(2, 3))
def contrasted(dims):
    for recipe, after_transatt in (("literal", (True, False)), ("official", (False, True))):
        for m, after in zip(both(recipe, "contrasted", dims), after_transatt):
            v = views(m)
            pyramid, m_pyramid = m.encode(v.corrupt_o, v.corrupt_m)
            told, out = m.attend(pyramid, m_pyramid, v), m(v)
            for path, branch, plain in (("o", m.ordinary, pyramid), ("m", m.momentum, m_pyramid)):
                right, _ = embedding(branch.projector, array(told[path][-1] if after else plain[-1]))
                close(array(out[f"g_{path}"]), right)
            v.vec_o = v.vec_o.roll(1, 0)                                          # another question
            assert differ(m(v).g_o, out.g_o) == after


@row("encoder passes", "mixup_pass", dims=(2, 3))
def encoder_passes(dims):
    for m, passes in ((model("literal", dims), 1), (model("literal", dims, mixup_pass=True), 2), (model("official", dims), 2)):
        o, k, told, v = count(m.ordinary.encoder, []), count(m.momentum.encoder, []), count(m.ordinary.transatt, []), views(m)
        out = m(v)
        assert len(o) == len(k) == passes
        assert sum(map(len, told)) == 2 * 4                                       # two paths of the first pass; the second is told nothing
        assert len(out.reconstructions) == passes * len(m.recipe.reconstructed) * 4
        if passes == 1: continue
        for seen, plain in ((o[1], v.corrupt_o), (k[1] if "order" not in v else k[1][v.order.argsort()], v.corrupt_m)):
            close(array(seen), mixed(array(plain), array(plain)[v.partner.numpy()], v.lam_in))
        assert sorted(v.partner.tolist()) == [0, 1, 2, 3]
    once = model("official", dims, mixup_pass=False, queue_keys=("m",))
    o = count(once.ordinary.encoder, [])
    once(views(once))
    assert len(o) == 1


@row("reconstruction terms", "reconstructed", "reconstruction_mean", dims=(2, 3))
def reconstruction_terms(dims):
    for recipe, mine, other, mean in (("literal", "omh", "oh", False), ("official", "oh", "omh", True)):
        for setting, paths, means in (("reconstructed", (mine, other), (mean, mean)),
                                      ("reconstruction_mean", (mine, mine), (mean, not mean))):
            for m, terms, averaged in zip(both(recipe, setting, dims), paths, means):
                v = views(m)
                out, names = m(v), [*terms, *(f"{p}2" for p in terms if recipe == "official")]
                losses = m.loss(out, v)
                y, t = (np.split(array(x), len(names)) for x in (out.reconstructions, v.targets))
                errors = [np.mean((a - b) ** 2) for a, b in zip(y, t, strict=True)]
                for name, error in zip(names, errors): close(array(losses[f"reconstruction_{name}"]), error)
                assert {k for k in losses if "_" in k} == {f"reconstruction_{n}" for n in names}
                close(array(losses.reconstruction), np.mean(errors) if averaged else np.sum(errors))


@row("reconstruction terms", "decode_together", dims=(2, 3))
def decoder_calls(dims):
    for recipe, calls in (("literal", (1, 3)), ("official", (4, 1))):
        for m, n in zip(both(recipe, "decode_together", dims), calls):
            seen, v = count(m.decoder, []), views(m)
            images = m(v).reconstructions
            assert len(seen) == n
            assert [len(pyramid[-1]) for pyramid in seen] == [len(images) // n] * n
            apart = torch.cat([m.decoder(pyramid) for pyramid in list(seen)])                # BatchNorm: of each call's own batch
            close(array(images), array(apart.sigmoid() if m.recipe.sigmoid_output else apart))


@row("reconstruction terms", "sigmoid_output")
def sigmoid_output():
    for recipe, ends in (("literal", (True, False)), ("official", (False, True))):
        for m, sigmoid in zip(both(recipe, "sigmoid_output", dims=2), ends):
            last, v = [], views(m)
            m.decoder.register_forward_hook(lambda *args: last.append(args[-1]))
            images, raw = array(m(v).reconstructions), array(torch.cat(last))
            close(images, 1 / (1 + np.exp(-raw)) if sigmoid else raw)
    assert get_recipe("official", 3).sigmoid_output                                # linear in 2D alone


# --- targets --------------------------------------------------------------------------------------------------------------

@row("target", "target", dims=(2, 3))
def target(dims):
    for recipe, shown in (("literal", ("clean", "corrupt")), ("official", ("corrupt", "clean"))):
        for m, word in zip(both(recipe, "target", dims), shown):
            v = views(m)
            close(array(v.targets[:4]), turned(v[f"{word}_o"], v.vec_o))
            if m.recipe.mixup_pass:                                               # mixed clean crops, not transformed, in either case
                close(array(v.targets[8:12]), mixed(array(v.clean_o), array(v.clean_o)[v.partner.numpy()], v.lam_in))


@row("target", "turn_clean", dims=(2, 3))
def turn_clean(dims):
    x = crops(dims)
    for recipe, turns in (("literal", (True, False)), ("official", (False, True))):
        for m, turn in zip(both(recipe, "turn_clean", dims, imagenet=False, input_channels=None), turns):
            v = views(m, x=x)
            for clean, crop in ((v.clean_o, x[:, 0]), (v.clean_m, x[:, 1])):
                assert differ(clean, crop) == turn
                assert torch.equal(clean.flatten(1).sort(1).values, crop.flatten(1).sort(1).values)


@row("hybrid target", "hybrid_transform", dims=(2, 3))
def hybrid_target(dims):
    for recipe, own_transform in (("literal", (True, False)), ("official", (False, True))):
        for m, own in zip(both(recipe, "hybrid_transform", dims), own_transform):
            v, at = views(m), m.recipe.reconstructed.index("h")
            o, k = (v.clean_o, v.clean_m) if recipe == "literal" else (v.corrupt_o, v.corrupt_m)
            if own: right = turned(torch.tensor(mixed(array(o), array(k), v.lam)), v.vec_h)
            else: right = mixed(turned(o, v.vec_o), turned(k, v.vec_m), v.lam)
            close(array(v.targets.split(4)[at]), right)
            pyramids = m.encode(v.corrupt_o, v.corrupt_m)
            told = m.attend(*pyramids, v)
            if own: deepest = m.ordinary.transatt(torch.tensor(mixed(*(array(p[-1]) for p in pyramids), v.lam)).float(), v.vec_h)
            else: deepest = torch.tensor(mixed(array(told["o"][-1]), array(m.ordinary.transatt(pyramids[1][-1], v.vec_m)), v.lam))
            close(array(told["h"][-1]), array(deepest), 1e-4)


# --- contrast -------------------------------------------------------------------------------------------------------------

def read_softmax(q, k, queue, tau=.2):
    return np.mean([-math.log(math.exp(a @ b / tau) / sum(math.exp(a @ c / tau) for c in queue)) for a, b in zip(q, k)])


def read_nce(q, k, queue, Z=None, n=1, tau=.2):
    "Binary NCE; if Z is not given, it is estimated."
    s = np.array([[math.exp(a @ c / tau) for c in (b, *queue)] for a, b in zip(q, k)])
    Z, noise = Z or n * s.mean(), len(queue) / n
    p = s / Z
    return np.mean([-math.log(r[0] / (r[0] + noise + 1e-5)) - sum(math.log(noise / (x + noise + 1e-5)) for x in r[1:]) for r in p]), Z


def read_contrast(m, out, Z=None):
    "Every pair's loss with the queue as that pair finds it, and Z as the first pair left it."
    pairs, queue, losses = [("o", "m")], list(array(m.queue.rows)[:int(m.queue.pushed)]), []
    if m.recipe.mixup_pass: pairs += [("o2", "m2"), ("o2", "mix")]
    at = int(m.queue.pushed) % 16
    for q, k in pairs:
        q, k = array(out[f"g_{q}"]), array(out[f"g_{k}"])
        if m.recipe.contrast == "nce": loss, Z = read_nce(q, k, queue, Z, m.recipe.nce_n or 1)
        else: loss = read_softmax(q, k, queue)
        losses.append(loss)
        for key in k: queue[at % 16], at = key, at + 1
    return np.mean(losses), Z


@row("contrast", "contrast", dims=(2, 3))
def contrast(dims):
    for recipe in ("literal", "official"):
        mine, other = both(recipe, "contrast", dims, queue_noise=True)
        assert mine.recipe.contrast == {"literal": "softmax", "official": "nce"}[recipe] != other.recipe.contrast
        for m in (mine, other):
            Z = None
            for seed in range(2):                                                 # at the second step Z is the first one's
                v = views(m, seed)
                out = m(v)
                if seed: assert Z is None or m.nce.Z.item() == pytest.approx(Z, rel=1e-4)
                right, Z = read_contrast(m, out, Z)
                close(array(m.loss(out, v).contrast), right, 1e-4)
                m.finish_step(out)
    for setting in ("tau", "positive_in_denominator"): assert getattr(mine.recipe, setting) == getattr(model("literal", dims).recipe, setting)


def test_noise_is_scaled_by_the_batches_of_an_epoch():
    for recipe, batches in (("literal", None), ("official", 3)):
        learn = learner(recipe)
        assert learn.model.recipe.nce_n == batches and (batches is None or len(learn.dls.train) == learn.model.nce.n == batches)
    m = model("official", nce_n=10**6)
    out = m(views(m))
    close(array(m.contrast(out)), read_contrast(m, out)[0], 1e-3)
    assert (m.contrast(out) - model("official").contrast(out)).abs() > 1           # only so large a number is to be seen


@row("queue", "queue_keys", dims=(2, 3))
def queue_keys(dims):
    for recipe, keys in (("literal", ("omh", "m")), ("official", (("m", "m2", "mix"), "omh"))):
        for m, wanted in zip((model(recipe, dims), model(recipe, dims, queue_keys=tuple(keys[1]))), keys):
            v = views(m)
            out = m(v)
            m.finish_step(out)
            n = 4 * len(wanted)
            close(array(m.queue.rows[:n]), np.concatenate([array(out[f"g_{k}"]) for k in wanted]))
            assert recipe == "official" or len(m.queue.keys) == n
    _, long = embedding(m.momentum.projector, array(m.encode(v.corrupt_o, v.corrupt_m, v.order)[1][-1]))
    blend = mixed(long, long[v.partner.numpy()], v.lam_in)
    m = model("official", dims)
    close(array(m(v).g_mix), blend / np.linalg.norm(blend, axis=1, keepdims=True), 1e-4)


@row("queue", "queue_noise", dims=(2, 3))
def queue_noise(dims):
    for recipe, noise in (("literal", (False, True)), ("official", (True, False))):
        for m, full in zip(both(recipe, "queue_noise", dims, queue_size=4096), noise):
            assert len(m.queue.keys) == (4096 if full else 0)
            if full: assert stats.kstest(m.queue.keys.flatten().numpy(), stats.uniform(-(3 / 8) ** .5, 2 * (3 / 8) ** .5).cdf).pvalue > .01
            if recipe == "literal": assert (m.contrast(m(views(m))) > 0) == full      # nothing to contrast with in an empty queue


def test_queue_of_both_recipes_has_the_authors_size():
    assert [get_recipe(recipe, dims).queue_size for recipe in ("literal", "official") for dims in (2, 3)] == [16384] * 4


@row("beta", "beta", dims=(2, 3))
def beta(dims):
    for recipe, betas in (("literal", (.99, .999)), ("official", (.999, .99))):
        for m, b in zip(both(recipe, "beta", dims), betas):
            v = views(m)
            out = m(v)
            with torch.no_grad(): m.ordinary.projector.layers[0].weight.add_(1.)
            before, o = (array(x.projector.layers[0].weight) for x in (m.momentum, m.ordinary))
            m.finish_step(out)
            close(array(m.momentum.projector.layers[0].weight), b * before + (1 - b) * o, 1e-6)


@row("beta", "ema_statistics", dims=(2, 3))
def key_statistics(dims):
    mean_of = lambda x: pooled(x).mean(0)
    for recipe, follows in (("literal", (True, False)), ("official", (False, True))):
        for m, ema in zip(both(recipe, "ema_statistics", dims), follows):
            first, of_ordinary = (next(x for x in b.encoder.modules() if isinstance(x, _BatchNorm)) for b in (m.momentum, m.ordinary))
            inputs = count(first, [])
            v, b = views(m), m.recipe.beta
            out = m(v)
            raw = [mean_of(array(x)) for x in inputs]
            own = np.zeros(len(raw[0]))
            for mean in raw: own = .9 * own + .1 * mean                           # BatchNorm's own running mean, after each pass
            seen = array(first.running_mean)
            close(seen, 0 * own if ema else own)
            m.finish_step(out)
            o = array(of_ordinary.running_mean)
            close(array(first.running_mean), b * seen + (1 - b) * o if ema else own)
            normalised = array(first(inputs[0]))                               # train mode: the batch's own mean and deviation
            close(mean_of(normalised), 0 * own, 1e-4)


@row("beta", "shuffle_keys", dims=(2, 3))
def shuffled_keys(dims):
    for recipe, shuffles in (("literal", (False, True)), ("official", (True, False))):
        for m, shuffle in zip(both(recipe, "shuffle_keys", dims), shuffles):
            seen, v = count(m.momentum.encoder, []), views(m, seed=4)
            m(v)
            assert ("order" in v) == shuffle
            if not shuffle: assert torch.equal(seen[0], v.corrupt_m); continue
            assert sorted(v.order.tolist()) == [0, 1, 2, 3] and v.order.tolist() != [0, 1, 2, 3]
            assert torch.equal(seen[0], v.corrupt_m[v.order])
            plain = m.encode(v.corrupt_o, v.corrupt_m)[1]                           # and features are put back
            for a, b in zip(m.encode(v.corrupt_o, v.corrupt_m, v.order)[1], plain): close(array(a), array(b), 1e-4)


@row("lam", "lam_per_sample", dims=(2, 3))
def lam_per_sample(dims):
    for recipe, each in (("literal", (True, False)), ("official", (False, True))):
        for m, own in zip(both(recipe, "lam_per_sample", dims), each):
            v = views(m)
            for lam in (v[k] for k in ("lam", "lam_in", "lam2") if k in v): assert len(lam.unique()) == (4 if own else 1)


@row("lam", "lam_larger_share", dims=(2, 3))
def lam_larger_share(dims):
    for recipe, larger in (("literal", (False, True)), ("official", (True, False))):
        for m, high in zip(both(recipe, "lam_larger_share", dims), larger):
            lam = np.array([views(m, s, torch.rand(1, 2, 1, *[8] * dims)).lam.item() for s in range(200)])
            assert stats.kstest(lam, stats.uniform(.5, .5).cdf if high else stats.uniform(0, 1).cdf).pvalue > .01


@row("lam", "lam_apart", dims=(2, 3))
def lam_apart(dims):
    apart, one = both("official", "lam_apart", dims)
    v, w = views(apart), views(one)
    assert len({v.lam[0].item(), v.lam2[0].item(), v.lam_in[0].item()}) == 3
    assert torch.equal(w.lam, w.lam2) and torch.equal(w.lam, w.lam_in)
    out = []
    for lam2 in (0., 1.): out.append(apart(AttrDict(v, lam2=torch.full((4,), lam2))).reconstructions)      # the second features' lam
    first, second = (x.split(8) for x in out)
    close(array(first[0]), array(second[0])); assert differ(first[1], second[1])
    assert "lam2" not in views(model("literal", dims, lam_apart=True))                      # the paper has one lam in any case


# --- training -------------------------------------------------------------------------------------------------------------

@row("weights", "contrast_weight", "reconstruction_weight", dims=(2, 3))
def weights(dims):
    for recipe, mine, other in (("literal", .5, 1.), ("official", 1., .5)):
        for setting, (c, r) in (("contrast_weight", (other, mine)), ("reconstruction_weight", (mine, other))):
            for m, (wc, wr) in zip(both(recipe, setting, dims, queue_noise=True), ((mine, mine), (c, r))):
                v = views(m)
                losses = m.loss(m(v), v)
                close(array(losses.loss), wc * array(losses.contrast) + wr * array(losses.reconstruction))


class Rates(Callback):
    order = 60
    def __init__(self): self.seen = []
    def after_step(self): self.seen.append(self.opt.hypers[-1]["lr"])


@row("schedule", "weight_decay", dims=(2, 3))
def weight_decay(dims):
    for recipe, decays in (("literal", (0., 1e-4)), ("official", (1e-4, 0.))):
        for setting, wd in zip((None, "weight_decay"), decays):
            learn = learner(recipe, setting, dims)
            learn.create_opt()
            group = learn.opt.opt.param_groups[0]
            assert (group["weight_decay"], group["lr"], group["momentum"], type(learn.opt.opt)) == (wd, 1e-3, .9, torch.optim.SGD)
            unused = learn.model.ordinary.projector.layers[2].bias
            with torch.no_grad(): unused.fill_(1.)
            for p in learn.model.parameters(): p.grad = torch.zeros_like(p) if p.requires_grad else None
            learn.opt.opt.step()
            close(array(unused), 1 - 1e-3 * wd, 1e-9)                              # no gradient, and still it shrinks


@row("schedule", "cosine", dims=(2, 3))
def cosine(dims):
    by_step = [.5e-3 * (1 + math.cos(math.pi * i / 12)) for i in range(12)]
    by_epoch = [.5e-3 * (1 + math.cos(math.pi * (i // 3) / 4)) for i in range(12)]
    for recipe, rates in (("literal", (by_step, by_epoch)), ("official", (by_epoch, by_step))):
        for setting, right in zip((None, "cosine"), rates):
            seen = Rates()
            fit(learner(recipe, setting, dims), 4, seen)
            close(seen.seen, right, 1e-8)


@row("schedule", "patience", "keep", dims=(2, 3))
def what_ends_it_and_what_is_kept(dims):
    class Worse(Callback):
        "Makes every epoch but the second worse than the one before it."
        order = 25
        def after_validate(self): self.epoch_figures.rows[-1]["valid_loss"] = 10. * self.epoch + 20 * (self.epoch == 0)

    class Weights(Callback):
        order = 35
        def __init__(self): self.after = []
        def after_validate(self): self.after.append(next(self.model.encoder.parameters()).detach().clone())

    def run(recipe, setting=None, **more):
        after = Weights()
        learn = fit(learner(recipe, setting, dims, **more), 5, Worse(), after)
        kept = next(iter(learn.keep_best.weights["encoder"].values()))
        return len(after.after), [i for i, w in enumerate(after.after) if torch.equal(w, kept)]

    assert (get_recipe("literal", dims).patience, get_recipe("official", dims).patience) == (30, None)
    assert run("literal", patience=2) == (4, [1])                  # two epochs after the best it ends, and that one is kept
    assert run("literal", "patience") == (5, [1])
    assert run("literal", "keep", patience=2)[1][-1] == run("literal", "keep", patience=2)[0] - 1
    assert run("official") == (5, [4])                                              # validation decides nothing
    assert run("official", "keep") == (5, [1])


@row("schedule", "epochs")
def epochs(): assert [(RECIPES["literal"][d].epochs, RECIPES["official"][d].epochs) for d in (2, 3)] == [(None, 240)] * 2


@row("projector", "projection", dims=(2, 3))
def projector(dims):
    for recipe in ("literal", "official"):
        assert get_recipe(recipe, dims).projection == 128
        for dim in (128, 8):
            m = model(recipe, dims, projection=dim)
            kinds = [type(layer) for layer in m.ordinary.projector.layers]
            assert kinds == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
            assert [tuple(p.shape) for p in m.ordinary.projector.parameters()] == [(dim, 32), (dim,), (dim, dim), (dim,)]
            assert m(views(m)).g_o.shape == (4, dim) and m.queue.rows.shape == (16, dim)


@row("batch", "bs")
def batch():
    for dims, bs, size in ((2, 64, (32, 32)), (3, 16, (16, 16, 16))):
        images = [np.zeros((1, *size), np.uint8)] * 64
        settings = lambda recipe: loader_settings(get_recipe(recipe, dims, crop=size))
        load = lambda recipe, **more: crop_loaders(images, images[:1], device="cpu", **settings(recipe) | more)
        assert len(load("official", air=None).one_batch()[0]) == bs
        with pytest.raises(TypeError, match="bs"): load("literal")                      # not stated: whoever calls has to say it
        assert len(load("literal", bs=5).one_batch()[0]) == 5


# --- input ----------------------------------------------------------------------------------------------------------------

@row("input", "input_channels", "imagenet")
def colour_input():
    x = crops(2)
    for setting, swaps in (("input_channels", {}), ("imagenet", {})):
        for recipe in ("literal", "official"):
            channels = 3 if recipe == "official" else 1
            more = dict(turn_clean=False) | (dict(input_channels=3) if (recipe, setting) == ("literal", "imagenet") else {})
            if (recipe, setting) == ("official", "input_channels"): more |= dict(imagenet=False)      # its mean has three channels
            mine, other = both(recipe, setting, dims=2, **more)
            for m in (mine, other):
                v, n = views(m, x=x), m.recipe.input_channels or 1
                assert v.corrupt_o.shape == v.clean_o.shape == (4, n, 32, 32) and m.config["in_channels"] == n
                right = array(x[:, 0].expand(4, n, 32, 32))
                mean, deviation = np.array([[.485, .456, .406], [.229, .224, .225]])[..., None, None]
                if m.recipe.imagenet: right = (right - mean) / deviation
                close(array(v.clean_o), right)
                assert m(v).reconstructions.shape[1] == n
            if setting == "input_channels":
                assert [m.recipe.input_channels for m in (mine, other)] == ([None, 3] if recipe == "literal" else [3, None])
            if setting == "imagenet": assert mine.recipe.imagenet == (channels == 3) != other.recipe.imagenet
    assert not get_recipe("official", 3).imagenet and get_recipe("official", 3).input_channels is None


@row("input", "crop", "crop_scales", "min_iou")
def crops_of_both():
    "Not stated in the paper: the authors' sizes and overlap, in both recipes."
    multiples = {tuple(np.multiply(s, (32, 64, 64)).astype(int)) for s in get_recipe("official", 3).crop_scales}
    assert multiples == {(32, 64, 64), (48, 96, 96), (96, 96, 96), (16, 32, 32), (64, 112, 112)}
    for recipe in ("literal", "official"):
        two, three = RECIPES[recipe][2], RECIPES[recipe][3]
        assert (two.crop, two.crop_scales, two.min_iou) == ((224, 224), (.2, 1.), 0.)
        assert (three.crop, three.crop_scales, three.min_iou) == ((32, 64, 64), get_recipe("literal", 3).crop_scales, .25)
    rng = np.random.default_rng(0)
    pairs = [random_pair(rng, (130, 260, 260), three.crop, three.crop_scales, three.min_iou, margin=three.margin) for _ in range(100)]
    assert min(box_iou(a, b) for a, b in pairs) > .25
    assert min(b[0].min() for pair in pairs for b in pair) == 15 and all((b[0] >= (15, 70, 70)).all() for pair in pairs for b in pair)
    assert all(((130, 260, 260) - b[1] >= (15, 70, 70)).all() for pair in pairs for b in pair)


def crop_pairs(recipe, images): return CropPairs(images, **{k: v for k, v in loader_settings(recipe).items() if k != "bs"})


def loaders(recipe, setting, images):
    theirs = get_recipe({"literal": "official", "official": "literal"}[recipe], 3)
    for r in (get_recipe(recipe, 3), get_recipe(recipe, 3, **{setting: getattr(theirs, setting)})):
        yield crop_pairs(r, images)


@row("input", "pairs_per_image")
def pairs_per_image():
    images = [np.zeros((1, 32, 64, 64), np.uint8)] * 2
    assert [[len(p) for p in loaders(r, "pairs_per_image", images)] for r in ("literal", "official")] == [[2, 32], [32, 2]]


@row("input", "air")
def air():
    "Two thirds of the scan are -1000 HU, one third is 0 HU: window -1000 to 1000, so 0 and 0.5, and the threshold of -150 HU is 0.425."
    scan = np.zeros((1, 40, 210, 210), np.uint8)
    scan[..., 140:] = 128
    def fractions(pairs): return np.array([(pairs[0, i] == 0).mean((1, 2, 3, 4)).max() for i in range(8)])
    for recipe, rejects in (("literal", (False, True)), ("official", (True, False))):
        for pairs, reject in zip(loaders(recipe, "air", [scan] * 8), rejects):
            pairs.margin, pairs.scales = 0, [(.5, .5, .5)]
            assert (fractions(pairs) <= .15).all() == reject
    assert get_recipe("official", 3).air == (-150 + 1000) / 2000 and get_recipe("official", 3).max_air == .15


@row("input", "max_air")
def max_air():
    "A scan of which a fifth is tissue: a cube that shows a tenth of it at least, unless the authors' 0.15 is asked for, and then nearly nothing else."
    scan = np.zeros((1, 40, 100, 500), np.uint8)
    scan[..., 400:] = 128
    for recipe in ("paper", "robust"):
        limits = []
        for most in (get_recipe(recipe, 3).max_air, get_recipe("official", 3).max_air):
            pairs = crop_pairs(get_recipe(recipe, 3, crop=(16, 32, 32), max_air=most), [scan] * 8)
            limits.append(max((pairs[0, i] == 0).mean((1, 2, 3, 4)).max() for i in range(8)))
        assert .15 >= limits[1] and .15 < limits[0] <= .9


@row("input", "margin")
def margin():
    "Voxels at the faces are marked; only a crop without margin can show them."
    scan = np.full((1, 64, 224, 224), 255, np.uint8)
    scan[:, 15:-15, 70:-70, 70:-70] = 120
    for recipe, margins in (("literal", (False, True)), ("official", (True, False))):
        for pairs, kept in zip(loaders(recipe, "margin", [scan] * 8), margins):
            pairs.scales = [1]
            assert all(pairs[0, i].max() == 120 for i in range(8)) == kept


@row("input", "spacing", "window")
def store():
    assert store_settings(get_recipe("literal", 3)) == {}
    assert store_settings(get_recipe("official", 3)) == dict(spacing=(1., 1., 1.), window=(-1000., 1000.))
    assert store_settings(get_recipe("official", 3, window=None)) == dict(spacing=(1., 1., 1.))
    assert store_settings(get_recipe("literal", 3, spacing=(1., 1., 1.))) == dict(spacing=(1., 1., 1.))


# --- corruption -----------------------------------------------------------------------------------------------------------

STILL = dict(p_flip=0., degrees=0., stretch=0., p_grey=0., jitter=0., p_blur=0., p_shuffle=0., p_paint=0., holes=0)


def alone(recipe, setting, dims, also=()):
    "Corruption by one setting (and those it needs) alone, as the recipe has it and as the other one has it."
    mine = get_recipe(recipe, dims)
    values = [getattr(get_recipe(r, dims), setting) for r in (recipe, {"literal": "official", "official": "literal"}[recipe])]
    quiet = {k: v for k, v in STILL.items() if k != setting and k not in also} | {k: getattr(mine, k) for k in also}
    for value in values:
        yield value, partial(model(recipe, dims, **quiet | {setting: value}).corrupted, generator=torch.Generator().manual_seed(0))


def ramp(dims, n=200, channels=1):
    "Images that rise along x, y and z at different rates, so that any change of place shows."
    size = (12, 16, 16)[-dims:]
    grid = torch.meshgrid(*[torch.linspace(0, 1, s) for s in size], indexing="ij")
    return sum(w * g for w, g in zip((.1, .3, .6)[-dims:], grid)).expand(n, channels, *size).clone()


def changed(a, b): return (a - b).abs().flatten(1).amax(1) > 1e-4


@row("corruption", "p_flip")
def flips():
    for dims in (2, 3):
        for recipe, expected in (("literal", (0., .5)), ("official", (.5, 0.))):
            for (p, corrupted), right in zip(alone(recipe, "p_flip", dims), expected):
                x = ramp(dims, channels=3 if dims == 2 else 1)
                y = corrupted(x)
                flipped = changed(x, y)
                assert p == right and abs(flipped.float().mean() - right) < .15
                close(array(y[flipped]), array(x[flipped].flip(-1)))


@row("corruption", "degrees")
def turns():
    "The slope of a plane through the middle voxels tells the angle."
    for recipe, expected in (("literal", (0., 10.)), ("official", (10., 0.))):
        for (degrees, corrupted), right in zip(alone(recipe, "degrees", 2), expected):
            y = corrupted(torch.linspace(0, 1, 32).expand(300, 1, 32, 32).clone())
            slope_y, slope_x = (y[:, 0, 17, 15] - y[:, 0, 14, 15], y[:, 0, 15, 17] - y[:, 0, 15, 14])
            angle = torch.atan2(slope_y, slope_x).rad2deg().numpy()
            assert degrees == right
            if right: assert stats.kstest(angle, stats.uniform(-10, 20).cdf).pvalue > .01
            else: assert abs(angle).max() < 1e-3
    for recipe, expected in (("literal", (False, True)), ("official", (True, False))):
        for (_, corrupted), right in zip(alone(recipe, "degrees", 3), expected):
            assert changed(corrupted(ramp(3, 20)), ramp(3, 20)).any() == right


@row("corruption", "stretch")
def stretches():
    for recipe, expected in (("literal", (0., .1)), ("official", (.1, 0.))):
        for (stretch, corrupted), right in zip(alone(recipe, "stretch", 3), expected):
            y = corrupted(torch.linspace(0, 1, 32).expand(300, 1, 8, 8, 32).clone())[:, 0, 4, 4]
            factor = ((y[:, 17] - y[:, 14]) * 31 / 3).numpy()
            assert stretch == right
            if right: assert stats.kstest(factor, stats.uniform(.9, .2).cdf).pvalue > .01
            else: assert abs(factor - 1).max() < 1e-4
    assert get_recipe("official", 2).stretch == 0


@row("corruption", "p_grey")
def grey():
    x = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    for recipe, expected in (("literal", (0., .2)), ("official", (.2, 0.))):
        for (p, corrupted), right in zip(alone(recipe, "p_grey", 2), expected):
            y = corrupted(x)
            is_grey = y.std(1).amax((1, 2)) < 1e-4
            assert p == right and abs(is_grey.float().mean() - right) < .08
            weighed = array(x[is_grey]) * np.array([.299, .587, .114])[:, None, None]
            close(array(y[is_grey]), weighed.sum(1, keepdims=True).repeat(3, 1), 1e-4)
    assert get_recipe("official", 3).p_grey == get_recipe("official", 3).jitter == 0


@row("corruption", "jitter")
def jitter():
    "An even grey image has no contrast and no colour to jitter, only brightness."
    for recipe, expected in (("literal", (0., .4)), ("official", (.4, 0.))):
        for (strength, corrupted), right in zip(alone(recipe, "jitter", 2), expected):
            factor = (corrupted(torch.full((400, 3, 8, 8), .5))[:, 0, 0, 0] / .5).numpy()
            assert strength == right
            if right: assert stats.kstest(factor, stats.uniform(.6, .8).cdf).pvalue > .01
            else: assert abs(factor - 1).max() < 1e-4


def spread(y):
    "Standard deviation, in voxels, of what a single bright voxel in the middle became, along x."
    profile = y.flatten(0, 1).flatten(1, -2).sum(1).numpy()
    at = np.arange(profile.shape[1])
    mean = (profile * at).sum(1) / profile.sum(1)
    return np.sqrt((profile * (at - mean[:, None]) ** 2).sum(1) / profile.sum(1))


def bright(n=300):
    x = torch.zeros(n, 1, 12, 12, 33)
    x[:, :, 6, 6, 16] = 1
    return x


@row("corruption", "p_blur")
def blurs():
    for recipe, expected in (("literal", (.5, 1.)), ("official", (1., .5))):
        for (p, corrupted), right in zip(alone(recipe, "p_blur", 3), expected):
            assert p == right
            blurred = corrupted(bright(400))[:, 0, 6, 6, 16] < .999
            low, high = get_recipe(recipe, 3).blur_sigma
            visible = (high - .25) / (high - low)                                  # under 0.25 voxels nothing is to be seen
            assert abs(blurred.float().mean() - right * visible) < .1
    assert get_recipe("official", 2).p_blur == get_recipe("literal", 2).p_blur == .5


@row("corruption", "blur_sigma")
def blur_widths():
    for recipe, expected in (("literal", (.1, 0.)), ("official", (0., .1))):
        for (sigma, corrupted), low in zip(alone(recipe, "blur_sigma", 3, also=("p_blur",)), expected):
            assert sigma == (low, 2.)
            seen = spread(corrupted(bright()))
            wide = seen[seen > .6]                                                # what is narrower is not a Gaussian on a grid of voxels
            assert stats.kstest(wide, stats.uniform(.6, 1.4).cdf).pvalue > .01
    assert get_recipe("official", 2).blur_sigma == (.1, 2.)


@row("corruption", "p_shuffle")
def shuffles():
    x = torch.rand(60, 1, 20, 20, 20, generator=torch.Generator().manual_seed(3))
    for recipe, expected in (("literal", (0., .5)), ("official", (.5, 0.))):
        for (p, corrupted), right in zip(alone(recipe, "p_shuffle", 3), expected):
            y = corrupted(x)
            moved = changed(x, y)
            assert p == right and abs(moved.float().mean() - right) < .2
            for image, original in zip(y[moved][:3, 0], x[moved][:3, 0]):           # windows of 2 x 2 x 2: moved by 1 at most
                places = [(original == value).nonzero()[0] for value in image[5, 5]]
                assert all((at - torch.tensor([5, 5, i])).abs().max() <= 1 for i, at in enumerate(places))
    assert get_recipe("official", 2).p_shuffle == 0


def test_shuffled_after_blur_and_painted_last():
    "Painted noise is neither blurred nor shuffled: of an even image every voxel is even or uniform noise. And a blurred edge is shuffled."
    m = model("official", p_shuffle=1., p_paint=1., degrees=0., stretch=0.)
    y = m.corrupted(torch.full((40, 1, 20, 20, 20), .5), torch.Generator().manual_seed(0))
    noise = y[(y - .5).abs() > 1e-5].numpy()
    assert stats.kstest(noise, stats.uniform(0, 1).cdf).statistic < .01
    m = model("official", p_shuffle=1., p_paint=0., degrees=0., stretch=0., p_flip=0., blur_sigma=(1., 1.))
    edge = (torch.arange(20) >= 10).float().expand(1, 1, 20, 20, 20)
    y = m.corrupted(edge, torch.Generator().manual_seed(0))
    assert y[0, 0, :, :, 10].std() > .05                     # shuffled first and blurred afterwards it would be smoother
    close(y.mean(), .5, 1e-2)


@row("corruption", "p_paint")
def paints():
    for dims, expected in ((2, {"literal": (.9, 0.), "official": (0., .9)}), (3, {"literal": (.9, .9), "official": (.9, .9)})):
        for recipe, shares in expected.items():
            for (p, corrupted), right in zip(alone(recipe, "p_paint", dims), shares):
                painted = changed(corrupted(ramp(dims, 300, 3 if dims == 2 else 1)), ramp(dims, 300, 3 if dims == 2 else 1))
                assert p == right and abs(painted.float().mean() - right) < .08
    assert [get_recipe(recipe, dims).p_inpaint for recipe in ("literal", "official") for dims in (2, 3)] == [.2] * 4


@row("corruption", "holes")
def holes():
    x = crops(2) * .5 + .25
    for recipe, expected in (("literal", (0, 3)), ("official", (3, 0))):
        for n, m in zip(expected, both(recipe, "holes", dims=2, **{k: v for k, v in STILL.items() if k != "holes"})):
            assert m.recipe.holes == n
            cut = views(m, x=x).corrupt_o == 0                                      # 0 in what the encoder sees, so ImageNet's mean
            assert (cut.flatten(1).any(1) == (n > 0)).all()
            if n: assert (cut.flatten(1).sum(1) <= cut.shape[1] * n * 8 * 8).all() and (cut.flatten(1).sum(1) >= cut.shape[1] * 4 * 4).all()
    assert (get_recipe("official", 2).hole_side, get_recipe("official", 3).holes) == (32, 0)


# --- one of the two losses alone ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_loss_without_weight_is_not_computed(recipe, dims):
    alone = {}, dict(reconstruction_weight=0.), dict(contrast_weight=0.)
    whole, contrast, reconstruction = (model(recipe, dims, queue_noise=True, **settings) for settings in alone)
    decoder = count(contrast.decoder, [])
    projected = count(reconstruction.ordinary.projector.layers, count(reconstruction.momentum.projector.layers, []))
    queue = reconstruction.queue.rows.clone()
    terms = {}
    for name, m in dict(whole=whole, contrast=contrast, reconstruction=reconstruction).items():
        v = views(m)
        out = m(v)
        terms[name] = m.loss(out, v)
        terms[name].loss.backward()
        m.finish_step(out)
        assert m.encoder.parameters().__next__().grad.abs().sum() > 0
    assert not decoder and not projected and torch.equal(reconstruction.queue.rows, queue)
    close(array(contrast.queue.rows), array(whole.queue.rows))
    for part in ("contrast", "reconstruction"): close(array(terms[part][part]), array(terms["whole"][part]))


@pytest.mark.parametrize("setting", ["contrast_weight", "reconstruction_weight"])
def test_a_learner_trains_one_loss_alone(setting):
    learn = fit(learner("literal", **{setting: 0.}), 2)
    part = {"contrast_weight": "reconstruction", "reconstruction_weight": "contrast"}[setting]
    for row in learn.epoch_figures.rows: assert row["valid_loss"] == pytest.approx(.5 * row[f"valid_{part}"], rel=1e-4)


# --- what the recipe `robust` changes alone -------------------------------------------------------------------------------

def literal_and_robust(setting, dims=3, **more):
    "The paper read literally, and with the value of `robust` for one setting."
    theirs = getattr(get_recipe("robust", dims), setting)
    return model("literal", dims, **more), model("literal", dims, **{setting: theirs}, **more)


@pytest.mark.parametrize("recipe, read", [("paper", lambda f_q: 1 / (1 + np.exp(-np.maximum(f_q, 0)))), ("robust", lambda f_q: 2 / (1 + np.exp(-f_q)))])
def test_gates_of_centred_vectors(recipe, read):
    "Centred and normalised f^p and f^l; eqs. 2 and 3 as printed in `paper`, and 2 sigmoid without the ReLU in `robust`."
    norm = lambda a: (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5)
    m = model(recipe)
    t, v = m.ordinary.transatt, views(m)
    pyramid, m_pyramid = m.encode(v.corrupt_o, v.corrupt_m)
    w1, b1, w2, b2 = map(array, t.embed.parameters())
    embed = lambda vec: np.maximum(vec @ w1.T + b1, 0) @ w2.T + b2
    f_p, f_l = norm(embed(array(v.vec_o)) - embed(array(distinct_transforms(3))).mean(0)), norm(array(pyramid[-1]).mean((2, 3, 4)))
    gates = read(np.einsum("kij,bi,bj->bk", array(t.outer.weight), f_p, f_l))
    close(array(t.gate(pyramid[-1], v.vec_o)), gates)
    assert gates.max() > gates.min() + .1


@row("decoder", "skips")
def skips():
    for m, used in zip(literal_and_robust("skips"), (True, False)):
        v, calls = views(m), count(m.decoder, [])
        m(v)
        assert len(calls[0]) == (4 if used else 1)
        m.eval()
        changed = lambda pyramid: [f + (i < len(pyramid) - 1) for i, f in enumerate(pyramid)]
        assert differ(m.reconstruct(v.corrupt_o, v.vec_o), m.reconstruct(v.corrupt_o, v.vec_o, changed)) == used


@row("target", "transforms")
def distinct():
    for m, flips_y in zip(literal_and_robust("transforms"), (True, False)):
        vec = torch.cat([views(m, seed).vec_o for seed in range(40)])
        assert bool(vec[:, 1].any()) == flips_y                                   # flip y is flip x and half a turn
        assert len(vec.unique(dim=0)) > 12 and (vec[:, 3:].sum(1) == 1).all()


@row("queue", "queue_size")
def queue_size():
    images = [np.zeros((1, 16, 16, 16), np.uint8)] * 1200
    dls = crop_loaders(images[:1100], images[1100:], size=16, bs=2, device="cpu", scales=(1.,))
    size = lambda recipe: len(pretrain_learner(dls, 3, recipe=recipe, width=4).model.queue.rows)
    assert (size("literal"), size("robust"), size(get_recipe("robust", 3, queue_size=128))) == (1024, 512, 128)
    assert [get_recipe(r, d).queue_size for r in ("literal", "robust") for d in (2, 3)] == [16384, 16384, 512, 512]


@row("projector", "projector_norm")
def projector_norm():
    "BatchNorm over the batch between the two layers."
    for m, normed in zip(literal_and_robust("projector_norm"), (False, True)):
        projector, features = m.ordinary.projector, torch.rand(6, 32, 2, 2, 2)
        hidden = array(projector.layers[0](features.mean((2, 3, 4))))
        if normed: hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
        w, b = array(projector.layers[-1].weight), array(projector.layers[-1].bias)
        close(array(projector.embed(features)), np.maximum(hidden, 0) @ w.T + b)


@row("schedule", "lr", "warmup")
def rate():
    rate = lambda i, top, warmup: top * (i / 12 / warmup if i / 12 < warmup else (1 + math.cos(math.pi * (i / 12 - warmup) / (1 - warmup))) / 2)
    for settings, top, warmup in ((dict(), 1e-3, 0.), (dict(lr=.1), .1, 0.), (dict(warmup=.5), 1e-3, .5)):
        seen = Rates()
        fit(learner("literal", **settings), 4, seen)
        close(seen.seen, [rate(i, top, warmup) for i in range(12)], 1e-8)
    assert [(get_recipe("robust", d).lr, get_recipe("robust", d).warmup) for d in (2, 3)] == [(.1, .03)] * 2


@row("schedule", "clip")
def cut_gradients():
    class First(Callback):
        "The gradients with which the first step is made."
        order = 60
        def before_step(self): self.seen = getattr(self, "seen", array(torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])))

    def first(**settings):
        fit(learner("literal", **settings), 1, seen := First())
        return seen.seen

    whole = first()
    for clip, right in ((None, whole), (.01, whole * .01 / np.linalg.norm(whole)), (1e3, whole)): close(first(clip=clip), right, 1e-8)
    assert .01 < np.linalg.norm(whole) < 1e3


@row("corruption", "p_inpaint")
def inpaints():
    for dims in (2, 3):
        hidden = [((m.corrupted(ramp(dims)) - ramp(dims)).abs() > 1e-4).flatten(1).float().mean(1) for m in literal_and_robust("p_inpaint", dims, p_blur=0.)]
        less_than_half = [float(((h > 0) & (h < .5)).float().sum() / (h > 0).float().sum()) for h in hidden]
        assert less_than_half[0] < .5 < less_than_half[1]                        # an inpainted crop is mostly seen, an outpainted mostly hidden
    assert [get_recipe(r, d).p_inpaint for r in ("literal", "robust") for d in (2, 3)] == [.2, .2, .9, .9]


# --- each row, once all are registered ------------------------------------------------------------------------------------

@pytest.mark.parametrize("item, setting, dims", TESTS)
def test_setting(item, setting, dims): TESTS[item, setting, dims]()
