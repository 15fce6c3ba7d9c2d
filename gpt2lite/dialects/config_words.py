"""What other programs' configs say, word by word: what it is of ours, what we compute, what does not matter.

A word that is in none of these tables is not known here, so nobody can say that it does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from gpt2lite.config import ACTIVATIONS as OURS_ARE
from gpt2lite.config import GPTConfig

# Their words for our fields: config.json, hparams.json, nanoGPT's model_args, Lightning's hyper_parameters.
OURS = {
    **dict.fromkeys(("n_head", "num_heads", "num_attention_heads"), "n_heads"),
    **dict.fromkeys(("n_layer", "num_hidden_layers"), "n_layers"),
    **dict.fromkeys(("n_embd", "hidden_size"), "emb_dim"),
    **dict.fromkeys(("n_positions", "block_size", "max_position_embeddings"), "context_length"),
    **dict.fromkeys(("resid_pdrop", "dropout"), "drop_rate"),
    **{"n_vocab": "vocab_size", "activation_function": "activation", "tie_word_embeddings": "tied_head"},
}
# Their names of the same two functions, up to rounding, and the classes that compute them. gelu_10 clips,
# quick_gelu is another function.
_TANH = """
gelu_new gelu_pytorch_tanh gelu_python_tanh gelu_fast gelu_accurate
NewGELUActivation NewGELU PytorchGELUTanh GELUTanh FastGELUActivation AccurateGELUActivation
"""
ACTIVATIONS = dict.fromkeys(_TANH.split(), "gelu_tanh") | {"gelu_python": "gelu", "GELUActivation": "gelu"}
APPROXIMATE = {approximate: ours for ours, approximate in OURS_ARE.items()}
# Said by a pickled module alone: of its attention, which must be 1/sqrt(head_dim), and of any part of it.
SCALE, CLASS = "the scale of its attention", "its class"
_SAID_BY_ATTENTION = """
n_head n_heads num_heads is_causal scale_attn_weights scale_attn_by_inverse_layer_idx sliding_window
sliding_window_size
"""
# Parts of a pickled module, by their places: the classes that compute as we do (all others are refused), and
# what their attributes are as words of a config. Every block must say the same.
ACTIVATION = r"trf_blocks\.\d+\.ff\.layers\.1|h\.\d+\.mlp\.(act|gelu)"
PARTS: dict[str, tuple[str, dict[str, str]]] = {
    r"(trf_blocks|h)\.\d+\.attn?": (
        r"(PyTorch)?MultiHeadAttention(CombinedQKV)?|MHA\w+|CausalSelfAttention|GPT2\w*Attention\w*",
        {word: word for word in _SAID_BY_ATTENTION.split()} | {"scaling": SCALE, "scale": SCALE},
    ),
    r"trf_blocks\.\d+\.norm[12]|h\.\d+\.ln_[12]|final_norm|ln_f": (
        r"\w*LayerNorm\w*",
        {"eps": "layer_norm_epsilon"},
    ),
    r"(trf_blocks|h)\.\d+": ("TransformerBlock(Fast)?|GPT2Block|Block", {}),
    ACTIVATION: ("GELU", {"approximate": "activation"}),
    r"drop(_emb)?": (r"\w+", {"p": "drop_rate"}),
}
# What changes the computation, with the values that ours has.
COMPUTED: dict[str, tuple[object, ...]] = {
    "model_type": (None, "gpt2"),
    **dict.fromkeys(("layer_norm_epsilon", "layer_norm_eps", "norm_eps"), (None, 1e-5)),
    **dict.fromkeys(("scale_attn_weights", "is_causal"), (None, True)),
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "add_cross_attention"), (None, False)),
    **dict.fromkeys(("is_encoder_decoder", "use_bidirectional_attention"), (None, False)),
    "is_decoder": (None, False, True),  # GPT-2 is causal either way
    "pruned_heads": (None, {}),
    **dict.fromkeys(("quantization_config", "auto_map", "multi_query"), (None,)),  # auto_map: code of its own
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (None,)),
    **dict.fromkeys(("sliding_window", "sliding_window_size"), (None,)),
    CLASS: ("GPT-2's own; if it computes the same, save model.state_dict() instead",),
}
# What changes nothing between ids and logits in eval mode: names, training, generation, other heads, outputs.
_DOES_NOT_MATTER = """
_name_or_path transformers_version architectures dtype torch_dtype task_specific_params tokenizer_class
initializer_range embd_pdrop attn_pdrop gradient_checkpointing chunk_size_feed_forward reorder_and_upcast_attn
use_cache torchscript use_bfloat16 tf_legacy_loss tie_encoder_decoder n_ctx summary_type summary_use_proj
summary_activation summary_proj_to_labels summary_first_dropout output_hidden_states output_attentions
output_past return_dict return_dict_in_generate output_scores id2label label2id num_labels problem_type
finetuning_task prefix decoder_start_token_id cross_attention_hidden_size bos_token_id eos_token_id
pad_token_id sep_token_id forced_bos_token_id forced_eos_token_id begin_suppress_tokens suppress_tokens
bad_words_ids max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
encoder_no_repeat_ngram_size num_return_sequences remove_invalid_values exponential_decay_length_penalty
learning_rate lr min_lr max_lr weight_decay beta1 beta2 betas eps optimizer scheduler decay_lr grad_clip
batch_size gradient_accumulation_steps max_iters max_steps max_epochs num_epochs epochs warmup_iters
warmup_steps lr_decay_iters seed device compile dataset out_dir eval_interval eval_iters log_interval
predict_special_tokens _attn_implementation _attn_implementation_autoset _commit_hash attn_implementation
"""
DOES_NOT_MATTER = frozenset(_DOES_NOT_MATTER.split())


def said_by_part(
    place: str, root: str, kind: str, values: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a part of a pickled module says by its class and its attributes: (where, words of a config)."""
    for pattern, (classes, words) in PARTS.items():
        if not re.fullmatch(pattern, place.removeprefix(root)):
            continue
        if not re.fullmatch(classes, name := kind.rpartition(".")[2]):
            yield place, {"activation" if pattern == ACTIVATION else CLASS: name}
        for where, word in ((f"{place}.{attribute}", word) for attribute, word in words.items()):
            if where in values:
                said: Any = values[where]
                yield where, {word: APPROXIMATE.get(said, said) if word == "activation" else said}


