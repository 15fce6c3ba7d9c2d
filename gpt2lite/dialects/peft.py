"""A PEFT adapter, beside its base or apart from it: low-rank additions and replaced weights for a reading."""

from __future__ import annotations

import filecmp
import itertools
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gpt2lite.checkpoint import FOLDER_FILES, Manifest, TensorSpan
from gpt2lite.checkpoint.json_text import read_json
from gpt2lite.checkpoint.remote import Place
from gpt2lite.checkpoint.source import lies
from gpt2lite.dialects.reading import TIED, Adapter, Placement, Reading, Transpose, block_of, is_number
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError, listed

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that exists, as in peft
FILES = (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)
BESIDE = "adapter:"  # put before the adapter's names, which may be the base's too

FACTOR = re.compile(r"(.+)\.lora_(embedding_)?A(\.weight)?")
BEFORE = re.compile(r"(base_model\.)?((model|module|_orig_mod|transformer)\.)*")
WRAPPED = re.compile(r"\.(original_module|modules_to_save(\.default)?)\.")  # a saved module's biases, again
# peft matches regular expressions; these cannot take long, whoever wrote the file.
PATTERN = re.compile(r"(\.\*)?([\w.^$-]|\\[.d]\+?)*")


def _are_patterns(value: object) -> bool:
    pairs = value.items() if isinstance(value, dict) else ((value, None),) if value else ()
    return all(PATTERN.fullmatch(str(pattern)) and is_number(number) for pattern, number in pairs)


# LoraConfig's fields that are read here, and what they may say. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change
# the base, too.
READ: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "task_type": lambda value: value in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"),
    "r": lambda value: type(value) is int and value > 0,
    "lora_alpha": is_number,
    "use_rslora": lambda value: value in (None, False, True),
    "rank_pattern": _are_patterns,
    "alpha_pattern": _are_patterns,
    "bias": lambda value: value in (None, "none", "all", "lora_only"),
    "layers_to_transform": lambda value: value is None or isinstance(value, (int, list)),
    "modules_to_save": lambda value: value is None or isinstance(value, list),
    "init_lora_weights": lambda value: value in (None, True, False, "gaussian", "eva", "orthogonal"),
}
# Those that change nothing: peft itself goes by a layer's kind, not by fan_in_fan_out, names in the file say
# which layers have an adapter, and the rest is for training or counts only beside a field that is refused.
INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules",
}  # fmt: skip
UNMERGED = re.compile("PROMPT|P_TUNING|PREFIX|CPT")  # methods that put vectors before or beside the text's
# What a field says that is not used: one of another method, or one that a newer peft added.
OFF: tuple[object, ...] = (None, False, {}, [], "")


class Found(NamedTuple):
    """An adapter's own config and weights, and the file or folder of its base."""

    said: Mapping[str, Any]
    weights: Place
    base: Place


def find_adapter(path: Place, locate: Callable[[str, str | None], Place]) -> Found | None:
    """The adapter that a path is, or is a file of; None for other checkpoints. Reads its config.

    The base lies in the adapter's folder where that holds weights, else where `base_model_name_or_path` says:
    a path from here or from the folder, else `locate(name, revision)`. A path that names the base's own file
    means the base alone, which a warning says. Raises CheckpointError for another method than LoRA, by name.
    """
    folder = path.parent if path.name in ADAPTER_WEIGHTS and path.is_file() else path
    found = {name: folder / name for name in FILES if lies(folder / name)}
    if not found:
        if path.is_file() and (path.parent / ADAPTER_CONFIG).is_file():
            warnings.warn(f"{path}: loaded without the PEFT adapter beside it; open the folder", stacklevel=2)
        return None
    for names in ((ADAPTER_CONFIG,), ADAPTER_WEIGHTS):
        if found.keys().isdisjoint(names):
            raise CheckpointNotFoundError(folder, f"a PEFT adapter without its {' or '.join(names)}")
    said = _config(found[ADAPTER_CONFIG])
    weights = path if path.is_file() else next(found[name] for name in ADAPTER_WEIGHTS if name in found)
    has_base = any((folder / name).is_file() for name in FOLDER_FILES)
    return Found(said, weights, folder if has_base else _base_of(folder, said, locate))


