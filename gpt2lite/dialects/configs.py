"""What shape a checkpoint's model has: said by its tensors, with them, beside them, or by the caller.

All sources must agree. Names and shapes say all but the number of heads, the activation and dropout; those
are said by the first of: the config that our own writers put into the file, the dict or object that the
writing program puts beside its weights, `<stem>.json`, the folder's config.json or hparams.json.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch

from gpt2lite.checkpoint import FOLDER_FILES, Manifest, TensorSpan, side_file
from gpt2lite.checkpoint.foreign import shortened
from gpt2lite.checkpoint.inert_pickle import CHANGES, names_above, shown
from gpt2lite.checkpoint.json_text import json_object, read_json
from gpt2lite.checkpoint.manifest import BOUND_CONFIG, Unread, dotted, flatten
from gpt2lite.checkpoint.reading import read_span, read_spans
from gpt2lite.checkpoint.remote import Place
from gpt2lite.checkpoint.source import children, lies, memory_of, read_all, source_of
from gpt2lite.config import (
    ACTIVATIONS,
    OFFICIAL_SIZES,
    PURPOSE,
    TEMPLATES,
    GPTConfig,
    Purpose,
    misfit,
    wrong_labels,
)
from gpt2lite.dialects.reading import AUXILIARY, CLASSIFIERS, TIED, Reading, above_of, block_of, unwrapped
from gpt2lite.errors import CheckpointError, UsageError, listed, visible

# ---- their words -------------------------------------------------------------------------------------------
# What other programs' configs say, word by word: what it is of ours, what we compute, what does not matter. A
# word that is in none of these tables is not known here, so nobody can say that it does not matter.

# Their words for our fields: config.json, hparams.json, nanoGPT's model_args, Lightning's hyper_parameters.
OURS = {
    **dict.fromkeys(("n_head", "num_heads", "num_attention_heads", "nhead", "num_head", "heads"), "n_heads"),
    **dict.fromkeys(("n_layer", "num_hidden_layers"), "n_layers"),
    **dict.fromkeys(("n_embd", "hidden_size"), "emb_dim"),
    **dict.fromkeys(
        ("n_positions", "block_size", "max_position_embeddings", "max_positions"), "context_length"
    ),
    **dict.fromkeys(("resid_pdrop", "dropout"), "drop_rate"),
    **dict.fromkeys(("activation_function", "hidden_act", "activation_fn"), "activation"),
    **{"n_vocab": "vocab_size", "tie_word_embeddings": "tied_head"},
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "drop_rate")  # all of them are one rate of ours
# Their names of the same two functions, up to rounding, and the classes that compute them. gelu_10 clips,
# quick_gelu is another function.
_TANH = """
NewGELUActivation NewGELU PytorchGELUTanh GELUTanh FastGELUActivation AccurateGELUActivation
gelu_pytorch_tanh gelu_python_tanh gelu_fast gelu_accurate gelu_new
"""
GELUS = {"gelu_python": "gelu", "GELUActivation": "gelu"} | dict.fromkeys(_TANH.split(), "gelu_tanh")
APPROXIMATE = {approximate: ours for ours, approximate in ACTIVATIONS.items()}
# Only pickled modules have these: attention's scale (must be 1/sqrt(head_dim)), what a block divides or
# multiplies by beside it, and any part's class.
SCALE, TEMPERATURE, CLASS = "its scale", "a temperature", "its class"
# Places in a pickled module and the full names of the classes that compute as we do there; what has no row is
# refused. A class of torch or transformers must come from there, others are copied from program to program.
TORCHS, HUBS = r"(torch\.nn|gpt2lite)\..*\b", r"transformers\..*\b"
BLOCK, HEAD = r"(trf_blocks|h)\.\d+", "lm_head|out_head|score|classifier"
DROPOUT = r"(.*\.)?(drop\w*|\w+_dropout|ff\.layers\.3)"
ATTENTION, NORM = rf"{BLOCK}\.attn?", rf"{BLOCK}\.(norm[12]|ln_[12])|final_norm|ln_f"
ACTIVATION, MLP = rf"{BLOCK}\.(ff\.layers\.1|mlp\.(act|gelu))", rf"{BLOCK}\.(ff|mlp)"
ATTENTIONS = r"(PyTorch)?MultiHeadAttention(CombinedQKV)?|MHA\w+|CausalSelfAttention"
PROJECTION = r"W_(query|key|value)|qkv|(out_)?proj|c_attn|c_proj"
LAYER = rf"{ATTENTION}\.({PROJECTION})|{BLOCK}\.(ff\.layers\.[02]|mlp\.(c_fc|c_proj))|{HEAD}"
CLASSES = {
    "": rf".*\bGPT(Model(Fast)?)?|{HUBS}GPT2(Model|LMHeadModel|DoubleHeadsModel|For\w+)",
    "transformer": rf"{HUBS}GPT2Model|{TORCHS}ModuleDict",
    "tok_emb|pos_emb|wte|wpe": rf"{TORCHS}Embedding",
    DROPOUT: rf"{TORCHS}(Dropout|Identity)",
    r"trf_blocks(\.\d+\.ff\.layers)?|h": rf"{TORCHS}(Sequential|ModuleList)",
    BLOCK: rf".*\b(TransformerBlock(Fast)?|Block)|{HUBS}GPT2Block",
    ATTENTION: rf".*\b({ATTENTIONS})|{HUBS}GPT2(Sdpa|Flash)?Attention2?",
    MLP: rf".*\b(FeedForward(Fast)?|MLP)|{HUBS}GPT2MLP|{TORCHS}ModuleDict",
    rf"({ACTIVATION})\..*": ".*",  # its class says all
    NORM: r".*\b(Fused)?LayerNorm",
    LAYER: rf"{TORCHS}Linear|{HUBS}Conv1D|.*\bLinearWithLoRA(Merged)?",
    rf"({LAYER})\.(linear|lora)": rf"{TORCHS}Linear|.*\bLoRA(Layer)?",
    rf"({'|'.join(AUXILIARY)})".replace(".", r"(\..*)?"): ".*",  # heads that are left out
}
WRAPPERS = r"(torch|deepspeed)\..*"
# The config words that attributes there stand for. Every block must say the same.
ATTRIBUTES = {
    rf"({ATTENTION}|transformer|)\.(n_embd|embed_dim|split_size|d_in|d_out)": "emb_dim",
    rf"{ATTENTION}\.((softmax_|attn_|attention_)?scale|scaling|scale_factor)": SCALE,
    rf"{BLOCK}\.(\w+\.)*temperature": TEMPERATURE,
    rf"({NORM})\.eps": "layer_norm_epsilon",
    rf"({DROPOUT})\.p": "drop_rate",
}
# Attributes of the modules of torch, transformers and known programs that change nothing in eval mode.
_HARMLESS = """
in_features out_features num_embeddings embedding_dim padding_idx norm_type scale_grad_by_freq sparse inplace
approximate normalized_shape elementwise_affine nf nx layer layer_idx reorder_and_upcast_attn flash n_ctx
loss_type name_or_path warnings_issued kernel_config all_tied_weights_keys generation_config num_labels
gradient_checkpointing model_parallel device_map use_cache output_attentions output_hidden_states output_past
require_contiguous_qkv NANOGPT_SCALE_INIT LLMC_SKIP_INIT LLMC_RESIDUAL_SCALE_FLAG _is_hf_initialized
_is_full_backward_hook prepare_data_per_node allow_zero_length_dataloader_with_multiple_devices
"""
HARMLESS = frozenset(_HARMLESS.split())
ARCHITECTURES = r"(TF|Flax)?GPT2((LMHead|DoubleHeads)?Model|For\w+)|AutoModel\w+|GPT(Model)?"
# Words for heads in what is no config's value (YAML, a printed object, pairs), and files that may hold them.
IN_TEXT = re.compile(r"\b(n_heads?|num_(attention_)?heads?|nhead)\b")
MAY_BE_CONFIG = re.compile(r"(.*[._-])?(config|args|h?(yper)?params)\.(json|ya?ml|toml)")
FOLDER_CONFIGS, MAX_CONFIG_BYTES = ("config.json", "hparams.json"), 1 << 20
EPSILONS = [f"{of}_{word}" for of in ("layer_norm", "layernorm", "norm", "ln") for word in ("epsilon", "eps")]
ACTIVATION_WORDS = ("activation", *(word for word, name in OURS.items() if name == "activation"))
HEAD_SIZES = ("head_dim", "head_size", "d_head", "n_embd_per_head")  # emb_dim / n_heads
# The context, where attention says how far it sees.
WINDOWS = ("window", "window_size", "attention_window", "sliding_window", "sliding_window_size")
# Factors of logits, embeddings and residuals, and what bounds logits.
_FACTORS = """
logit_scale logits_scale logits_scaling embed_scale emb_scale embedding_scale embedding_multiplier
residual_scale residual_multiplier weight_scale
"""
FACTORS = tuple(_FACTORS.split())
SOFTCAPS = ("softcap", "logit_softcap", "attn_logit_softcapping", "final_logit_softcapping")
# What changes the computation, with the values that ours has; a refusal names the last.
COMPUTED: dict[str, tuple[object, ...]] = {
    "model_type": (None, "gpt2"),
    **dict.fromkeys(EPSILONS, (None, 1e-5)),
    **dict.fromkeys(ACTIVATION_WORDS, (*ACTIVATIONS, *GELUS)),
    **dict.fromkeys(("scale_attn_weights", "is_causal"), (None, True)),
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "add_cross_attention"), (None, False)),
    **dict.fromkeys(
        ("is_encoder_decoder", "is_cross_attention", "use_bidirectional_attention"), (None, False)
    ),
    "pruned_heads": (None, {}),
    "position_embedding_type": (None, "learned", "absolute"),
    **dict.fromkeys(("quantization_config", "auto_map", "multi_query"), (None,)),  # auto_map: code of its own
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (None,)),
    **dict.fromkeys(("max_norm", *SOFTCAPS), (None,)),
    **dict.fromkeys((*FACTORS, TEMPERATURE), (None, 1.0)),
    CLASS: ("GPT-2's own; if it computes the same, save model.state_dict() instead",),
}
OF_ANYTHING = {"model_type", *ACTIVATION_WORDS, *FACTORS}  # words that other parts of a file use, too
# What changes nothing between ids and logits in eval mode: names, training, generation, other heads, outputs.
_DOES_NOT_MATTER = """
_name_or_path transformers_version architectures dtype torch_dtype task_specific_params tokenizer_class
initializer_range embd_pdrop attn_pdrop gradient_checkpointing chunk_size_feed_forward reorder_and_upcast_attn
use_cache torchscript use_bfloat16 tf_legacy_loss is_decoder tie_encoder_decoder n_ctx summary_use_proj
summary_type summary_activation summary_proj_to_labels summary_first_dropout output_hidden_states
output_attentions output_past output_scores return_dict return_dict_in_generate id2label label2id num_labels
problem_type finetuning_task prefix decoder_start_token_id cross_attention_hidden_size bos_token_id
eos_token_id pad_token_id sep_token_id forced_bos_token_id forced_eos_token_id begin_suppress_tokens
suppress_tokens bad_words_ids max_length min_length do_sample early_stopping num_beams num_beam_groups
diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
encoder_no_repeat_ngram_size num_return_sequences remove_invalid_values exponential_decay_length_penalty
learning_rate lr min_lr max_lr weight_decay beta1 beta2 betas optimizer scheduler decay_lr grad_clip
batch_size gradient_accumulation_steps max_iters max_steps max_epochs num_epochs epochs warmup_iters
warmup_steps lr_decay_iters seed device compile dataset out_dir eval_interval eval_iters log_interval
predict_special_tokens _attn_implementation _attn_implementation_autoset _commit_hash attn_implementation
"""
DOES_NOT_MATTER = frozenset(_DOES_NOT_MATTER.split())

FIELDS = GPTConfig.__dataclass_fields__
LABELS = "labels.json"  # beside a finetuned classifier: its labels as a list, for other programs
KNOWN = {"n_inner", PURPOSE, SCALE, *HEAD_SIZES, *WINDOWS, *FIELDS, *OURS, *COMPUTED, *DOES_NOT_MATTER}


def in_our_words(words: Mapping[str, Any], where: str = "its config") -> dict[str, Any]:
    """The fields of our config that words of any program say; None says nothing.

    Raises CheckpointError for two words that say different things of one field.
    """
    said: dict[str, Any] = {}
    for word, value in words.items():
        if (name := OURS.get(word, word)) not in FIELDS or value is None:
            continue
        value = GELUS.get(value, value) if name == "activation" and isinstance(value, str) else value
        if said.setdefault(name, value) != value and name != "drop_rate":
            both = [f"{w}={v!r}" for w, v in words.items() if OURS.get(w, w) == name and v is not None]
            raise CheckpointError(where, f"{' and '.join(both)} disagree: all are {name}")
    return said


# ---- who speaks --------------------------------------------------------------------------------------------

BOUND = (BOUND_CONFIG, f"__metadata__.{BOUND_CONFIG}")
# Where known programs keep the model's config, beside the dict of its weights: nanoGPT (whose "config" is the
# command line, and may say another size), build-nanogpt, Lightning, an index.
MODEL_ARGS, OTHER_KEYS = "model_args.", ("config.", "hyper_parameters.", "metadata.")
# What others nest in there, such as Lightning's save_hyperparameters(config).
NESTED = r"(model_args|config|hyper_parameters|metadata)\.((config|cfg|model|gpt|args|hparams|model_\w+)\.)+"


class Source(NamedTuple):
    """One place that says something of a model, in its own words; whole where it is known to be a config."""

    where: str
    words: Mapping[str, Any]
    is_whole: bool = False


def _below(values: Mapping[str, object], prefix: str) -> dict[str, Any]:
    """The values under a dotted prefix by their next name; what is nested deeper is a dict."""
    words: dict[str, Any] = {}
    for name in (name for name in values if name.startswith(prefix)):
        word, _, deeper = name.removeprefix(prefix).partition(".")
        if not deeper:
            words[word] = values[name]
        elif isinstance(nested := words.setdefault(word, {}), dict):
            nested[deeper] = values[name]
    return words


def _config_at(values: Mapping[str, object], prefix: str) -> dict[str, Any]:
    """The words of a config under a dotted prefix; of one that cannot be read, that they are unread."""
    whole = values.get(prefix.rstrip("."))
    if isinstance(whole, str) and {*"{\n"} & {*whole}:  # text, and no path of a file
        whole = Unread("text")
    is_hidden = isinstance(whole, Unread) and not prefix.endswith("metadata.")
    return _below(values, prefix) or (dict.fromkeys(UNSAYABLE, whole) if is_hidden else {})


def _said_in(manifest: Manifest) -> dict[str, Any]:
    """The values in a file by dotted name, also those in JSON text; numbers in tensors are Unread."""
    values: dict[str, Any] = dict.fromkeys(manifest.unreadable, Unread("tensor"))
    values |= {name: Unread("tensor") for name, span in manifest.tensors.items() if span.numel == 1}
    values |= manifest.values
    for name, text in manifest.values.items():
        if isinstance(text, str) and text.lstrip().startswith("{") and name not in BOUND:
            with suppress(CheckpointError):
                values |= flatten({name: json_object(name, text)}, (str, int, float))
    return values


def _in_the_file(reading: Reading) -> Iterator[Source]:
    """What lies in the weights' own file: also behind the names that wrappers of a pickled module add."""
    path, values = reading.manifest.path, dict[str, Any](reading.manifest.values)
    for key in BOUND:
        if isinstance(bound := values.get(key), str):
            yield Source(f"{path}, the config in it", json_object(path, bound), is_whole=True)
    values = _said_in(reading.manifest)
    values = {unwrapped(name): value for name, value in values.items()} | values
    above = above_of(reading.container)
    beside = {word: said for word, said in _below(values, above).items() if not isinstance(said, dict)}
    yield Source(f"{path}, {above.rstrip('.') or 'beside its weights'}", beside)
    values = {name: Unread(kind) for name, kind in reading.manifest.modules.items()} | values
    keys = (MODEL_ARGS,) if _config_at(values, above + MODEL_ARGS) else OTHER_KEYS
    roots = (reading.root.removesuffix("transformer."), reading.root, unwrapped(reading.root))
    places = [above + key for key in keys] + [f"{root}config." for root in roots if root]
    for place in dict.fromkeys(places):
        in_module = place[:-1].rpartition(".")[0] in reading.manifest.modules  # whose parts say the rest
        words = _below(values, place) if in_module else _config_at(values, place)
        yield Source(f"{path}, {place.rstrip('.')}", words, not place.endswith("metadata."))
    if reading.manifest.modules:
        yield from _in_modules(reading, values)


