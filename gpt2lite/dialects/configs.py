"""What shape a checkpoint's model has: said by its tensors, with them, beside them, or by the caller.

Whoever speaks must agree. Names and shapes say all but the number of heads, the activation and dropout; those
are said by the first of: the config that our own writers put into the file, the dict or object that the
writing program puts beside its weights, `<stem>.json`, the folder's config.json or hparams.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt2lite.checkpoint import FOLDER_FILES, TensorSpan, side_file
from gpt2lite.checkpoint.described import CHANGES
from gpt2lite.checkpoint.manifest import BOUND_CONFIG
from gpt2lite.checkpoint.reading import read_span
from gpt2lite.config import OFFICIAL_HEADS, GPTConfig
from gpt2lite.dialects.config_words import COMPUTED, SCALE, in_our_words, refusals, said_by_part, unknown
from gpt2lite.dialects.reading import CLASSIFIERS, Reading, above_of, unwrapped
from gpt2lite.errors import CheckpointError, UsageError, listed

BOUND = (BOUND_CONFIG, f"__metadata__.{BOUND_CONFIG}")
# Where known programs keep the model's config, beside the dict of its weights: nanoGPT (whose "config" is the
# command line, and may say another size), build-nanogpt, Lightning, an index.
MODEL_ARGS, OTHER_KEYS = "model_args.", ("config.", "hyper_parameters.", "metadata.")
# What weights do not tell, what it is where nobody can know, and what no memory depends on.
UNSAYABLE: dict[str, Any] = {"n_heads": 1, "activation": "gelu_tanh"}
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
FIELDS = {field.name: str(field.type) for field in fields(GPTConfig)}
MASK_ROWS = 64  # read at a time: 256 KiB of GPT-2's


class Source(NamedTuple):
    """One place that says something of a model, in its own words; whole where it is known to be a config."""

    where: str
    words: Mapping[str, Any]
    is_whole: bool = False

    def said(self) -> dict[str, Any]:
        """The fields of our config that it says."""
        return {name: value for name, value in in_our_words(self.words).items() if name in FIELDS}


@dataclass(frozen=True)
class Found:
    """The fields of a config as far as they are known, and what a user should hear of how they were found.

    `is_asked`: whether the caller said some of them.
    """

    fields: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    is_asked: bool = False


# ---- who speaks --------------------------------------------------------------------------------------------


def _below(values: Mapping[str, object], prefix: str) -> dict[str, Any]:
    """The values under a dotted prefix by their next name; what is nested deeper is a dict."""
    words: dict[str, Any] = {}
    for name, value in values.items():
        word, _, deeper = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            continue
        if not deeper:
            words[word] = value
        elif isinstance(nested := words.setdefault(word, {}), dict):
            nested[deeper] = value
    return words


def _in_the_file(reading: Reading) -> Iterator[Source]:
    """What lies in the weights' own file: also behind the names that wrappers of a pickled module add."""
    path, values = reading.manifest.path, reading.manifest.values
    for key in BOUND:
        if isinstance(bound := values.get(key), str):
            yield Source(f"{path}, the config in it", _parsed(path, bound), is_whole=True)
    values = {**{unwrapped(name): value for name, value in values.items()}, **values}
    above = above_of(reading.container)
    if beside := {word: said for word, said in _below(values, above).items() if not isinstance(said, dict)}:
        yield Source(f"{path}, {above.rstrip('.') or 'beside its weights'}", beside)
    keys = (MODEL_ARGS,) if _below(values, above + MODEL_ARGS) else OTHER_KEYS
    roots = (reading.root.removesuffix("transformer."), reading.root, unwrapped(reading.root))
    for place in dict.fromkeys(
        (*(above + key for key in keys), *(f"{root}config." for root in roots if root))
    ):
        if words := _below(values, place):
            yield Source(f"{path}, {place.rstrip('.')}", words, is_whole=not place.endswith("metadata."))
    for place, kind in reading.manifest.modules.items():
        for where, words in said_by_part(unwrapped(place), unwrapped(reading.root), kind, values):
            yield Source(f"{path}, {where}", words)


def _beside_the_file(reading: Reading) -> Iterator[Source]:
    """`<stem>.json` where the file has no config of its own, and the configs of its folder.

    A folder's config.json is about its model.safetensors or pytorch_model.bin if it has one, else about any.
    """
    path = reading.manifest.path
    if not _is_bound(reading) and (beside := _side_json(path)):
        yield Source(str(beside), read_json(beside))
    for name in ("config.json", "hparams.json") if is_of_folder(path) else ():
        if (beside := folder_of(path) / name).is_file():
            yield Source(str(beside), read_json(beside), is_whole=name == "config.json")


