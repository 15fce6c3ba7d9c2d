"""What shape a checkpoint's model has: said by its tensors, with them, beside them, or by the caller.

Whoever speaks must agree. Names and shapes say all but the number of heads, the activation and dropout; those
are said by the first of: the config that our own writers put into the file, the dict or object that the
writing program puts beside its weights, `<stem>.json`, the folder's config.json or hparams.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from gpt2lite.checkpoint import FOLDER_FILES, side_file
from gpt2lite.checkpoint.described import CHANGES
from gpt2lite.checkpoint.manifest import BOUND_CONFIG
from gpt2lite.config import OFFICIAL_HEADS, GPTConfig
from gpt2lite.dialects.config_words import COMPUTED, in_our_words, refusals, unknown
from gpt2lite.dialects.reading import CLASSIFIERS, Reading, block_of
from gpt2lite.errors import CheckpointError, UsageError, listed

# Where known programs keep the model's config, beside the dict of its weights; the first that is there
# counts: nanoGPT (whose "config" is the command line, and may say another size), build-nanogpt, Lightning,
# an index.
BESIDE_WEIGHTS = ("model_args.", "config.", "hyper_parameters.", "metadata.")
# Attributes of a pickled module's parts, by the name that ours have; every block must say the same.
MODULE_FACTS = {
    "n_heads": (
        "trf_blocks.{i}.att.num_heads",
        "trf_blocks.{i}.att.n_heads",
        "h.{i}.attn.num_heads",
        "h.{i}.attn.n_head",
    ),
    "activation": (
        "trf_blocks.{i}.ff.layers.1.approximate",
        "h.{i}.mlp.act.approximate",
        "h.{i}.mlp.gelu.approximate",
    ),
    "layer_norm_epsilon": (
        "trf_blocks.{i}.norm1.eps",
        "trf_blocks.{i}.norm2.eps",
        "h.{i}.ln_1.eps",
        "h.{i}.ln_2.eps",
        "final_norm.eps",
        "ln_f.eps",
    ),
    "drop_rate": ("drop_emb.p", "drop.p"),
    "scale_attn_weights": ("h.{i}.attn.scale_attn_weights",),
    "scale_attn_by_inverse_layer_idx": ("h.{i}.attn.scale_attn_by_inverse_layer_idx",),
    "is_causal": ("h.{i}.attn.is_causal",),
    "sliding_window": ("trf_blocks.{i}.att.sliding_window_size",),
}
ACTIVATION_MODULES = re.compile(r"(trf_blocks\.\d+\.ff\.layers\.1|h\.\d+\.mlp\.(act|gelu))")
APPROXIMATE = {"tanh": "gelu_tanh", "none": "gelu"}
# What weights do not tell, what it is where nobody can know, and what no memory depends on.
UNSAYABLE: dict[str, Any] = {"n_heads": 1, "activation": "gelu_tanh"}
KINDS: dict[str, tuple[type, str]] = {
    "int": (int, "a whole number"),
    "bool": (bool, "true or false"),
    "str": (str, "text"),
}


@dataclass(frozen=True)
class Source:
    """One place that says something of a model, in its own words."""

    where: str
    words: Mapping[str, Any]
    is_whole: bool = False

    @property
    def said(self) -> dict[str, Any]:
        """The fields of our config that it says."""
        names = {field.name for field in fields(GPTConfig)}
        return {name: value for name, value in in_our_words(self.words).items() if name in names}


@dataclass(frozen=True)
class Found:
    """The fields of a config as far as they are known, and what a user should hear of how they were found.

    `is_asked`: whether the caller said some of them.
    """

    fields: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    is_asked: bool = False


def size_of(reading: Reading) -> tuple[int, int]:
    """(n_layers, emb_dim) by names and shapes; emb_dim is 0 where no embedding tells it."""
    token = reading.placements.get("tok_emb.weight")
    shape = reading.manifest.tensors[token.source].shape if token else ()
    return 1 + max(map(block_of, reading.placements)), shape[1] if len(shape) == 2 else 0


# ---- who speaks --------------------------------------------------------------------------------------------


def _below(values: Mapping[str, object], prefix: str) -> dict[str, Any]:
    """The values right under a dotted prefix, by their last name."""
    names = (name for name in values if name.startswith(prefix) and "." not in name[len(prefix) :])
    return {name[len(prefix) :]: values[name] for name in names}


def _in_the_file(reading: Reading) -> Iterator[Source]:
    """What lies in the weights' own file."""
    manifest, values = reading.manifest, reading.manifest.values
    for key in (BOUND_CONFIG, f"__metadata__.{BOUND_CONFIG}"):
        if isinstance(bound := values.get(key), str):
            yield Source(f"{manifest.path}, the config in it", _parsed(manifest.path, bound), is_whole=True)
    above = reading.container.rstrip(".").rpartition(".")[0]
    above = f"{above}." if above else ""
    written = next((key for key in BESIDE_WEIGHTS if _below(values, above + key)), "")
    modules = (reading.root.removesuffix("transformer."), reading.root)
    for place in dict.fromkeys((above, above + written, *(f"{root}config." for root in modules if root))):
        if words := _below(values, place):
            where = f"{manifest.path}, {place.rstrip('.') or 'beside its weights'}"
            yield Source(where, words, is_whole=place.endswith("model_args."))
    yield from _module_facts(reading)