def _in_modules(reading: Reading, values: Mapping[str, Any]) -> Iterator[Source]:
    """What the parts of a pickled module say, by their classes and attributes; above the model may be any."""
    path, modules, root = reading.manifest.path, reading.manifest.modules, unwrapped(reading.root)
    inner = {unwrapped(place): place for place in modules}  # the last is the innermost
    has_head = any(above_of(root) + head in inner for head in HEAD.split("|"))
    top, parts = above_of(root) if has_head else root, dict[str, str]()
    for stored, kind in modules.items():
        place = unwrapped(stored)
        part = f"{place}."[len(top) :].rstrip(".").removeprefix(root[len(top) :])
        where, is_wrapper = f"{path}, {place or 'the model'}", inner[place] != stored
        if not f"{place}.".startswith(top) or (is_wrapper and not part):
            continue
        rows = (classes for pattern, classes in CLASSES.items() if re.fullmatch(pattern, part))
        if not (is_wrapper or f"{part}.".startswith(AUXILIARY) or part.endswith(".lora")):  # LoRA's are read
            parts[stored] = part
        has_none = inner.keys().isdisjoint(f"{place}.{end}" for end in ("layers.1", "act", "gelu"))
        if re.fullmatch(ACTIVATION, part) and not is_wrapper:
            said = _activation(kind, part, values.get(f"{stored}.approximate", "none"))
            yield Source(where, {"activation": said})
        elif not re.fullmatch(WRAPPERS if is_wrapper else next(rows, "-"), kind):
            yield Source(where, {CLASS: kind})
        elif re.fullmatch(MLP, part) and has_none and not kind.endswith(".MLP"):  # nanoGPT's calls a function
            yield Source(where, {"activation": "missing"})
    looked_at = inner.keys() | {unwrapped(span.name) for span in reading.mask_spans}
    facts = dict(values) | dict.fromkeys(reading.manifest.unsaved, Unread("tensor"))
    for place, said in facts.items():
        owner = next((above for above in names_above(place) if above in modules), "")
        if place in reading.manifest.tensors or owner not in parts or unwrapped(place) in looked_at:
            continue
        attribute = place[len(owner) :].lstrip(".")
        first, last = attribute.split(".")[0], attribute.rpartition(".")[2]
        rows = (
            w for pattern, w in ATTRIBUTES.items() if re.fullmatch(pattern, f"{parts[owner]}.{attribute}")
        )
        if first in HARMLESS or (first == "config" and parts[owner] in ("", "transformer")):
            continue
        is_known = last in KNOWN and (first != last or last not in DOES_NOT_MATTER)
        word = next(rows, last if is_known else f"attribute {first}")
        yield Source(f"{path}, {dotted(owner, first)}", {word: said}, is_whole=True)


