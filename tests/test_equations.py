"The method's equations against slow readings of them in NumPy, float64, written as plain loops; and what must hold between its parts."
import math
from collections import deque
from itertools import product

import numpy as np, pytest, torch
from fastcore.basics import AttrDict
from fastai.callback.core import Callback
from hypothesis import given, settings, strategies as st
from torch import nn

from pcrl.contrast import KeyQueue, Projector, ema_update_, momentum_copy, nce_loss
from pcrl.crops import crop_loaders
from pcrl.crossmix import crossmix, mix
from pcrl.model import PCRL
from pcrl.pretrain import pretrain_learner
from pcrl.transatt import CentredTransAtt, FactoredOuterLinear, OpenTransAtt, OuterProductLinear, TransAtt
from pcrl.transforms import apply_transforms, invert_transforms, n_indicators, sample_transforms
from pcrl.unet import UNet

few = settings(deadline=None, derandomize=True, max_examples=15)
many = settings(deadline=None, derandomize=True, max_examples=60)
seeds, dimensions = st.integers(0, 2**31), st.sampled_from([2, 3])


def array(t): return t.detach().double().numpy()


def near(ours, theirs, tolerance=1e-10):
    np.testing.assert_allclose(array(ours), theirs, rtol=tolerance, atol=tolerance)


def normal(seed, *shape, requires_grad=False):
    "Normal numbers in float64."
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


def unit(seed, *shape): return nn.functional.normalize(normal(seed, *shape), dim=1)


def slope(f, x, eps=1e-5):
    "The gradient of a function of one float64 array, by central differences."
    gradient = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        there = x[at]
        x[at] = there + eps; above = f(x)
        x[at] = there - eps; below = f(x)
        x[at] = there
        gradient[at] = (above - below) / (2 * eps)
    return gradient


def wide_weights(module, seed):
    "Weights of unit variance, so that no ReLU or sigmoid sits at one end."
    for i, p in enumerate(module.parameters()): p.data = normal(seed + i, *p.shape)
    return module


def gradients_fit(f, *inputs): assert torch.autograd.gradcheck(f, inputs)


def all_gradients_fit(module, *inputs):
    "Those of every weight, and of what of the inputs has one."
    names, weights = zip(*((name, p.detach().requires_grad_()) for name, p in module.named_parameters()))
    gradients_fit(lambda *both: torch.func.functional_call(module, dict(zip(names, both[len(inputs):])), both[:len(inputs)]), *inputs, *weights)


# --- equations 1 to 4: TransAtt -------------------------------------------------------------------------------------------

def linear(W, b, x):
    return np.array([sum(W[i][j] * x[j] for j in range(len(x))) + b[i] for i in range(len(W))])


def relu(x): return np.array([max(v, 0.) for v in x])


def outer_product(W, f_p, f_l):
    "Eq. 1, and eq. 2 before its ReLU: M is built, flattened and multiplied."
    M = [[f_p[i] * f_l[j] for j in range(len(f_l))] for i in range(len(f_p))]
    flat = [M[i][j] for i in range(len(f_p)) for j in range(len(f_l))]
    return np.array([sum(row[n] * flat[n] for n in range(len(flat))) for row in W.reshape(len(W), -1)])


def full_weights(layer):
    "W of C x C x C, also of the factored form."
    if isinstance(layer, OuterProductLinear): return array(layer.weight)
    U, A, B = (array(m.weight) for m in (layer.U, layer.A, layer.B))
    W = np.zeros((len(U), A.shape[1], B.shape[1]))
    for k, i, j in np.ndindex(W.shape): W[k, i, j] = sum(U[k, r] * A[r, i] * B[r, j] for r in range(len(A)))
    return W


@few
@given(seeds, st.integers(1, 3), st.integers(1, 5), st.sampled_from([None, 1, 3]))
def test_bilinear_form_is_the_built_outer_product(seed, n, channels, rank):
    layer = OuterProductLinear(channels) if rank is None else FactoredOuterLinear(channels, rank)
    wide_weights(layer.double(), seed)
    f_p, f_l = normal(seed + 10, n, channels, requires_grad=True), normal(seed + 11, n, channels, requires_grad=True)
    near(layer(f_p, f_l), [outer_product(full_weights(layer), p, l) for p, l in zip(array(f_p), array(f_l))])
    all_gradients_fit(layer, f_p, f_l)


