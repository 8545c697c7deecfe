"""The models of hf_models as Hugging Face's Flax classes, with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peers import hf_models

pytest.importorskip("flax")
transformers = hf_models.transformers
if int(transformers.__version__.split(".")[0]) > 4:
    pytest.skip("transformers 5 has no Flax", allow_module_level=True)

MODELS = {
    "bert": "FlaxBertForSequenceClassification",
    "gpt2": "FlaxGPT2LMHeadModel",
    "llama": "FlaxLlamaForCausalLM",
    "vit": "FlaxViTForImageClassification",
}


def function(family):
    """``fn(params, x)`` with x the token ids or the pixels, and the params."""
    from transformers.modeling_flax_pytorch_utils import (
        convert_pytorch_state_dict_to_flax,
    )

    source = hf_models.build(family, "eager")
    kind = getattr(transformers, MODELS[family])
    model = kind(source.config, dtype=jnp.float64)
    states = {name: value.clone() for name, value in source.state_dict().items()}
    params = convert_pytorch_state_dict_to_flax(states, model)
    if family == "gpt2":
        del params["lm_head"]  # tied to the embedding
    assert jax.tree.structure(params) == jax.tree.structure(model.params)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)
    is_decoder = hf_models.FAMILIES[family].score is hf_models.last_token

    def fn(params, x):
        logits = model(x, params=params, train=False).logits
        return (logits[:, -1] if is_decoder else logits).max(-1)

    return fn, params