def _base_of(folder: Place, said: Mapping[str, Any], locate: Callable[[str, str | None], Place]) -> Place:
    name: Any = said.get("base_model_name_or_path") or None
    try:
        local = next((at for at in (Path(name), folder / name) if at.exists()), None)
        base = local or locate(name, said.get("revision") or None)
    except (CheckpointError, OSError, TypeError, ValueError) as error:
        said_here = f"base_model_name_or_path={name!r} in {ADAPTER_CONFIG} is not found ({error})"
        raise CheckpointNotFoundError(folder, f"a PEFT adapter without its base: {said_here}") from error
    for file in FILES:
        own, other = folder / file, base / file
        if other.is_file() and not (own.is_file() and _are_same(own, other)):
            do = "merge that one first (peft's merge_and_unload), or remove it if it is unused"
            raise CheckpointError(folder, f"a PEFT adapter whose base, {base}, holds another adapter; {do}")
    return base


def _are_same(own: Place, other: Place) -> bool:
    """Whether two files have one content; of those that lie elsewhere, whether they are one file."""
    if isinstance(own, Path) and isinstance(other, Path):
        return filecmp.cmp(own, other, shallow=False)
    return own == other


def with_adapter(reading: Reading, said: Mapping[str, Any], manifest: Manifest) -> Reading:
    """The reading of a base, with what an opened adapter adds to it and replaces in it.

    Raises CheckpointError for an adapter that does not fit the base.
    """
    base, path = reading.manifest, manifest.path
    if manifest.unreadable:
        raise CheckpointError(path, f"cannot read these tensors:{listed([*manifest.unreadable])}")
    spans = {BESIDE + name: replace(span, name=BESIDE + name) for name, span in manifest.tensors.items()}
    adapters = tuple(_adapters(reading, manifest, said))
    factors = {factor.source for adapter in adapters for factor in (adapter.a, adapter.b)}
    names = {name for name in manifest.tensors if BESIDE + name not in factors}
    again = {name for name in names if WRAPPED.search(name) and WRAPPED.sub(".", name) in manifest.tensors}
    placements, wrong = _replaced(reading, names - again, [*map(str, said["modules_to_save"] or ())])
    wrong += _lacking(reading, said, {adapter.weight for adapter in adapters})
    both = replace(base, tensors={**base.tensors, **spans}, files={**base.files, **manifest.files})
    for end in TIED:
        now, was = (both.tensors[each[end].source] for each in (placements, reading.placements))
        if now.shape != was.shape:
            resized = f"is {now.shape}, in the base {was.shape}. Was it resized (resize_token_embeddings)?"
            do = "Merge it with peft, or save the resized base: base.save_pretrained(…)"
            raise CheckpointError(path, f"{now.name.removeprefix(BESIDE)} {resized} {do}", name=now.name)
    if wrong or not adapters:
        fits = f"{len(adapters)} LoRA layers fit the base {base.path}, and {len(wrong)} tensors do not"
        name = wrong[0].partition(":")[0] if wrong else None
        raise CheckpointError(path, f"{fits}:{listed(wrong)}", name=name)
    return replace(reading, manifest=both, placements=placements, adapters=(*reading.adapters, *adapters))


def _config(path: Place) -> dict[str, Any]:
    """The adapter's config, in which no field is unknown or asks for what is not computed here."""
    said = dict.fromkeys(READ) | {"r": 8, "lora_alpha": 8} | read_json(path)
    if wrong := [key for key in said.keys() - INERT if not READ.get(key, OFF.__contains__)(said[key])]:
        fields = ", ".join(f"{key}={said[key]!r}"[:80] for key in sorted(wrong))
        method = "a LoRA" if said["peft_type"] == "LORA" else "an adapter"
        do = "merge it with peft: model.merge_and_unload().save_pretrained(folder)"
        if UNMERGED.search(str(said["peft_type"])):
            do = "it changes no weights, so nothing can be merged; use it with peft"
        raise CheckpointError(path, f"gpt2lite does not read {method} with {fields}; {do}")
    return said