def gate(transatt, features, vec):
    "Eqs. 1 to 3 for one image."
    W1, b1, W2, b2 = (array(p) for p in transatt.embed.parameters())
    f_p = linear(W2, b2, relu(linear(W1, b1, vec)))
    f_l = [sum(channel.ravel()) / channel.size for channel in features]
    f_q = relu(outer_product(full_weights(transatt.outer), f_p, f_l))
    return np.array([1 / (1 + math.exp(-v)) for v in f_q])


def conv3(W, b, x):
    "A convolution with 3 voxels a side and zeros beyond the border, for one image."
    out = np.zeros((len(W), *x.shape[1:]))
    for c_out, *at in np.ndindex(out.shape):
        out[(c_out, *at)] = b[c_out]
        for c_in, *k in np.ndindex(W.shape[1:]):
            there = [a + i - 1 for a, i in zip(at, k)]
            if all(0 <= t < n for t, n in zip(there, x.shape[1:])): out[(c_out, *at)] += W[(c_out, c_in, *k)] * x[(c_in, *there)]
    return out


@few
@given(seeds, dimensions, st.integers(1, 2), st.integers(1, 4), st.sampled_from([None, 2]), st.data())
def test_transatt(seed, dims, n, channels, rank, data):
    size = data.draw(st.tuples(*[st.integers(1, 3)] * dims))
    layer = wide_weights(TransAtt(channels, n_indicators(dims), dims, rank).double(), seed)
    features = normal(seed + 20, n, channels, *size, requires_grad=True)
    vec = sample_transforms(n, dims, torch.Generator().manual_seed(seed)).double()
    gates = [gate(layer, x, v) for x, v in zip(array(features), array(vec))]
    near(layer.gate(features, vec), gates)
    weighed = [np.array([w * channel for w, channel in zip(f_w, x)]) for f_w, x in zip(gates, array(features))]
    near(layer(features, vec), [conv3(array(layer.conv.weight), array(layer.conv.bias), x) for x in weighed])
    assert layer(features, vec).shape == features.shape
    all_gradients_fit(layer, features, vec)


def layer_norm(norm, x):
    gain, shift = (array(p) for p in norm.parameters())
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    return np.array([g * (v - mean) / deviation + s for g, v, s in zip(gain, x, shift)])


def centred(transatt, features, vec):
    "Eqs. 1 and 2 before its ReLU for one image, f^p less its mean over all transforms, f^p and f^l normalised. A flip in y is one in x and half a turn."
    W1, b1, W2, b2 = (array(p) for p in transatt.embed.parameters())
    embed = lambda v: linear(W2, b2, relu(linear(W1, b1, v)))
    every = [(x, 0., *z, *(float(k == turn) for k in range(4))) for x in (0., 1.) for z in ([(0.,), (1.,)] if len(vec) == 7 else [()]) for turn in range(4)]
    common = sum(embed(v) for v in every) / len(every)
    f_l = [sum(channel.ravel()) / channel.size for channel in features]
    return outer_product(full_weights(transatt.outer), layer_norm(transatt.norm_p, embed(vec) - common), layer_norm(transatt.norm_l, f_l))


@few
@given(seeds, dimensions, st.integers(1, 2), st.integers(2, 3), st.sampled_from([None, 2]),
       st.sampled_from([(CentredTransAtt, lambda v: 1 / (1 + math.exp(-max(v, 0.)))), (OpenTransAtt, lambda v: 2 / (1 + math.exp(-v)))]), st.data())
