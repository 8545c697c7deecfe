"""DynamicLRP's own rules, slowly: layer by layer, example by example, dense kernels.

The formulas are those of "DynamicLRP's own rules" in RULES.md. What they leave open was
settled by reading the reference engine (keeinlev/dynamicLRP, `src/lrp_engine`):
- its epsilon is written 10e-12, that is 1e-11; sign(0) counts as +1, and the absolute
  splits add it without a sign;
- a bias is an addition of its own: `R |z0| / (|z0| + |b| + eps)` goes on, whatever the
  signs of z0 and b; what the bias gets is lost. Without a bias there is no such step;
- gamma comes after that step, with the bias-free z0 in its masks and denominators;
- a sum of two active values is split by |a| : |b| element by element, a mean over axes
  by |a_i| within the mean; a residual's input gets the sum of its branches' relevance;
- a concatenation hands each piece its own relevance (autograd's split): each element
  of it is a sum of one term, so the absolute split would change nothing;
- batch norm is a layer of its own that passes, also right after a convolution: nothing
  is merged. Its shift takes no share, unlike the bias of a convolution;
- activations pass; max pooling sends everything to the winner;
- windowed average pooling has no rule there (the fallback returns relevance of the
  wrong shape); adaptive average pooling gives equal shares. RULES.md takes equal shares
  for windows; a mean over axes, as JAX spells global pooling, is the split above;
- it starts from relevance 1, not from the logit. Relevance is linear in its start, so
  here it starts as everywhere else in jlrp, from the logit.
"""

import numpy as np

from peers import jax_networks
from peers import networks as nets

EPSILON = 1e-11


def relevance(network, values, x, target=None, gamma_conv=None, gamma_dense=None):
    """Relevance shaped like x, of the class `target` or of each example's arg-max."""
    gammas = {nets.Conv: gamma_conv, nets.Dense: gamma_dense}
    explained = [_explain(network, values, one, target, gammas) for one in x]
    return np.stack(explained)


def _explain(network, values, x, target, gammas):
    params = jax_networks.params(network, values, "NCHW")
    scores, steps = _forward(network.layers, params, x)
    seed = np.zeros_like(scores)
    index = scores.argmax() if target is None else target
    seed[index] = scores[index]
    return _backward(steps, params, seed, gammas)


def _forward(layers, params, x):
    """The result, and for every layer: itself, its input, its branches' steps."""
    steps = []
    for layer in layers:
        inside = [_forward(branch, params, x) for branch in nets.branches(layer)]
        steps.append((layer, x, inside))
        x = _run(layer, params, x)
    return x, steps


def _run(layer, params, x):
    batch_norm = jax_networks.BATCH_NORMS["torch"]
    return np.asarray(
        jax_networks.run((layer,), params, x[None], "NCHW", batch_norm)[0]
    )


def _backward(steps, params, relevance, gammas):
    for layer, x, inside in reversed(steps):
        match layer:
            case nets.Conv() | nets.Dense():
                relevance = _affine(
                    layer, params[layer.name], x, relevance, gammas[type(layer)]
                )
            case nets.Pool():
                relevance = _pool(layer, x, relevance)
            case nets.GlobalAveragePool():
                relevance = _share(x, relevance[:, None, None], axis=(1, 2))
            case nets.Flatten():
                relevance = relevance.reshape(x.shape)
            case nets.Residual():
                parts = np.stack([result for result, _ in inside])
                parts = _share(parts, relevance, axis=0)
                relevance = _into_branches(inside, params, parts, gammas)
            case nets.Concatenate():
                sizes = [len(result) for result, _ in inside]
                parts = np.split(relevance, np.cumsum(sizes)[:-1])
                relevance = _into_branches(inside, params, parts, gammas)
            case nets.Activation() | nets.BatchNorm():
                pass
    return relevance


def _into_branches(inside, params, parts, gammas):
    pairs = zip(inside, parts, strict=True)
    return sum(_backward(steps, params, part, gammas) for (_, steps), part in pairs)


def _share(values, relevance, axis):
    shares = np.abs(values)
    return shares / (shares.sum(axis, keepdims=True) + EPSILON) * relevance


def _stabilised(z):
    return z + EPSILON * np.where(z < 0, -1.0, 1.0)


def _affine(layer, params, x, relevance, gamma):
    kernel, bias = _dense_kernel(layer, params, x.shape)
    shape, x, relevance = x.shape, x.ravel(), relevance.ravel()
    z0 = x @ kernel
    if bias is not None:
        relevance = relevance * np.abs(z0) / (np.abs(z0) + np.abs(bias) + EPSILON)
    if gamma is None:
        return (x * (kernel @ (relevance / _stabilised(z0)))).reshape(shape)
    products = x[:, None] * kernel
    positive = products + gamma * np.maximum(products, 0.0)
    negative = products + gamma * np.minimum(products, 0.0)
    above = relevance * (z0 > 0) / (positive.sum(0) + EPSILON)
    below = relevance * ~(z0 > 0) / _stabilised(negative.sum(0))
    return (positive @ above + negative @ below).reshape(shape)


def _dense_kernel(layer, params, shape):
    """(inputs, outputs), from unit vectors; and the bias of every output, or None."""
    units = np.eye(int(np.prod(shape)))
    if isinstance(layer, nets.Dense):
        kernel = np.asarray(params["kernel"])
        return kernel, np.asarray(params["bias"])
    responses = jax_networks.convolution(
        layer, params["kernel"], units.reshape(-1, *shape), "NCHW"
    )
    responses = np.asarray(responses)
    kernel = responses.reshape(len(units), -1)
    if not layer.bias:
        return kernel, None
    bias = np.asarray(params["bias"])[:, None, None]
    return kernel, np.broadcast_to(bias, responses.shape[1:]).ravel()


def _pool(layer, x, relevance):
    result = np.zeros_like(x)
    for channel, row, column in np.ndindex(relevance.shape):
        top, left = row * layer.stride, column * layer.stride
        window = (
            channel,
            slice(top, top + layer.window),
            slice(left, left + layer.window),
        )
        share = np.full((layer.window,) * 2, layer.window**-2)
        if layer.kind == "max":
            share = np.zeros_like(share)
            share.flat[x[window].argmax()] = 1.0
        result[window] += share * relevance[channel, row, column]
    return result