def _is_bound(reading: Reading) -> bool:
    """Whether the file carries its own config, which our writers put there."""
    return not reading.manifest.values.keys().isdisjoint(BOUND)


def _side_json(path: Path) -> Path | None:
    """`<stem>.json`, if it is there and not the folder's config.json."""
    beside = side_file(path, ".json")
    return beside if beside.is_file() and beside.name != "config.json" else None


def check_model_type(path: Path) -> None:
    """Raise CheckpointError where a checkpoint's own config.json says that it is no GPT-2."""
    config = folder_of(path) / "config.json"
    kind = read_json(config).get("model_type") if is_of_folder(path) and config.is_file() else None
    if kind not in COMPUTED["model_type"]:
        raise CheckpointError(path, f"its config.json says model_type={kind!r}; gpt2lite opens gpt2 only")


def folder_of(path: Path) -> Path:
    """The folder of a checkpoint, which may be a folder itself."""
    return path if path.is_dir() else path.absolute().parent


def is_of_folder(path: Path) -> bool:
    """Whether the configs of a checkpoint's folder are its own: not if they belong to other weights there."""
    others = (path.absolute().parent / name for name in FOLDER_FILES)
    without_variant = f"{path.name.split('.')[0]}{path.suffix}"  # transformers' model.fp16.safetensors
    is_named = not {path.name, without_variant}.isdisjoint(FOLDER_FILES)
    return path.is_dir() or is_named or not any(other.exists() for other in others)