def test_centred_transatt(seed, dims, n, channels, rank, kind, data):
    size = data.draw(st.tuples(*[st.integers(1, 2)] * dims))
    layer = wide_weights(kind[0](channels, n_indicators(dims), dims, rank).double(), seed)
    features, direction = normal(seed + 20, n, channels, *size, requires_grad=True), normal(seed + 21, n, channels, *size)
    vec = sample_transforms(n, dims, torch.Generator().manual_seed(seed)).double()
    gates = lambda xs: [np.array([kind[1](v) for v in centred(layer, x, one)]) for x, one in zip(xs, array(vec))]
    conv = array(layer.conv.weight), array(layer.conv.bias)
    told = lambda xs: np.stack([conv3(*conv, np.stack([w * channel for w, channel in zip(f_w, x)])) for f_w, x in zip(gates(xs), xs)])
    near(layer.gate(features, vec), gates(array(features)))
    near(layer(features, vec), told(array(features)))
    by_features, = torch.autograd.grad((layer(features, vec) * direction).sum(), features)
    near(by_features, slope(lambda xs: (told(xs) * array(direction)).sum(), array(features).copy()), 1e-5)
    all_gradients_fit(layer, features, vec)


def test_gates_of_both_signs_occur():
    "The test above would not see a missing ReLU if f^q were never negative."
    layer = wide_weights(TransAtt(4, 6, 2).double(), 0)
    f_w = layer.gate(normal(1, 64, 4, 2, 2), sample_transforms(64, 2, torch.Generator().manual_seed(0)).double())
    assert (f_w == .5).any() and (f_w > .6).any()


# --- equations 5 and 6 ----------------------------------------------------------------------------------------------------

def mixed(x_o, x_m, lam):
    out = np.zeros_like(x_o)
    for at in np.ndindex(out.shape): out[at] = lam[at[0]] * x_o[at] + (1 - lam[at[0]]) * x_m[at]
    return out


@many
@given(seeds, dimensions, st.integers(1, 3), st.integers(1, 3))
def test_mixing(seed, dims, n, levels):
    lam = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    shapes = [(n, 1 + i, *[2 * (levels - i)] * dims) for i in range(levels)]
    pyramid_o, pyramid_m = ([normal(seed + 9 * which + i, *shape, requires_grad=True) for i, shape in enumerate(shapes)]
                            for which in (0, 1))
    oracle = [mixed(array(o), array(m), array(lam)) for o, m in zip(pyramid_o, pyramid_m)]
    near(mix(pyramid_o[0], pyramid_m[0], lam), oracle[0])
    for ours, theirs in zip(crossmix(pyramid_o, pyramid_m, lam), oracle, strict=True): near(ours, theirs)
    small = pyramid_o[-1], pyramid_m[-1], lam
    gradients_fit(mix, *small)


# --- the projector and equation 7 -----------------------------------------------------------------------------------------

def batch_norm(gain, shift, rows):
    mean = sum(rows) / len(rows)
    deviation = np.sqrt(sum((row - mean) ** 2 for row in rows) / len(rows) + 1e-5)
    return [gain * (row - mean) / deviation + shift for row in rows]


def projected(weights, images):
    "Pooling, FC, BatchNorm if it has weights, ReLU, FC, and then length 1."
    rows = [np.array([sum(c.ravel()) / c.size for c in image]) for image in images]
    W1, *between, W2, b2 = weights
    if len(between) == 1: hidden = [linear(W1, between[0], row) for row in rows]
    else: hidden = batch_norm(*between, [linear(W1, np.zeros(len(W1)), row) for row in rows])
    rows = [linear(W2, b2, relu(row)) for row in hidden]
    return np.stack([row / math.sqrt(sum(v * v for v in row)) for row in rows])


@few
@given(seeds, dimensions, st.integers(3, 4), st.integers(1, 4), st.integers(2, 4), st.sampled_from([None, "batch"]))
def test_projector(seed, dims, n, channels, dim, norm):
    "Its norm is taken in float32, so that only that much agrees; the gradients are those of the slow reading."
    projector = wide_weights(Projector(channels, dim, norm), seed).float()
    x, direction = normal(seed + 15, n, channels, *[2] * dims).float().requires_grad_(), normal(seed + 16, n, dim)
    read = [array(p).copy() for p in projector.layers.parameters()] + [array(x).copy()]
    oracle = lambda: projected(read[:-1], read[-1])
    g = projector(x)
    near(g, oracle(), 1e-4)
    inputs = [*projector.layers.parameters(), x]
    for ours, theirs in zip(torch.autograd.grad((g * direction).sum(), inputs), read, strict=True):
        near(ours, slope(lambda _: (oracle() * array(direction)).sum(), theirs), 1e-3)