def _activation(kind: str, part: str, approximate: object) -> str:
    """What a class or function computes: torch's GELU by its attribute, the book's tanh, others by name."""
    home, _, name = kind.rpartition(".")
    if name != "GELU":  # a function of any other module may be another one of that name
        return kind if name.islower() and not home.startswith(("torch", "transformers.activations")) else name
    if home.startswith("torch."):
        return APPROXIMATE.get(str(approximate), kind)
    return "gelu_tanh" if part.startswith("trf_blocks") else kind


def _beside_the_file(reading: Reading, has_heads: bool) -> Iterator[Source]:
    """`<stem>.json` where the file has no config of its own, and the configs of its folder.

    Where the heads are known, `<stem>.json` may also be another program's log.
    """
    path = reading.manifest.path
    if reading.manifest.values.keys().isdisjoint(BOUND) and (beside := _side_json(path)):
        try:
            words = read_json(beside)
        except CheckpointError as error:
            if not has_heads:
                do = "If it is no config, pass config={'n_heads': …} (--n-heads)"
                raise CheckpointError(f"{error}. {do}") from None
            words = {}
        if not {OURS.get(word, word) for word in words} & {*FIELDS, *COMPUTED} <= {"drop_rate"}:
            yield Source(str(beside), words)
    for name, words in folder_configs(path).items():
        yield Source(str(folder_of(path) / name), words, is_whole=name == "config.json")