def is_for_transformers(path: Path) -> bool:
    """Whether this is a config.json in transformers' words."""
    return path.is_file() and "model_type" in read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError."""
    return _parsed(path, path.read_text(encoding="utf-8", errors="replace"))


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(path, f"holds a {type(found).__name__}, expected an object of config fields")
    return found


# ---- whether they agree ------------------------------------------------------------------------------------


def _check_kind(where: str, name: str, value: object) -> None:
    """Raise CheckpointError for a value of a kind that its field cannot have."""
    kind = FIELDS[name]
    if type(value).__name__ not in (kind, "int" if kind == "float" else kind):
        raise CheckpointError(where, f"{name} is {str(value)[:50]!r}, wanted {KINDS[kind]}")


def _require_computed(reading: Reading, sources: list[Source]) -> None:
    """Raise CheckpointError that lists all that asks for a computation that we do not have."""
    lines = [f"{source.where}: {line}" for source in sources for line in refusals(source.words)]
    lines += [
        f"{place} of a pickled module changes what it computes"
        for place in reading.manifest.values
        if place.startswith(reading.root.removesuffix("transformer.")) and place.rpartition(".")[2] in CHANGES
    ]
    if lines:
        raise CheckpointError(reading.manifest.path, f"not loaded; gpt2lite does not compute{listed(lines)}")


def _check_masks(reading: Reading) -> None:
    """Raise CheckpointError for a mask that is not causal: a window, or none at all, is another computation.

    Reads the first block's mask whole, and of the others, where they are not the same bytes, the first, the
    middle and the last row: a window hides something in the last, a mask that hides nothing shows in the
    first.
    """
    tensors = reading.manifest.tensors
    spans = {tensors[name].address: tensors[name] for name in reading.masks if tensors[name].numel > 1}
    for number, span in enumerate(spans.values()):
        size, name = span.shape[-1], span.name
        rows, count = (range(0, size, MASK_ROWS), MASK_ROWS) if number == 0 else ((0, size // 2, size - 1), 1)
        is_square = span.shape[-2:] == (size, size) and span.numel == size * size and span.is_contiguous
        if not is_square or not all(_is_causal(span, row, count) for row in rows):
            said = "is not GPT-2's causal mask; gpt2lite computes no other. Use the program that wrote it"
            raise CheckpointError(span.source, f"{name} {said}", name=name)


def _is_causal(span: TensorSpan, row: int, count: int) -> bool:
    """Whether rows of a mask (size, size) hide what follows each token: 1 for hidden (book) or seen (Hub)."""
    size = span.shape[-1]
    count = min(count, size - row)
    begin = span.offset + row * size * span.dtype.itemsize
    stored = read_span(replace(span, shape=(count, size), stride=(size, 1), offset=begin)) != 0
    follows = torch.ones(count, size, dtype=torch.bool, device="cpu").triu(row + 1)
    return torch.equal(stored, follows if span.name.endswith(".mask") else ~follows)


def _agreed(reading: Reading, sources: list[Source], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """What all sources say together. Raises CheckpointError that names every two places that differ."""
    agreed, lines = dict[str, Any](), list[str]()
    places = dict.fromkeys(shapes, f"{reading.manifest.path}, its weights")
    head, token = (reading.placements[name].source for name in ("out_head.weight", "tok_emb.weight"))
    for source in sources:
        for name, value in source.said().items():
            _check_kind(source.where, name, value)
            known = {**shapes, **agreed}.get(name, value)
            # a file without a head of its own must be tied
            differs = value is False and head == token if name == "tied_head" else value != known
            if differs and name != "drop_rate":
                lines.append(f"{name} is {known!r} in {places[name]}, but {value!r} in {source.where}")
            agreed.setdefault(name, value)
            places.setdefault(name, source.where)
    if lines:
        said = "not loaded; its sources disagree. Correct or remove the wrong one"
        raise CheckpointError(reading.manifest.path, said + listed(lines))
    return agreed


def _known_activation(reading: Reading) -> dict[str, str]:
    """What a dialect's own program computes with; several programs write nanoGPT's names.

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
    path, placements = reading.manifest.path, reading.placements
    lacking = [name for name in ("tok_emb.weight", "pos_emb.weight") if name not in placements]
    if lacking:
        raise CheckpointError(path, f"holds no {' and no '.join(lacking)}", name=lacking[0])
    token, position, head = (
        reading.manifest.tensors[placements[f"{layer}.weight"].source]
        for layer in ("tok_emb", "pos_emb", "out_head")
    )
    for span, wanted in ((token, "(vocab_size, emb_dim)"), (position, "(context_length, emb_dim)")):
        if len(span.shape) != 2:
            raise CheckpointError(path, f"{span.name} is {span.shape}, wanted {wanted}", name=span.name)
    is_classifier = head.name.removesuffix("weight").endswith(CLASSIFIERS)
    changed_alone = {"tok_emb.weight", "out_head.weight"} & {adapter.weight for adapter in reading.adapters}
    return {
        "vocab_size": token.shape[0],
        "context_length": position.shape[0],
        "emb_dim": token.shape[1],
        "n_layers": reading.size[0],
        "qkv_bias": any(name.endswith(".W_query.bias") for name in placements),
        "bias": "final_norm.shift" in placements,
        "tied_head": token.address == head.address and not changed_alone,
        "n_classes": head.shape[0] if is_classifier or head.shape[:1] != token.shape[:1] else 0,
        "head_bias": "out_head.bias" in placements,
    }


def _notes(reading: Reading, sources: list[Source], agreed: Mapping[str, Any]) -> Iterator[str]:
    """What is worth a warning."""
    path, tensors = reading.manifest.path, reading.manifest.tensors
    for where, words, is_whole in sources:
        if is_whole and (names := unknown(words)):
            yield f"{where}: ignored {', '.join(names)}, which gpt2lite does not know"
        rates = {str(words[key]) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if key in words}
        if len(rates) > 1:
            yield f"{where}: has dropouts {' and '.join(sorted(rates))}; training uses resid_pdrop for all"
    if _is_bound(reading) and (beside := _side_json(path)):
        with suppress(CheckpointError):  # another program's file of that name
            said = Source(str(beside), read_json(beside)).said()
            if any(agreed.get(name, value) != value for name, value in said.items()):
                yield f"{beside}: differs from the config in {path}, which is used"
    own = {placement.source.removeprefix(reading.container) for placement in reading.placements.values()}
    loaded = {tensors[placement.source].address for placement in reading.placements.values()}
    for name in reading.passengers:
        plain = name.removeprefix(reading.manifest.container_of(name))
        if plain in own and tensors[name].address not in loaded:
            yield f"{path}: also holds {name} …, other weights; they are not loaded"
            break
    if reading.left_out:
        yield f"{path}: opens the language model without {', '.join(reading.left_out)}"