def info_nce(q, k, queue, tau, positive_in_denominator):
    "Eq. 7, the mean over a batch."
    dot = lambda a, b: sum(a[i] * b[i] for i in range(len(a)))
    losses = []
    for g_o, g_m in zip(q, k):
        positive = math.exp(dot(g_o, g_m) / tau)
        below = sum(math.exp(dot(g_o, key) / tau) for key in queue) + (positive if positive_in_denominator else 0)
        losses.append(-math.log(positive / below))
    return sum(losses) / len(losses)


@many
@given(seeds, st.integers(1, 4), st.integers(2, 6), st.integers(1, 9), st.sampled_from([.05, .2, 1.]), st.booleans())
def test_contrastive_loss(seed, n, dim, keys, tau, positive_in_denominator):
    "The loss is computed in float32, whatever it is given."
    q, k, queue = (unit(seed + i, rows, dim) for i, rows in enumerate((n, n, keys)))
    oracle = lambda q_, k_: info_nce(q_, k_, array(queue), tau, positive_in_denominator)
    ours_q, ours_k = q.clone().float().requires_grad_(), k.clone().float().requires_grad_()
    loss = nce_loss(ours_q, ours_k, queue.float(), tau, positive_in_denominator)
    near(loss, oracle(array(q), array(k)), 1e-5 / tau)
    by_q, by_k = torch.autograd.grad(loss, (ours_q, ours_k))
    near(by_q, slope(lambda x: oracle(x, array(k)), array(q).copy()), 1e-5 / tau)
    near(by_k, slope(lambda x: oracle(array(q), x), array(k).copy()), 1e-5 / tau)


def test_paper_is_the_form_without_the_positive_and_tau_a_fifth():
    q, k, queue = (unit(i, 3, 4) for i in range(3))
    near(nce_loss(q, k, queue), info_nce(array(q), array(k), array(queue), .2, False), 1e-5)


# --- equation 8 and the total ---------------------------------------------------------------------------------------------