def _side_json(path: Place) -> Place | None:
    """`<stem>.json`, if it is there and not the folder's config.json."""
    beside = side_file(path, ".json")
    return beside if lies(beside) and beside.name != "config.json" else None


def folder_of(path: Place) -> Place:
    """The folder of a checkpoint, which may be a folder itself."""
    return path if path.is_dir() else path.absolute().parent


def folder_configs(path: Place) -> dict[str, dict[str, Any]]:
    """What config.json and hparams.json of a checkpoint's folder say, unless they are about others.

    They are about model.safetensors or pytorch_model.bin if the folder has one, else about any file in it.
    """
    folder = folder_of(path)
    without_variant = f"{path.name.split('.')[0]}{path.suffix}"  # transformers' model.fp16.safetensors
    is_named = path.is_dir() or not {path.name, without_variant}.isdisjoint(FOLDER_FILES)
    if not is_named and any((folder / name).exists() for name in FOLDER_FILES):
        return {}
    return {name: read_json(folder / name) for name in FOLDER_CONFIGS if lies(folder / name)}


def _labels_of(reading: Reading, sources: Sequence[Source], n_classes: int) -> dict[str, list[str]]:
    """A classifier's labels by who says them: its file, the config beside it, labels.json."""
    said = {where: _in_order(words["id2label"]) for where, words, _ in sources if words.get("id2label")}
    if lies(beside := folder_of(reading.manifest.path) / LABELS):
        said[str(beside)] = read_json(beside, kind=list)
    for where, labels in said.items():
        if labels is not None and (wrong := wrong_labels(labels, n_classes)):
            raise CheckpointError(where, wrong)
    return {where: labels for where, labels in said.items() if labels is not None}