def _adapters(reading: Reading, manifest: Manifest, said: Mapping[str, Any]) -> Iterator[Adapter]:
    """Every pair of A (r, in) and B (out, r); of an embedding A is (r, vocab_size) and B (emb_dim, r).

    Query, key and value share the A of their fused layer, and take a third of the rows of its B each.
    """
    places = reading.places()
    for name in manifest.tensors:
        found = FACTOR.fullmatch(name)
        other = name.replace(".lora_A", ".lora_B").replace("embedding_A", "embedding_B")
        if not found or other not in manifest.tensors or not _is_targeted(said, found[1]):
            continue
        for ours, placement in places.get(BEFORE.sub("", found[1], count=1) + ".weight", ()):
            a, b = Placement(BESIDE + name), Placement(BESIDE + other, placement.narrows)
            if found[2]:
                a, b = (Placement(each.source, (*each.views, Transpose())) for each in (b, a))
            if bool(found[2]) == ours.endswith("_emb.weight"):
                module = found[1].removeprefix("base_model.model.")
                yield Adapter(ours, a, b, _scale(said, module, manifest.tensors[name]))


def _is_targeted(said: Mapping[str, Any], module: str) -> bool:
    """Whether the config's lists have the layer: peft leaves unread what they do not, as we must not."""
    targets, layers = said.get("target_modules"), said["layers_to_transform"]
    layers = [layers] if isinstance(layers, int) else layers or [block_of(module)]
    is_named = not isinstance(targets, list) or any(f".{module}".endswith(f".{name}") for name in targets)
    return is_named and block_of(module) in layers


def _lacking(reading: Reading, said: Mapping[str, Any], adapted: set[str]) -> list[str]:
    """The layers that the config's lists name and the file has no adapter for; patterns are not followed."""
    targets, excluded = said.get("target_modules"), said.get("exclude_modules") or []
    if targets == "all-linear":
        targets = ["c_attn", "c_fc", "c_proj"]
    if not isinstance(targets, list) or not isinstance(excluded, list):
        return []
    left_out = [f".{name}.weight" for name in (*excluded, *(said["modules_to_save"] or ()))]
    return [
        f"{theirs}: has no LoRA, though {ADAPTER_CONFIG} targets it"
        for theirs, rows in reading.places().items()
        if theirs.endswith(".weight")
        and adapted.isdisjoint(ours for ours, _ in rows)
        and _is_targeted({**said, "target_modules": targets}, theirs.removesuffix(".weight"))
        and not f".{theirs}".endswith(tuple(left_out))
    ]


def _scale(said: Mapping[str, Any], module: str, a: TensorSpan) -> float:
    """alpha / r, or alpha / sqrt(r), by what the first pattern that ends the module's name says of them."""
    r, alpha = (
        next((v for k, v in (said[some] or {}).items() if re.fullmatch(rf"(.*\.)?({k})", module)), said[all_])
        for some, all_ in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    if a.shape[:1] != (r,):
        said_here = f"{a.name} has shape {a.shape}, but {ADAPTER_CONFIG} gives it rank {r}"
        raise CheckpointError(a.source, said_here, name=a.name)
    return float(alpha / math.sqrt(r) if said["use_rslora"] else alpha / r)


def _is_saved(name: str, saved: Collection[str]) -> bool:
    """Whether peft puts a module of the adapter's in the base's place: what else shares it stays as it is."""
    parents = itertools.accumulate(name.split("."), "{}.{}".format)
    return any(parent.endswith(tuple(saved)) for parent in parents)


def _replaced(reading: Reading, names: set[str], saved: list[str]) -> tuple[dict[str, Placement], list[str]]:
    """The placements with what the adapter holds in full (biases, saved modules), and what does not fit.

    A head or an embedding that is not among the saved modules is the base's own; where the two are tied it
    stands for both, the head before the embedding, as peft copies one after the other into it.
    """
    placements, places = dict(reading.placements), reading.places()
    wrong = []
    for name in sorted(names, key=lambda name: (not _is_saved(name, saved), name), reverse=True):
        rows = places.get(BEFORE.sub("", name.replace(".base_layer.", "."), count=1), [])
        if reading.is_tied and rows and rows[0][0] in TIED and not _is_saved(name, saved):
            rows = [(end, rows[0][1]) for end in TIED]
        placements |= {ours: replace(placement, source=BESIDE + name) for ours, placement in rows}
        if not rows:
            wrong.append(f"{name}: not in the base, not targeted by {ADAPTER_CONFIG}, or not of a LoRA")
    for theirs, rows in places.items():
        unchanged = placements[rows[0][0]] == reading.placements[rows[0][0]]
        if unchanged and _is_saved(f"transformer.{theirs}", saved):
            wrong.append(f"{theirs}: missing, though modules_to_save names it")
    return placements, wrong