def preservation(reconstructions, targets):
    "Eq. 8: the three terms, each a mean squared error."
    n, terms = len(targets) // 3, []
    for path in range(3):
        errors = [(reconstructions[at] - targets[at]) ** 2 for at in np.ndindex(targets.shape) if at[0] // n == path]
        terms.append(sum(errors) / len(errors))
    return terms


@few
@given(seeds, dimensions, st.integers(1, 2), st.integers(0, 5), st.tuples(st.floats(.1, 2), st.floats(.1, 2)), st.booleans())
def test_loss(seed, dims, n, keys, weights, positive_in_denominator):
    model = PCRL(dims, width=4, queue_size=8, projection=4, contrast_weight=weights[0], reconstruction_weight=weights[1],
                 positive_in_denominator=positive_in_denominator)
    reconstructions, targets = (normal(seed + i, 3 * n, 1, *[2] * dims).float() for i in range(2))
    q, k, pushed = (unit(seed + 2 + i, rows, 4).float() for i, rows in enumerate((n, n, keys)))
    if keys: model.queue.push(pushed)
    r, g = reconstructions.clone().requires_grad_(), q.clone().requires_grad_()
    terms = model.loss(AttrDict(reconstructions=r, g_o=g, g_m=k), AttrDict(targets=targets))

    def total(r_, q_):
        contrast = info_nce(q_, array(k), array(pushed), .2, positive_in_denominator) if keys else 0.
        parts = preservation(r_, array(targets))
        return weights[0] * contrast + weights[1] * sum(parts), contrast, sum(parts), *parts
    names = "loss", "contrast", "reconstruction", "reconstruction_o", "reconstruction_m", "reconstruction_h"
    for name, value in zip(names, total(array(r), array(q)), strict=True): near(terms[name], value, 2e-5)
    terms.loss.backward()
    near(r.grad, slope(lambda x: total(x, array(q))[0], array(r).copy()), 2e-4)
    near(g.grad, slope(lambda x: total(array(r), x)[0], array(q).copy()), 2e-4)


def test_weights_of_the_paper():
    recipe = PCRL(2, width=4, queue_size=8).recipe
    assert (recipe.contrast_weight, recipe.reconstruction_weight) == (.5, .5)
    assert (recipe.tau, recipe.beta, recipe.positive_in_denominator) == (.2, .99, False)


# --- equation 9 -----------------------------------------------------------------------------------------------------------

@few
@given(seeds, dimensions, st.integers(1, 12), st.sampled_from([0., .5, .99, 1.]))
def test_moving_average_is_its_closed_form(seed, dims, steps, beta):
    "After n steps: beta^n of the start, and (1 - beta) beta^(n - 1 - t) of the ordinary weights of step t; running statistics too."
    conv, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
    ordinary = nn.Sequential(conv(1, 2, 3), norm(2)).double()
    momentum = momentum_copy(ordinary)
    state = lambda module: {name: array(v).copy() for name, v in module.state_dict().items()}
    start, history = state(momentum), []
    for t in range(steps):
        x = normal(seed + t, 4, 1, *[3] * dims)
        ordinary(x)
        momentum(x)                                                        # moves no running statistic of its own
        for i, p in enumerate(ordinary.parameters()): p.data += normal(seed + 99 * t + i, *p.shape)
        history.append(state(ordinary))
        ema_update_(momentum, ordinary, beta)
    for name, v in state(momentum).items():
        closed = beta**steps * start[name] + sum((1 - beta) * beta**(steps - 1 - t) * history[t][name] for t in range(steps))
        np.testing.assert_allclose(v, steps if name.endswith("num_batches_tracked") else closed, rtol=1e-9, atol=1e-9)
    assert all((state(ordinary)[name] == history[-1][name]).all() for name in start)
    assert {"1.running_mean", "1.running_var"} <= start.keys()


# --- the queue ------------------------------------------------------------------------------------------------------------

@many
@given(seeds, st.integers(1, 12), st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(0, 20))
def test_queue_is_a_deque(seed, size, batches, reloaded_at):
    "Over many pushes: wrap-around, batches longer than what is left, and longer than the queue; stored and loaded between."
    queue, plain, count = KeyQueue(size, 2), deque(maxlen=size), 0
    for step, n in enumerate(batches):
        keys = normal(seed + step, n, 2).float()
        queue.push(keys); plain.extend(keys); count += n
        if step == reloaded_at:
            loaded = KeyQueue(size, 2)
            loaded.load_state_dict(queue.state_dict())
            queue = loaded
        assert len(queue.keys) == len(plain) == min(count, size)
        if plain: assert sorted(map(tuple, queue.keys.tolist())) == sorted(tuple(key.tolist()) for key in plain)
        for age, key in enumerate(reversed(plain)): assert (queue.rows[(count - 1 - age) % size] == key).all()


# --- what must hold between the parts -------------------------------------------------------------------------------------

def step(dims, seed=0, n=2, training=True, **settings):
    "A tiny model, the views of one step and its outputs, in float64 where the code allows it."
    torch.manual_seed(seed)
    model = PCRL(dims, width=4, queue_size=12, projection=8, **settings).double().train(training)
    for p in model.momentum.parameters(): p.add_(.1 * torch.randn(p.shape))  # after some steps it is another encoder
    crops = torch.rand(n, 2, 1, *[32 if dims == 2 else 16] * dims)
    views = model.views(crops, torch.Generator().manual_seed(seed))
    views = AttrDict({name: v.double() for name, v in views.items()})
    model.queue.push(nn.functional.normalize(torch.randn(12, 8), dim=1))
    return model, views, model(views)


@pytest.mark.parametrize("dims", [2, 3])
def test_one_decoder_call_is_three(dims):
    """In evaluation mode, where BatchNorm treats every sample for itself. In training its statistics are those of all 3B samples,
    so that the three paths share them: that is the method's one call, and differs from three."""
    torch.manual_seed(0)
    net = UNet(dims, width=4).double()
    side = 64 if dims == 2 else 16
    pyramids = [net.encoder(i * torch.rand(2, 1, *[side] * dims, dtype=torch.float64)) for i in (1, 2, 3)]
    stacked = [torch.cat(maps) for maps in zip(*pyramids)]
    three = lambda: torch.cat([net.decoder(p) for p in pyramids])
    assert not torch.allclose(net.decoder(stacked), three(), rtol=1e-3)
    net.eval()
    near(net.decoder(stacked), array(three()), 1e-9)


@pytest.mark.parametrize("dims", [2, 3])
def test_paths_are_what_the_equations_name(dims):
    "Each third of the outputs, built path by path from the parts, and every gradient of the encoder; in evaluation mode, as above."
    model, views, out = step(dims, training=False)
    F_o, F_m = model.ordinary.encoder(views.corrupt_o), model.momentum.encoder(views.corrupt_m)
    F_h = [torch.stack([l * o + (1 - l) * m for l, o, m in zip(views.lam, level_o, level_m)]) for level_o, level_m in zip(F_o, F_m)]
    paths = (model.ordinary, F_o, views.vec_o, "g_o"), (model.momentum, F_m, views.vec_m, "g_m"), (model.ordinary, F_h, views.vec_h, "g_h")
    images, embeddings = [], []
    for branch, pyramid, vec, g in paths:
        deepest = branch.transatt(pyramid[-1], vec)
        images.append(torch.sigmoid(model.decoder([*pyramid[:-1], deepest])))
        embeddings.append(branch.projector(deepest))
        near(out[g], array(embeddings[-1]), 1e-6)
    near(out.reconstructions, array(torch.cat(images)), 1e-9)
    near(model.reconstruct(views.corrupt_o, views.vec_o), array(images[0]), 1e-9)
    plain = {f"reconstruction_{path}": (image - target).square().mean() for path, image, target in zip("omh", images, views.targets.chunk(3))}
    plain["contrast"], terms = nce_loss(embeddings[0], embeddings[1].detach(), model.queue.keys), model.loss(out, views)
    gradients = lambda term: torch.autograd.grad(term, list(model.encoder.parameters()), retain_graph=True, materialize_grads=True)
    for name in plain:
        for ours, theirs in zip(gradients(terms[name]), gradients(plain[name]), strict=True):
            assert theirs.any() == (name != "reconstruction_m")
            near(ours, array(theirs), 1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("dims", [2, 3])
def test_every_path_has_transforms_of_its_own(dims):
    "T_o, T_m and T_h are drawn apart, and so are the turns of the two clean crops, here of one and the same crop."
    model = PCRL(dims, width=4, queue_size=8)
    crop = torch.rand(64, 1, 1, *[8] * dims)
    views = model.views(torch.cat([crop, crop], 1), torch.Generator().manual_seed(0))
    differ = lambda a, b: float((a != b).flatten(1).any(1).float().mean())
    for a, b in (("vec_o", "vec_m"), ("vec_o", "vec_h"), ("vec_m", "vec_h"), ("clean_o", "clean_m")): assert differ(views[a], views[b]) > .7


@pytest.mark.parametrize("dims", [2, 3])
def test_targets_are_the_transformed_clean_crops(dims):
    _, views, _ = step(dims)
    clean_h = torch.stack([l * o + (1 - l) * m for l, o, m in zip(views.lam, views.clean_o, views.clean_m)])
    for i, (clean, vec) in enumerate(((views.clean_o, views.vec_o), (views.clean_m, views.vec_m), (clean_h, views.vec_h))):
        near(views.targets[2 * i:2 * i + 2], [turned(array(x), v) for x, v in zip(clean, vec.tolist())], 1e-6)


def reached(module): return [p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters()]


@pytest.mark.parametrize("dims", [2, 3])
def test_momentum_path_gets_no_gradient(dims):
    model, views, out = step(dims)
    model.loss(out, views).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.momentum.parameters())
    assert not out.g_m.requires_grad and not model.queue.rows.requires_grad
    assert any(reached(model.ordinary.encoder)) and any(reached(model.ordinary.transatt)) and any(reached(model.decoder))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("path, encoder, decoder", [("o", True, True), ("m", False, True), ("h", True, True), ("contrast", True, False)])
def test_what_each_term_reaches(dims, path, encoder, decoder, training):
    "In training with a call of the decoder for each path: in one call BatchNorm's shared statistics tie the paths together."
    model, views, out = step(dims, training=training, decode_together=not training)
    terms = model.loss(out, views)
    (terms.contrast if path == "contrast" else terms[f"reconstruction_{path}"]).backward()
    assert any(reached(model.ordinary.encoder)) == encoder and any(reached(model.decoder)) == decoder
    assert not any(reached(model.momentum))
    assert any(reached(model.ordinary.projector)) == (path == "contrast")


@pytest.mark.parametrize("lam, encoder", [(0., False), (1., True)])
def test_hybrid_gradient_goes_by_lam(lam, encoder):
    "At lam 0 the hybrid features are the momentum encoder's, and nothing flows back; the ordinary TransAtt attends them all the same."
    model, views, _ = step(2, training=False)
    views.lam = torch.full_like(views.lam, lam)
    model.loss(model(views), views).reconstruction_h.backward()
    assert any(reached(model.ordinary.encoder)) == encoder and any(reached(model.ordinary.transatt))


@pytest.mark.parametrize("dims", [2, 3])
def test_finish_step(dims):
    "Eq. 9 with the recipe's beta, and g_o, g_m, g_h into the queue, in this order."
    model, views, out = step(dims, beta=.9)
    with torch.no_grad():
        for p in model.ordinary.parameters(): p.add_(1)
    before = {name: v.clone() for name, v in model.momentum.state_dict().items()}
    model.finish_step(out)
    for name, v in model.momentum.state_dict().items():
        if v.is_floating_point(): near(v, .9 * array(before[name]) + .1 * array(model.ordinary.state_dict()[name]), 1e-9)
    near(model.queue.keys[:6], array(torch.cat([out.g_o, out.g_m, out.g_h])), 1e-6)
    assert not model.queue.rows.requires_grad


class Moved(Callback):
    "After each step, once the method has done its part: the momentum weights against eq. 9 of those before it and the ordinary ones as they are now."
    order = 11
    def before_batch(self): self.old = [p.clone() for p in self.model.momentum.parameters()], [p.detach().clone() for p in self.model.ordinary.parameters()]

    def after_step(self):
        (momentum, ordinary), beta = self.old, self.model.recipe.beta
        assert any((o != p).any() for o, p in zip(ordinary, self.model.ordinary.parameters()))
        for old, m, o in zip(momentum, self.model.momentum.parameters(), self.model.ordinary.parameters(), strict=True): near(m, beta * array(old) + (1 - beta) * array(o), 1e-6)


def test_average_and_keys_come_after_the_optimiser():
    images = list(np.random.default_rng(0).integers(0, 256, (4, 1, 16, 16, 16), dtype=np.uint8))
    learn = pretrain_learner(crop_loaders(images, images, size=16, bs=2, device="cpu", scales=(1.,)), 3, width=4, projection=8, beta=.5)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Moved())
    assert learn.model.queue.pushed == 2 * 3 * 2