def _shown(value: object) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _said_alike(said: Mapping[str, Any]) -> tuple[str, Any]:
    """Who says it first, and what; ("", {}) for nobody. Raises CheckpointError where others disagree."""
    first, value = next(iter(said.items()), ("", {}))
    for where, other in said.items():
        if other != value:
            both = f"{first} says {_shown(value)}, but {where} says {_shown(other)}"
            raise CheckpointError(f"{both}. Is one of them another run's?")
    return first, value


def purpose_of(reading: Reading, found: Found) -> Purpose:
    """What a model was trained for, as far as its file, the config beside it and labels.json say.

    Raises CheckpointError where two of them disagree or a classifier's labels do not name its classes.
    """
    n_classes = found.fields["n_classes"]
    _, labels = _said_alike(_labels_of(reading, found.sources, n_classes) if n_classes else {})
    where, words = _said_alike(
        {where: words[PURPOSE] for where, words, _ in found.sources if PURPOSE in words}
    )
    try:
        template = tuple(words[name] for name in TEMPLATES if name in words)
        return Purpose(tuple(labels), words.get("seq_len"), template)
    except (UsageError, AttributeError, TypeError) as error:
        raise CheckpointError(where, f"{PURPOSE}={words!r:.60}: not what gpt2lite writes ({error})") from None


def _classes_of(words: Mapping[str, Any]) -> Any:
    """How many classes a config names, None where it says nothing."""
    labels = words.get("id2label")
    return len(labels) if isinstance(labels, dict) else words.get("num_labels", words.get("n_classes"))


def _in_order(labels: Any) -> Any:
    """id2label's names by their numbers, None for transformers' own; what is no such table stays as it is."""
    if not isinstance(labels, dict) or labels.keys() != {str(row) for row in range(len(labels))}:
        return labels
    names = [labels[str(row)] for row in range(len(labels))]
    return None if names == [f"LABEL_{row}" for row in range(len(labels))] else names


def check_model_type(path: Place) -> None:
    """Raise CheckpointError where a checkpoint's own config.json says that it is no GPT-2."""
    kind = folder_configs(path).get("config.json", {}).get("model_type")
    if kind not in COMPUTED["model_type"]:
        raise CheckpointError(path, f"its config.json says model_type={kind!r}; gpt2lite opens gpt2 only")


# ---- whether they agree ------------------------------------------------------------------------------------

MASK = ".mask"  # the book's
MASK_ROWS = 256  # read at a time: 1 MiB of GPT-2's
HIDDEN = -9e3  # GPT-2 has -1e4, also where fp16 or bf16 rounds it


def _require_computed(
    reading: Reading, sources: list[Source], computed: Mapping[str, tuple[object, ...]]
) -> None:
    """Raise CheckpointError that lists all that asks for a computation that we do not have."""
    lines = [
        f"{where}: {word}={words[word]!r}, wanted {values[-1]!r}"
        for where, words, _ in sources
        for word, values in computed.items()
        if word in words and not any(_is_same(words[word], value) for value in values)
    ]
    lines += [
        f"{place} of a pickled module changes what it computes"
        for place in reading.manifest.values
        if place.startswith(reading.root.removesuffix("transformer.")) and place.rpartition(".")[2] in CHANGES
    ]
    if lines:
        raise CheckpointError(reading.manifest.path, f"not loaded; gpt2lite does not support{listed(lines)}")


def _is_same(said: object, value: object) -> bool:
    """Whether two values are equal: floats up to the rounding of fp32, and True is not 1."""
    if isinstance(said, float) and isinstance(value, float):
        return math.isclose(said, value, rel_tol=1e-6)
    return isinstance(said, bool) == isinstance(value, bool) and said == value


def check_masks(masks: Iterable[TensorSpan], *, is_opening: bool = False) -> tuple[TensorSpan, ...]:
    """Raise CheckpointError for a mask that is not causal: a window, or none at all, is another computation.

    A mask whose checksum is that of one that was read whole is read in its first and last row alone, where
    these show even if a program wrote over it and left the checksum. Returns what was left for later: while
    opening, which is cheap, all masks but the first block's and those with the same checksum.
    """
    known, left = set[tuple[object, ...]](), list[TensorSpan]()
    for span in masks:
        kind = (span.checksum, span.dtype, span.shape, span.stride, span.name.endswith(MASK))
        is_dear = block_of(span.name) or not span.source.is_local
        if is_opening and is_dear and known.isdisjoint((kind, span.address)):
            left.append(span)
            continue
        if span.address in known:  # blocks may share their bytes
            continue
        if span.name.endswith(".masked_bias"):
            wrong = _wrong_score(span)
        else:
            wrong, checksum = _wrong_mask(span, only_ends=kind in known)
            known.add((checksum, *kind[1:]))
            if not span.source.is_local:  # of the others of this kind two rows: they are megabytes each
                known.add(kind)
        if wrong:
            raise CheckpointError(span.source, f"{span.name} {wrong}", name=span.name)
        known.add(span.address)
    return tuple(left)