def _said_by_caller(config: GPTConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    said = config.as_dict() if isinstance(config, GPTConfig) else {} if config is None else config
    if not isinstance(said, Mapping):
        raise UsageError(f"config must be a GPTConfig, a dict or None, got {config!r}")
    GPTConfig.check_names(said)
    return dict(said)


def find_fields(reading: Reading, config: GPTConfig | Mapping[str, Any] | None = None) -> Found:
    """All that is known of a checkpoint's config: `config` adds what the file does not say, and must agree.

    Sizes that the caller says are left for the plan to compare, tensor by tensor. Raises CheckpointError for
    a contradiction, and for a computation that we do not have.
    """
    path, said, shapes = reading.manifest.path, _said_by_caller(config), _said_by_shapes(reading)
    sources = [*_in_the_file(reading), *_beside_the_file(reading)]
    _require_computed(reading, sources)
    _check_masks(reading)
    agreed = _agreed(reading, sources, shapes)
    defaults: dict[str, Any] = dict(_known_activation(reading))
    binding = defaults | agreed if isinstance(config, GPTConfig) else agreed
    for name in ("n_heads", "activation"):
        if name in said and said[name] != (known := binding.get(name, said[name])):
            places = [source.where for source in sources if source.said().get(name) == known]
            where = [*places, "the program that wrote it"][0]
            raise CheckpointError(path, f"{name}={said[name]!r} was passed, but {where} says {known!r}")
    heads = OFFICIAL_HEADS.get((shapes["n_layers"], shapes["emb_dim"]))
    defaults |= {} if heads is None else {"n_heads": heads}
    known = defaults | agreed | shapes | said
    _require_unsaid(reading, {name: known[name] for name in UNSAYABLE.keys() & known.keys() - said.keys()})
    if isinstance(heads := known.get("n_heads"), int) and heads > 0:
        _require_scale(path, sources, known["emb_dim"] / heads)
    return Found(known, tuple(_notes(reading, sources, agreed)), bool(said))


def _require_scale(path: Path, sources: list[Source], head_dim: float) -> None:
    """Raise CheckpointError where a pickled module does not scale its attention by 1/sqrt(head_dim)."""
    for where, words, _ in sources:
        scale = words.get(SCALE, True)  # True, False: old transformers' flag
        if not isinstance(scale, (int, float)):
            continue
        is_right = any(math.isclose(scale, head_dim**power, rel_tol=1e-3) for power in (-0.5, 0.5))
        if scale is not True and not is_right:
            raise CheckpointError(path, f"{where} is {scale}, wanted {head_dim**-0.5:.4g} = 1/sqrt(head_dim)")


def _require_unsaid(reading: Reading, believed: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a place of a file that is not known to be its config says otherwise."""
    values, above = reading.manifest.values, above_of(reading.container)
    if _is_bound(reading) or any(name.startswith(above + MODEL_ARGS) for name in values):
        return  # the writer is known, and where it keeps the config
    for place, value in values.items():
        words = {place.rpartition(".")[2]: value}
        for name, said in in_our_words(words).items():
            if name in believed and type(said) is type(believed[name]) and said != believed[name]:
                assumed = f"but gpt2lite would assume {name}={believed[name]!r}"
                do = f"Pass the right one: config={{{name!r}: …}}"
                raise CheckpointError(reading.manifest.path, f"{place} says {said!r}, {assumed}. {do}")
        if words.keys() & COMPUTED.keys() - {"model_type"} and (lines := [*refusals(words)]):
            do = "If that is not about this model, save its state_dict alone"
            raise CheckpointError(
                reading.manifest.path, f"{place}: gpt2lite does not compute {lines[0]}. {do}"
            )


def complete(reading: Reading, found: Found) -> GPTConfig:
    """The config of what was found. Raises CheckpointError where heads or activation are not known."""
    path, known = reading.manifest.path, found.fields
    if known.get("n_heads") is None:
        size = f"{known['n_layers']} layers of {known['emb_dim']} are not an official size"
        do = f'Pass config={{"n_heads": …}} (--n-heads), or put that into {side_file(path, ".json").name}'
        said = f"the number of attention heads cannot be read off weights, and {size}. {do}"
        raise CheckpointError(path, said)
    if "activation" not in known:
        said = "may be of nanoGPT, with exact GELU, or of minGPT or older nanoGPT, with the tanh GELU"
        do = 'Pass config={"activation": "gelu"} or {"activation": "gelu_tanh"} (--activation)'
        raise CheckpointError(path, f"{said}. {do}")
    try:
        return GPTConfig.of(known)
    except UsageError as error:
        raise (UsageError if found.is_asked else CheckpointError)(f"{path}: {error}") from None