# --- transforms -----------------------------------------------------------------------------------------------------------

def turned(image, vec):
    "T of one image (C, [D,] H, W): flips of x, y and z, then a rotation from the y axis towards the x axis."
    for axis, on in zip((-1, -2, -3), vec[:-4]):
        if on: image = np.flip(image, axis)
    return np.rot90(image, [k for k in range(4) if vec[k - 4]][0], axes=(-2, -1))


@few
@given(seeds, dimensions, st.integers(1, 2), st.integers(1, 6), st.integers(1, 4))
def test_every_indicator_vector_is_numpys_flips_and_turns(seed, dims, channels, side, depth):
    sets = [(*flips, *(float(k == turn) for k in range(4))) for flips in product((0., 1.), repeat=dims) for turn in range(4)]
    vec = torch.tensor(sets)
    assert vec.shape == (2**dims * 4, n_indicators(dims))
    size = (side, side) if dims == 2 else (depth, side, side)
    x = normal(seed, len(sets), channels, *size)
    near(apply_transforms(x, vec), [turned(image, v) for image, v in zip(array(x), sets)], 0)
    near(invert_transforms(apply_transforms(x, vec), vec), array(x), 0)


@few
@given(seeds, dimensions, st.integers(1, 5), st.integers(1, 5))
def test_half_turns_of_planes_that_are_not_square(seed, dims, height, width):
    sets = [(*flips, *(float(k == turn) for k in range(4))) for flips in product((0., 1.), repeat=dims) for turn in (0, 2)]
    x = normal(seed, len(sets), 1, *([3, height, width][3 - dims:]))
    near(apply_transforms(x, torch.tensor(sets)), [turned(image, v) for image, v in zip(array(x), sets)], 0)