def _wrong_mask(span: TensorSpan, *, only_ends: bool) -> tuple[str | None, int | None]:
    """What is wrong with a mask that shows what follows a token, and its CRC-32, computed or as it is said.

    1 is for hidden (book) or seen (Hub). A transposed view is read as it lies.
    """
    *outer, size = span.shape or (0,)
    is_causal = (
        span.shape[-2:] == (size, size) and span.numel == size * size > 0 and span.extent >= span.nbytes
    )
    if is_turned := is_causal and span.stride[-1] > span.stride[-2]:
        span = replace(span, stride=(*span.stride[:-2], *span.stride[:-3:-1]))
    step, rows_of = (max(size - 1, 1), 1) if only_ends else (MASK_ROWS, MASK_ROWS)
    checksum = 0
    starts = range(0, size if is_causal else 0, step)
    runs = [range(start, min(start + rows_of, size)) for start in starts]
    parts = read_spans(span.part([*map(range, outer[:-1]), rows, range(size)]) for rows in runs)
    for rows, part in zip(runs, parts, strict=True):
        part = part.contiguous()
        checksum = zlib.crc32(memory_of(part), checksum)
        stored = part.view(len(rows), size).float()
        ones = torch.ones_like(stored)
        follows = ones.tril(rows.start - 1) if is_turned else ones.triu(rows.start + 1)
        is_causal &= torch.equal(stored, follows if span.name.endswith(MASK) else 1 - follows)
    said = "is not GPT-2's causal mask, the only one supported. Use the program that wrote it"
    return None if is_causal else said, span.checksum if only_ends else checksum


def _wrong_score(span: TensorSpan) -> str | None:
    """What is wrong with a `masked_bias`, hidden tokens' score, that hides nothing."""
    found = read_span(span).float().item() if span.numel == 1 else span.shape
    if isinstance(found, float) and found <= HIDDEN:
        return None
    return f"is {found}, which hides no token; wanted one number of at most {HIDDEN:g}"


def _agreed(reading: Reading, sources: list[Source]) -> tuple[dict[str, Any], dict[str, str]]:
    """What sources say together, the weights first, and which said it first.

    Raises CheckpointError that names every two places that differ.
    """
    (weights, shapes, _), *others = sources
    agreed, places, lines = dict(shapes), dict.fromkeys(shapes, weights), list[str]()
    head, token = (reading.placements[name].source for name in TIED)
    for where, words, _ in others:
        for name, value in in_our_words(words, where).items():
            if wrong := misfit(name, value):
                raise CheckpointError(where, wrong)
            known = agreed.setdefault(name, value)
            # a file without a head of its own must be tied
            differs = value is False and head == token if name == "tied_head" else value != known
            if differs and name != "drop_rate":
                lines.append(f"{name} is {known!r} in {places[name]}, but {value!r} in {where}")
            places.setdefault(name, where)
    if lines:
        said = "not loaded; its sources disagree. Correct or remove the wrong one"
        raise CheckpointError(reading.manifest.path, said + listed(lines))
    return agreed, places


def _known_activation(reading: Reading) -> dict[str, Any]:
    """What a dialect's own program computes with; several programs write nanoGPT's names.

    nanoGPT's files hold model_args and, of late, no masks; minGPT's hold masks and no model_args.
    """
    if reading.dialect != "nanogpt" or reading.manifest.format == "llmc":
        return {"activation": "gelu_tanh"}
    is_nano = any(".model_args." in f".{name}" for name in reading.manifest.values)
    if is_nano == bool(reading.masks) or (reading.is_tied and not is_nano):  # minGPT's head is not tied
        return {}
    return {"activation": "gelu" if is_nano else "gelu_tanh"}


def _said_by_shapes(reading: Reading) -> dict[str, Any]:
    """Everything that names, shapes and shared storage tell; all but n_heads, drop_rate and activation."""
    path, placements = reading.manifest.path, reading.placements
    spans = {name: reading.manifest.tensors[placed.source] for name, placed in placements.items()}
    wanted = {"tok_emb.weight": "(vocab_size, emb_dim)", "pos_emb.weight": "(context_length, emb_dim)"}
    for name, axes in wanted.items():
        shape = spans[name].shape if name in spans else "missing"
        if shape == "missing" or len(shape) != 2:
            raise CheckpointError(path, f"{name} is {shape}, wanted {axes}", name=name)
    token, position, head = (spans[name] for name in (*wanted, "out_head.weight"))
    is_classifier = head.name.removesuffix("weight").endswith(CLASSIFIERS)
    has_other_rows = head.shape[:1] != token.shape[:1]
    if not is_classifier and has_other_rows and 2 * head.shape[0] > token.shape[0]:
        what = f"{head.name} has {head.shape[0]} rows, the token embedding {token.shape[0]}"
        do = "Give both as many rows (the tokenizer's)"
        raise CheckpointError(path, f"{what}; gpt2lite has one vocabulary for both. {do}", name=head.name)
    changed_alone = {*TIED} & {adapter.weight for adapter in reading.adapters}
    return {
        "vocab_size": token.shape[0],
        "context_length": position.shape[0],
        "emb_dim": token.shape[1],
        "n_layers": reading.size[0],
        "qkv_bias": any(name.endswith(".W_query.bias") for name in placements),
        "bias": "final_norm.shift" in placements,
        "tied_head": reading.is_tied and not changed_alone,
        "n_classes": head.shape[0] if is_classifier or has_other_rows else 0,
        "head_bias": "out_head.bias" in placements,
    }


