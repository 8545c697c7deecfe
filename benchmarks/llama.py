"""A network of Llama's kind in plain JAX: any size, its layers in a row or scanned.

RMS norms, rotary positions, grouped queries, SwiGLU, a causal mask; it explains token
embeddings (batch, length, width) and gives the scores of the token behind the last.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Llama:
    """Sizes; ``scanned``: the layers' parameters are stacked, and a scan runs them."""

    layers: int = 6
    width: int = 768
    heads: int = 12
    kv_heads: int = 4
    hidden: int = 2048
    vocabulary: int = 32000
    rope_theta: float = 10000.0
    scanned: bool = False
    tied: bool = False  # the head is the table of the embeddings

    @property
    def head(self):
        return self.width // self.heads

    def shapes(self, dtype=np.float32):
        """Parameters as a tree of shapes: kernels (in, out), scales (width,)."""
        stack = (self.layers,) if self.scanned else ()

        def leaf(name, *shape):
            return {name: jax.ShapeDtypeStruct((*stack, *shape), dtype)}

        layer = {
            "attention_norm": leaf("scale", self.width),
            "query": leaf("kernel", self.width, self.heads * self.head),
            "key": leaf("kernel", self.width, self.kv_heads * self.head),
            "value": leaf("kernel", self.width, self.kv_heads * self.head),
            "out": leaf("kernel", self.heads * self.head, self.width),
            "ffn_norm": leaf("scale", self.width),
            "gate": leaf("kernel", self.width, self.hidden),
            "up": leaf("kernel", self.width, self.hidden),
            "down": leaf("kernel", self.hidden, self.width),
        }
        stack = ()
        head = leaf("embedding", self.vocabulary, self.width)
        return {
            "layers": layer if self.scanned else [layer] * self.layers,
            "norm": leaf("scale", self.width),
            "head": head if self.tied else leaf("kernel", self.width, self.vocabulary),
        }

    def __call__(self, params, x):
        """Scores (batch, vocabulary) of embeddings (batch, length, width)."""
        if self.scanned:

            def step(x, layer):
                return _layer(self, layer, x), None

            x, _ = jax.lax.scan(step, x, params["layers"])
        else:
            for layer in params["layers"]:
                x = _layer(self, layer, x)
        x = _rms_norm(x, params["norm"])[:, -1]
        if self.tied:
            return x @ params["head"]["embedding"].T
        return x @ params["head"]["kernel"]


def _layer(sizes, layer, x):
    y = _rms_norm(x, layer["attention_norm"])
    x = x + _attention(sizes, layer, y) @ layer["out"]["kernel"]
    y = _rms_norm(x, layer["ffn_norm"])
    gate = jax.nn.silu(y @ layer["gate"]["kernel"])
    return x + (gate * (y @ layer["up"]["kernel"])) @ layer["down"]["kernel"]


def _rms_norm(x, layer):
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype) * layer["scale"]


def _attention(sizes, layer, x):
    batch, length, _ = x.shape
    heads = {
        name: (x @ layer[name]["kernel"]).reshape(batch, length, -1, sizes.head)
        for name in ("query", "key", "value")
    }
    query = _rotated(heads["query"], sizes.rope_theta)
    key = _rotated(heads["key"], sizes.rope_theta)
    query = query.reshape(batch, length, sizes.kv_heads, -1, sizes.head)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", query, key)
    scores = scores / np.asarray(np.sqrt(sizes.head), x.dtype)
    causal = np.tril(np.ones((length, length), bool))
    scores = jnp.where(causal, scores, np.asarray(-1e9, x.dtype))
    weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(x.dtype)
    y = jnp.einsum("bkgqs,bskd->bqkgd", weights, heads["value"])
    return y.reshape(batch, length, -1)


def _rotated(x, theta):
    """Rotary positions: halves of each head turned by an angle that grows."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None, None] * theta ** -(np.arange(half) / half)
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