def _module_facts(reading: Reading) -> Iterator[Source]:
    """What the parts of a whole pickled module keep as attributes."""
    values, (n_layers, _) = reading.manifest.values, size_of(reading)
    for field, templates in MODULE_FACTS.items():
        for place in (reading.root + template.format(i=i) for template in templates for i in range(n_layers)):
            if place in values:
                value = values[place]
                said = APPROXIMATE.get(value, value) if field == "activation" else value  # type: ignore[call-overload]
                yield Source(f"{reading.manifest.path}, {place}", {field: said})
    for place, kind in reading.manifest.modules.items():
        is_activation = ACTIVATION_MODULES.fullmatch(place.removeprefix(reading.root))
        if is_activation and "GELU" not in kind.upper():
            yield Source(f"{reading.manifest.path}, {place}", {"activation": kind})


def _beside_the_file(reading: Reading) -> Iterator[Source]:
    """`<stem>.json` where the file has no config of its own, and the configs of its folder.

    A folder's config.json is about its model.safetensors or pytorch_model.bin if it has one, else about any.
    """
    path = reading.manifest.path
    beside = side_file(path, ".json")
    if not _is_bound(reading) and beside.is_file() and beside.name != "config.json":
        yield Source(str(beside), _read_json(beside))
    folder = path if path.is_dir() else path.absolute().parent
    for name in ("config.json", "hparams.json") if is_of_folder(path) else ():
        if (folder / name).is_file():
            yield Source(str(folder / name), _read_json(folder / name), is_whole=name == "config.json")


def _is_bound(reading: Reading) -> bool:
    """Whether the file carries its own config, which our writers put there."""
    return not {BOUND_CONFIG, f"__metadata__.{BOUND_CONFIG}"}.isdisjoint(reading.manifest.values)


def check_model_type(path: Path) -> None:
    """Raise CheckpointError where a checkpoint's own config.json says that it is no GPT-2."""
    config = (path if path.is_dir() else path.absolute().parent) / "config.json"
    kind = _read_json(config).get("model_type") if is_of_folder(path) and config.is_file() else None
    if kind not in COMPUTED["model_type"]:
        raise CheckpointError(path, f"its config.json says model_type={kind!r}; gpt2lite opens gpt2 alone")


def is_of_folder(path: Path) -> bool:
    """Whether the configs of a checkpoint's folder are its own: not if they belong to other weights there."""
    others = (path.absolute().parent / name for name in FOLDER_FILES)
    without_variant = f"{path.name.split('.')[0]}{path.suffix}"  # transformers' model.fp16.safetensors
    is_named = not {path.name, without_variant}.isdisjoint(FOLDER_FILES)
    return path.is_dir() or is_named or not any(other.exists() for other in others)


def is_for_transformers(path: Path) -> bool:
    """Whether this is a config.json in transformers' words."""
    return path.is_file() and "model_type" in _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    return _parsed(path, path.read_text(encoding="utf-8", errors="replace"))


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not sound JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(path, f"holds a {type(found).__name__}, wanted an object of config fields")
    return found


# ---- whether they agree ------------------------------------------------------------------------------------


def _check_kinds(source: Source) -> None:
    """Raise CheckpointError for a value of a kind that its field cannot have."""
    kinds = {field.name: KINDS.get(str(field.type)) for field in fields(GPTConfig)}
    for name, value in source.said.items():
        kind, wanted = kinds[name] or ((int, float), "a number")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(source.where, f"{name} is {str(value)[:50]!r}, wanted {wanted}")