def _notes_of_unsaid(reading: Reading, known: Mapping[str, Any], asked: Collection[str]) -> Iterator[str]:
    """What other values in a file say against what was `asked`, in places that may be about another model.

    Raises CheckpointError if they contradict what would be assumed, or what was asked in a place that is
    known.
    """
    path, values = reading.manifest.path, _said_in(reading.manifest)
    above = above_of(reading.container)
    if {*BOUND} & values.keys() or "n_heads" in in_our_words(_below(values, above + MODEL_ARGS)):
        return  # the program that wrote it is known, and where it keeps its config
    places = [Source(f"{path}, {place}", {place.rpartition(".")[2]: said}) for place, said in values.items()]
    for where, words, _ in places:
        is_ours = re.search(rf", {re.escape(above)}{NESTED}\w+$", where)
        for name, said in in_our_words(words).items():
            assumed = known.get(name) if name in UNSAYABLE else None
            is_said = name == "n_heads" or isinstance(said, (str, Unread))
            if not is_said or assumed in (None, said):
                continue
            if name in asked and not is_ours:
                yield f"{where} says {said!r}, but {name}={assumed!r} was passed, which is used"
            else:
                do = f"Pass the right one: config={{{name!r}: …}}"
                what = f"says {said!r}, but gpt2lite would assume {name}={assumed!r}"
                raise CheckpointError(f"{where} {what}. {do}")
    _require_computed(reading, places, {word: COMPUTED[word] for word in COMPUTED.keys() - OF_ANYTHING})


def _require_no_text(reading: Reading, n_heads: int) -> None:
    """Raise CheckpointError if a text in or beside a file names heads that no place that is read says."""
    path = reading.manifest.path
    texts = {f"{path}, {place}": said for place, said in _said_in(reading.manifest).items()}
    for file in children(folder_of(path)):
        is_read = file.name in FOLDER_CONFIGS
        if (
            MAY_BE_CONFIG.fullmatch(file.name)
            and not is_read
            and 0 < source_of(file).state().size < MAX_CONFIG_BYTES
        ):
            texts[str(file)] = read_all(source_of(file), MAX_CONFIG_BYTES).decode("utf-8", "replace")
    for place, text in texts.items():
        if isinstance(text, str) and IN_TEXT.search(text):
            what = f"names heads in text, where gpt2lite would assume {n_heads=}"
            raise CheckpointError(place, f"{what}. Pass the right one: config={{'n_heads': …}} (--n-heads)")


# ---- what is known -----------------------------------------------------------------------------------------

# Not in weights, and no memory depends on it: what to plan with where nobody says it.
UNSAYABLE: dict[str, Any] = {"n_heads": 1, "activation": "gelu_tanh"}


@dataclass(frozen=True)
class Found:
    """The fields of a config as far as they are known, and what a user should hear of how they were found.

    `is_asked`: whether the caller said some of them; `masks`: those that nobody has read yet; `sources`: who
    else speaks of the model.
    """

    fields: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    is_asked: bool = False
    masks: tuple[TensorSpan, ...] = ()
    sources: tuple[Source, ...] = ()


def _notes(reading: Reading, sources: list[Source], agreed: Mapping[str, Any]) -> Iterator[str]:
    """What is worth a warning."""
    path, tensors = reading.manifest.path, reading.manifest.tensors
    wholes = [(where, words) for where, words, is_whole in sources[::-1] if is_whole]
    known = KNOWN | ({"lora_alpha"} if reading.adapters else set())
    unknown = {w: where for where, words in wholes for w in words.keys() - known if words[w] is not None}
    for first in dict.fromkeys(unknown.values()):
        ignored = sorted(w for w, where in unknown.items() if where == first)
        yield f"{first}: ignored {', '.join(ignored)}, which gpt2lite does not know"
    kinds = [(where, words["architectures"]) for where, words in wholes if "architectures" in words]
    for where, kind in ((where, kind) for where, named in kinds if isinstance(named, list) for kind in named):
        if not re.fullmatch(ARCHITECTURES, str(kind)):
            yield f"{where}: names the class {shown(kind)}; gpt2lite computes what GPT-2 does"
    rates = {str(words[key]) for _, words, _ in sources for key in DROPOUTS if key in words}
    if len(rates) > 1:
        used = f"training uses {agreed.get('drop_rate', 0.0)} for all"
        yield f"{path}: has dropouts {' and '.join(sorted(rates))}; {used}"
    if not reading.manifest.values.keys().isdisjoint(BOUND) and (beside := _side_json(path)):
        with suppress(CheckpointError):  # another program's file of that name
            said = in_our_words(read_json(beside))
            if any(agreed.get(name, value) != value for name, value in said.items()):
                yield f"{beside}: differs from the config in {path}, which is used"
    own = {placement.source.removeprefix(reading.container) for placement in reading.placements.values()}
    loaded = {tensors[placement.source].address for placement in reading.placements.values()}
    others = (name for name in reading.passengers if tensors[name].address not in loaded)
    if same := [name for name in others if name.removeprefix(reading.manifest.container_of(name)) in own]:
        yield f"{path}: also holds {same[0]} …, other weights; they are not loaded"
    if reading.left_out:
        yield f"{path}: opens the language model without {shortened(reading.left_out)}"
    if more := _others_beside(reading.manifest):
        yield f"{path}: other weights lie beside it and are not loaded: {shortened(more)}"