def refusals(words: Mapping[str, Any]) -> Iterator[str]:
    """`field=value` and what is wanted, for each word that asks for a computation that we do not have."""
    for word, allowed in COMPUTED.items():
        if word in words and not any(words[word] == value for value in allowed):
            yield f"{word}={words[word]!r}, wanted {allowed[-1]!r}"
    for word in ("activation_function", "activation"):
        if word in words and not _is_computed(words[word]):
            yield f"{word}={words[word]!r}, wanted gelu_new (tanh) or gelu (exact)"
    inner, width = words.get("n_inner"), words.get("n_embd")
    if inner is not None and isinstance(width, int) and inner != 4 * width:
        yield f"n_inner={inner!r}, wanted 4 × n_embd"


def _is_computed(activation: object) -> bool:
    return isinstance(activation, str) and ACTIVATIONS.get(activation, activation) in OURS_ARE


def unknown(words: Mapping[str, Any]) -> list[str]:
    """The words of a config that no table knows and that say something."""
    ours = (field.name for field in fields(GPTConfig))
    known = {"n_inner", *ours, *OURS, *COMPUTED, *DOES_NOT_MATTER}
    return sorted(word for word, value in words.items() if word not in known and value not in (None, False))


def in_our_words(words: Mapping[str, Any]) -> dict[str, Any]:
    """Their words as fields of ours, where they say something; ours stay as they are."""
    said = {OURS.get(word, word): value for word, value in words.items() if value is not None}
    if isinstance(said.get("activation"), str):
        said["activation"] = ACTIVATIONS.get(said["activation"], said["activation"])
    return said