def _require_computed(reading: Reading, sources: list[Source]) -> None:
    """Raise CheckpointError that lists all that asks for a computation that we do not have."""
    lines = [f"{source.where}: {line}" for source in sources for line in refusals(source.words)]
    made_by = reading.manifest.modules.get(reading.root.rstrip("."), "")
    lines += [
        f"{place} of a pickled module changes what it computes"
        for place in reading.manifest.values
        if place.startswith(reading.root.removesuffix("transformer.")) and place.rpartition(".")[2] in CHANGES
    ]
    if made_by.startswith("transformers.models.") and ".gpt2." not in made_by:
        lines.append(f"a pickled {made_by}, wanted one of transformers.models.gpt2")
    if lines:
        raise CheckpointError(
            reading.manifest.path,
            f"computes something that gpt2lite does not, so it was not loaded{listed(lines)}",
        )


def _agreed(reading: Reading, sources: list[Source], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """What all sources say together. Raises CheckpointError that names every two places that differ."""
    agreed, lines = dict[str, Any](), list[str]()
    places = dict.fromkeys(shapes, f"{reading.manifest.path}, its weights")
    for source in sources:
        _check_kinds(source)
        for name, value in source.said.items():
            known = {**shapes, **agreed}.get(name, value)
            differs = value is False and _lacks_head(reading) if name == "tied_head" else value != known
            if name == "drop_rate" or not differs:
                agreed.setdefault(name, value)
                places.setdefault(name, source.where)
                continue
            lines.append(f"{name}: {known!r} by {places[name]}, {value!r} by {source.where}")
    if lines:
        raise CheckpointError(
            reading.manifest.path,
            f"sources disagree about this model, so it was not loaded. Correct or "
            f"remove the wrong one{listed(lines)}",
        )
    return agreed


def _lacks_head(reading: Reading) -> bool:
    """Whether the file has no output head of its own, so that it must be tied."""
    return reading.placements["out_head.weight"].source == reading.placements["tok_emb.weight"].source


def _known_activation(reading: Reading) -> dict[str, str]:
    """What a dialect's own program computes with; of nanoGPT's names several programs make use.

    nanoGPT's files hold model_args and, of late, no masks; minGPT's hold masks and no model_args.
    """
    if reading.dialect != "nanogpt" or reading.manifest.format == "llmc":
        return {"activation": "gelu_tanh"}
    is_nano = any(".model_args." in f".{name}" for name in reading.manifest.values)
    head, token = (reading.placements[name].source for name in ("out_head.weight", "tok_emb.weight"))
    is_tied = reading.manifest.tensors[head].address == reading.manifest.tensors[token].address
    if is_nano == bool(reading.masks) or (is_tied and not is_nano):  # minGPT's head is not tied
        return {}
    return {"activation": "gelu" if is_nano else "gelu_tanh"}


def _said_by_shapes(reading: Reading) -> dict[str, Any]:
    """Everything that names, shapes and shared storage tell; all but n_heads, drop_rate and activation."""
    tensors, placements = reading.manifest.tensors, reading.placements
    lacking = [name for name in ("tok_emb.weight", "pos_emb.weight") if name not in placements]
    if lacking:
        raise CheckpointError(reading.manifest.path, f"holds no {' and no '.join(lacking)}")
    token = tensors[placements["tok_emb.weight"].source]
    position = tensors[placements["pos_emb.weight"].source]
    head = tensors[placements["out_head.weight"].source]
    if len(token.shape) != 2 or len(position.shape) != 2:
        raise CheckpointError(
            reading.manifest.path,
            f"{token.name} {token.shape} and {position.name} {position.shape} "
            "must be (vocab_size, emb_dim) and (context_length, emb_dim)",
        )
    is_classifier = head.name.removesuffix(".weight").endswith(CLASSIFIERS)
    changed_alone = {"tok_emb.weight", "out_head.weight"} & {adapter.weight for adapter in reading.adapters}
    return {
        "vocab_size": token.shape[0],
        "context_length": position.shape[0],
        "emb_dim": token.shape[1],
        "n_layers": size_of(reading)[0],
        "qkv_bias": any(name.endswith(".W_query.bias") for name in placements),
        "bias": "final_norm.shift" in placements,
        "tied_head": token.address == head.address and not changed_alone,
        "n_classes": head.shape[0] if is_classifier or head.shape[:1] != token.shape[:1] else 0,
        "head_bias": "out_head.bias" in placements,
    }


def _notes(reading: Reading, sources: list[Source], agreed: Mapping[str, Any]) -> Iterator[str]:
    """What is worth a warning."""
    tensors = reading.manifest.tensors
    for source in sources:
        if source.is_whole and (words := unknown(source.words)):
            yield f"{source.where}: does not know what {', '.join(words)} may change; took it for nothing"
        rates = {
            source.words[key] for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if key in source.words
        }
        if len(rates) > 1:
            yield f"{source.where}: has dropouts {sorted(rates)}; training takes resid_pdrop for all"
    beside = side_file(reading.manifest.path, ".json")
    if _is_bound(reading) and beside.is_file() and beside.name != "config.json":
        with suppress(CheckpointError):  # another program's file of that name
            said = Source(str(beside), _read_json(beside)).said
            if any(agreed.get(name, value) != value for name, value in said.items()):
                yield f"{beside}: differs from the config in {reading.manifest.path}, which is taken"
    own = {placement.source.removeprefix(reading.container) for placement in reading.placements.values()}
    loaded = {tensors[placement.source].address for placement in reading.placements.values()}
    for name in reading.passengers:
        if (
            name.removeprefix(reading.manifest.container_of(name)) in own
            and tensors[name].address not in loaded
        ):
            yield f"{reading.manifest.path}: also holds {name} …, other weights; they are not loaded"
            break
    if reading.left_out:
        yield f"{reading.manifest.path}: opens the language model without {', '.join(reading.left_out)}"


def _said_by_caller(config: GPTConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(config, GPTConfig):
        return config.as_dict()
    if not isinstance(config, (Mapping, NoneType)):
        raise UsageError(f"config must be a GPTConfig, a dict or None, got {config!r}")
    GPTConfig.check_names(config or {})
    return dict(config or {})


def find_fields(reading: Reading, config: GPTConfig | Mapping[str, Any] | None = None) -> Found:
    """All that is known of a checkpoint's config: `config` says what the file does not, and must agree with
    it.

    Sizes that the caller says are left for the plan to compare, tensor by tensor. Raises CheckpointError for
    a contradiction, and for a computation that we do not have.
    """
    said, shapes = _said_by_caller(config), _said_by_shapes(reading)
    sources = [*_in_the_file(reading), *_beside_the_file(reading)]
    _require_computed(reading, sources)
    agreed = _agreed(reading, sources, shapes)
    defaults: dict[str, Any] = dict(_known_activation(reading))
    binding = defaults | agreed if isinstance(config, GPTConfig) else agreed
    for name in ("n_heads", "activation"):
        if name in said and said[name] != (known := binding.get(name, said[name])):
            places = [source.where for source in sources if source.said.get(name) == known]
            raise CheckpointError(
                reading.manifest.path,
                f"{name}={said[name]!r} was passed, "
                f"{(places or ['the program that wrote it'])[0]} says {known!r}. Leave it out, or "
                "correct that",
            )
    if _heads_by_size(shapes) is not None:
        defaults["n_heads"] = _heads_by_size(shapes)
    granted = set() if "n_heads" in agreed else defaults.keys() - said.keys() - agreed.keys()
    _require_unsaid(reading, granted, defaults)
    return Found(defaults | agreed | shapes | said, tuple(_notes(reading, sources, agreed)), bool(said))


def _require_unsaid(reading: Reading, names: Iterable[str], defaults: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a place of a file that is not known to be its config says otherwise."""
    for place, value in reading.manifest.values.items():
        for name, said in in_our_words({place.rpartition(".")[2]: value}).items():
            if name in names and type(said) is type(defaults[name]) and said != defaults[name]:
                raise CheckpointError(
                    reading.manifest.path,
                    f"{place} says {said!r}, taken for granted was {name}="
                    f"{defaults[name]!r}. Pass the one that counts: config={{{name!r}: …}}",
                )


def _heads_by_size(shapes: Mapping[str, Any]) -> int | None:
    return OFFICIAL_HEADS.get((shapes["n_layers"], shapes["emb_dim"]))


def complete(reading: Reading, found: Found) -> GPTConfig:
    """The config of what was found. Raises CheckpointError where the heads or the activation are not
    known.
    """
    known = found.fields
    if known.get("n_heads") is None:
        raise CheckpointError(
            reading.manifest.path,
            f"the number of attention heads cannot be read off weights, and "
            f"{known['n_layers']} layers of {known['emb_dim']} are no official size. Pass "
            f'config={{"n_heads": …}} (--n-heads for commands) or put it as {{"n_heads": …}} into '
            f"{side_file(reading.manifest.path, '.json').name} beside it.",
        )
    if "activation" not in known:
        raise CheckpointError(
            reading.manifest.path,
            "may be of nanoGPT, whose GELU is exact, or of minGPT or older "
            'nanoGPT, whose GELU is the tanh approximation. Pass config={"activation": "gelu"} or '
            '{"activation": "gelu_tanh"} (--activation for commands)',
        )
    try:
        return GPTConfig.of(known)
    except UsageError as error:
        raise (UsageError if found.is_asked else CheckpointError)(
            f"{reading.manifest.path}: {error}"
        ) from None