def _others_beside(manifest: Manifest) -> list[str]:
    """Weights of accelerate's other models (model_1.safetensors), and shards that the index does not name."""
    whole = PurePosixPath(manifest.path.name.removesuffix(".index.json"))
    if whole.name not in FOLDER_FILES:
        return []
    numbered = re.compile(rf"{whole.stem}(_\d+|-\d+-of-\d+)\{whole.suffix}")
    names = {file.name for file in children(folder_of(manifest.path))}
    return [*filter(numbered.fullmatch, names - {source.path.name for source in manifest.files})]


def find_fields(reading: Reading, config: GPTConfig | Mapping[str, Any] | None = None) -> Found:
    """All that is known of a checkpoint's config: `config` adds what the file does not say, and must agree.

    Sizes that the caller says are left for the plan to compare, tensor by tensor. Raises CheckpointError for
    a contradiction, and for a computation that we do not have.
    """
    said = config.as_dict() if isinstance(config, GPTConfig) else {} if config is None else config
    if not isinstance(said, Mapping):
        raise UsageError(f"config must be a GPTConfig, a dict or None, got {config!r}")
    GPTConfig.check_names(said)
    path = reading.manifest.path
    weights = Source(f"{path}, its weights", _said_by_shapes(reading))
    inside = list(_in_the_file(reading))
    has_heads = "n_heads" in said or any(OURS.get(w, w) == "n_heads" for s in inside for w in s.words)
    told = {*weights.words, *said}  # where others say these, they need not be readable
    sources = [weights]
    for where, words, is_whole in (*inside, *_beside_the_file(reading, has_heads)):
        kept = {w: v for w, v in words.items() if not isinstance(v, Unread) or OURS.get(w, w) not in told}
        if weights.words["n_classes"] and (classes := _classes_of(words)) is not None:
            kept["n_classes"] = classes
        sources.append(Source(where, kept, is_whole))
    scales = {(a.scale, reading.manifest.tensors[a.a.source].shape[-1]) for a in reading.adapters if a.scale}
    # of the book's layers, or of those that divide it by their rank
    alphas = (None, *(alpha for scale, rank in scales for alpha in (scale * rank, scale)))
    of_adapters = dict.fromkeys(("alpha", "lora_alpha") if scales else (), alphas)
    sizes = dict.fromkeys(WINDOWS, weights.words["context_length"])
    sizes["n_inner"] = 4 * weights.words["emb_dim"]
    of_sizes = {word: (None, size) for word, size in sizes.items()}
    _require_computed(reading, sources, COMPUTED | of_adapters | of_sizes)
    masks = check_masks(reading.mask_spans, is_opening=True)
    agreed, places = _agreed(reading, sources)
    defaults = _known_activation(reading)
    binding = defaults | agreed if isinstance(config, GPTConfig) else agreed
    for name in UNSAYABLE.keys() & said.keys() & binding.keys():
        if said[name] != binding[name]:
            where = f"{places.get(name, 'the program that wrote it')} says {binding[name]!r}"
            raise CheckpointError(path, f"{name}={said[name]!r} was passed, but {where}")
    official = {tuple(size): heads for *size, heads in OFFICIAL_SIZES.values()}
    if (size := (weights.words["n_layers"], weights.words["emb_dim"])) in official:
        defaults["n_heads"] = official[size]
    known = defaults | agreed | dict(said)
    notes = [*_notes_of_unsaid(reading, known, said), *_notes(reading, sources, agreed)]
    if "n_heads" in defaults.keys() - {*agreed, *said}:
        _require_no_text(reading, known["n_heads"])
    if isinstance(heads := known.get("n_heads"), int) and heads > 0:
        width = known["emb_dim"] / heads
        factors = (None, True, width**0.5, width**-0.5)  # True: old transformers' flag
        sizes = dict.fromkeys(HEAD_SIZES, (None, known["emb_dim"] // heads))
        _require_computed(reading, sources, {SCALE: factors, **sizes})
    return Found(known, tuple(map(visible, notes)), bool(said), masks, tuple(sources))


def complete(reading: Reading, found: Found) -> GPTConfig:
    """The config of what was found. Raises CheckpointError where heads or activation are not known."""
    path, known = reading.manifest.path, found.fields
    if known.get("n_heads") is None:
        size = f"{known['n_layers']} layers of {known['emb_dim']} are not an official size"
        do = f'Pass config={{"n_heads": …}} (--n-heads), or put that into {side_file(path, ".json").name}'
        raise CheckpointError(path, f"the number of heads cannot be read off weights, and {size}. {do}")
    if "activation" not in known:
        said = "may be from nanoGPT (exact GELU), or from minGPT or older nanoGPT (tanh GELU)"
        do = 'Pass config={"activation": "gelu"} or {"activation": "gelu_tanh"} (--activation)'
        raise CheckpointError(path, f"{said}. {do}")
    try:
        return GPTConfig.of(known)
    except UsageError as error:
        raise (UsageError if found.is_asked else CheckpointError)(f"{path}: {error}") from None
