"""The Flax models of transformers, found in the library's own tables."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .entry import Entry, Subject, normal, random_variables, tokens
from .shims import SHIMS

GROUP = "transformers"
_VOCABULARY = 83
# Tiny values for whatever field a configuration has. Sizes differ from each other, so
# that no two axes are mistaken for one another.
_TINY: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "type_vocab_size": 3,
    "max_position_embeddings": 32,
    "n_positions": 32,
    "n_ctx": 32,
    "embedding_size": 20,
    "hidden_size": 24,
    "d_model": 24,
    "n_embd": 24,
    "dim": 24,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "n_layers": 1,
    "n_layer": 1,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_decoder_layers": 1,
    "num_attention_heads": 3,
    "num_heads": 3,
    "attention_heads": 3,
    "n_heads": 3,
    "n_head": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "intermediate_size": 40,
    "hidden_dim": 40,
    "d_ff": 40,
    "ffn_dim": 40,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "d_kv": 7,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
_OWN: dict[str, dict[str, Any]] = {
    "albert": {"num_hidden_layers": 2, "num_hidden_groups": 2},
    "big_bird": {"block_size": 2, "num_random_blocks": 1},
    # With other numbers of heads it calls jnp.cat, which never was.
    "bloom": {"n_head": 4, "num_attention_heads": 4},
    "gemma": {"num_key_value_heads": 1, "head_dim": 10},
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "gptj": {"rotary_dim": 4},
    "llama": {"num_key_value_heads": 3},
    "longt5": {"local_radius": 3, "encoder_attention_type": "transient-global"},
    "mistral": {"num_key_value_heads": 1},
    "opt": {"word_embed_proj_dim": 20},
    "regnet": {
        "embedding_size": 8,
        "hidden_sizes": [12, 18],
        "depths": [1, 2],
        "groups_width": 6,
        "layer_type": "y",
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [12, 20], "depths": [1, 2]},
    "wav2vec2": {
        "do_stable_layer_norm": True,
        "feat_extract_norm": "layer",
        "conv_dim": [10, 12],
        "conv_kernel": [5, 2],
        "conv_stride": [3, 2],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "codevector_dim": 8,
        "proj_codevector_dim": 8,
        "mask_time_length": 2,
        "num_codevectors_per_group": 6,
    },
    "whisper": {"num_mel_bins": 10, "max_source_positions": 12},
}
_NON_SQUARE = (8, 32)  # as many patches as 16x16

# Tables of the library, the richest heads first: a model is taken with the first head
# that it has.
_HEADS = (
    "FLAX_MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "FLAX_MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "FLAX_MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "FLAX_MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "FLAX_MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "FLAX_MODEL_MAPPING_NAMES",
)


def entries() -> list[Entry]:
    """One entry for every model type that the library has a Flax class for."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported
    import transformers
    from transformers.models.auto import modeling_flax_auto as tables

    transformers.utils.logging.set_verbosity_error()  # Flax classes are deprecated
    classes: dict[str, str] = {}
    for table in _HEADS:
        for kind, name in getattr(tables, table).items():
            classes.setdefault(kind, name)
    kinds = {name: kind for kind, name in classes.items()}  # GPT-2 has two types
    configs: dict[str, Callable[[], Any]] = {
        name: functools.partial(_config, kind) for name, kind in kinds.items()
    }
    configs |= {k: functools.partial(make, k) for k, make in _COMPOSED.items()}
    return [
        Entry(
            name.removeprefix("Flax"),
            GROUP,
            functools.partial(_build, name, configure),
            SHIMS.get(name, contextlib.nullcontext),
        )
        for name, configure in sorted(configs.items())
    ]


def _config(kind: str, **changes: Any) -> Any:
    """The tiny configuration of a model type."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    fields = set(vars(cls())) | set(cls.attribute_map)
    own = _OWN.get(kind.replace("-", "_"), {})
    tiny = {name: value for name, value in _TINY.items() if name in fields}
    return cls(**{**tiny, **own, **changes})


def _build(name: str, configure: Callable[[], Any]) -> Subject:
    """The linen module within a model, and what the library calls it with."""
    import transformers

    class Quick(getattr(transformers, name)):
        """The same, with weights made from their shapes: nothing is compiled."""

        def init_weights(self, rng: Any, input_shape: Any, params: Any = None) -> Any:
            init = functools.partial(super().init_weights, input_shape=input_shape)
            return random_variables(jax.eval_shape(init, rng))

    model = Quick(configure())
    module, model._module = model.module, _Catcher()
    try:
        model(**_inputs(model))
    except _Caught as call:
        variables, args, kwargs = call.args
        kwargs = {k: v for k, v in kwargs.items() if k not in ("rngs", "mutable")}
        return Subject(module, variables, args, kwargs)
    raise AssertionError(f"{name} did not call its module")


class _Caught(Exception):  # noqa: N818
    """The call of the module that a model's own ``__call__`` makes."""


class _Catcher:
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        raise _Caught(variables, args, kwargs)


def _inputs(model: Any) -> dict[str, Any]:
    """Inputs for what the model's ``__call__`` asks for."""
    import inspect

    asked = inspect.signature(model.__call__).parameters
    makers: dict[str, Callable[..., Any]] = {
        "input_ids": lambda: tokens(2, 16, below=_VOCABULARY),
        "decoder_input_ids": lambda: tokens(2, 7, below=_VOCABULARY, seed=1),
        "pixel_values": lambda: normal(2, 3, *_NON_SQUARE),
        "input_values": lambda: normal(2, 90),
        "inputs": lambda: normal(2, 90),
        "input_features": lambda: normal(2, 10, 24),
    }
    found = {name: make() for name, make in makers.items() if name in asked}
    if "attention_mask" in asked and "input_ids" in asked:  # the last row is shorter
        found["attention_mask"] = jnp.ones((2, 16), int).at[1, 13:].set(0)
    return found


def _of_two(name: str, encoder: str, decoder: str, **changes: Any) -> Any:
    """The configuration of an encoder and a decoder."""
    import transformers

    config_class = getattr(transformers, name).config_class
    return config_class.from_encoder_decoder_configs(
        _config(encoder),
        _config(decoder, is_decoder=True, add_cross_attention=True, **changes),
    )


def _clip(name: str) -> Any:
    import transformers

    del name
    text = _config("clip_text_model", hidden_size=20, num_attention_heads=2)
    vision = _config("clip_vision_model")
    return transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=18
    )


def _dual(name: str) -> Any:
    import transformers

    del name
    text = _config("bert", hidden_size=20, num_attention_heads=2)
    return transformers.VisionTextDualEncoderConfig(
        text_config=text.to_dict(), vision_config=_config("vit").to_dict()
    )


# Models whose configuration is made of others.
_COMPOSED: dict[str, Callable[..., Any]] = {
    "FlaxCLIPModel": _clip,
    "FlaxVisionTextDualEncoderModel": _dual,
    "FlaxEncoderDecoderModel": functools.partial(
        _of_two, encoder="bert", decoder="bert"
    ),
    "FlaxVisionEncoderDecoderModel": functools.partial(
        _of_two, encoder="vit", decoder="gpt2"
    ),
    "FlaxSpeechEncoderDecoderModel": functools.partial(
        # Its init feeds the decoder 170 tokens.
        _of_two,
        encoder="wav2vec2",
        decoder="bart",
        max_position_embeddings=200,
    ),
}
