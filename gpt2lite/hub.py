"""A model's name → local files, through huggingface_hub: its cache, tokens, bars and offline mode."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its HTTP library's root
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gpt2lite.errors import CheckpointError, CheckpointNotFoundError, GPT2LiteError, UsageError

OFFICIAL = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
OFFICIAL["distilgpt2"] = "distilbert/distilgpt2"

CONFIG = "config.json"
INDEX = ".index.json"
# The first of these that a repository holds is fetched; an index, with the shards that it names.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# What makes text of tokens; fetched where a repository lists it.
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "generation_config.json")
SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")

REPO_ID = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
FILE_SUFFIXES = (".bin", ".ckpt", ".gguf", ".h5", ".index", ".json", ".pt", ".pth", ".safetensors", ".zip")

# ValueError: an answer that is no JSON, as a captive portal gives.
CLIENT_ERRORS = (HTTPError, OSError, ValueError)

LOG_IN = "run `hf auth login` (older: `huggingface-cli login`), set HF_TOKEN, or pass token="
ELSEWHERE = "download it on a machine that can, and pass the folder"
MAX_NAMED = 5


def fetch(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local file or folder for a name: a path that is there, as it is, or a snapshot of a Hub model.

    A name from the Hub is one of `OFFICIAL` or `owner/name`; its config and one set of weights are fetched
    into the client's cache (`cache_dir`, else HF_HOME's), unless they are there, be it under the short name
    (`models--gpt2`), as transformers keeps them. What is cached also serves where the Hub cannot be reached
    or must not be (`local_files_only`, HF_HUB_OFFLINE). `revision` is a branch, a tag or a commit; `token`
    None takes HF_TOKEN or the saved login. Holds no weights in memory.

    Raises CheckpointNotFoundError where nothing has this name, CheckpointError where something stands between
    (a gate, a missing network, a full disk), UsageError for a revision of a local path.
    """
    if Path(name).exists():
        if revision is not None:
            raise UsageError(
                f"{name}: is on this disk, where revision={revision!r} means nothing; leave it out"
            )
        return Path(name)
    repo = _repo_of(os.fspath(name))
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    problem: Exception = OfflineModeIsEnabled("local_files_only=True")
    if not local_files_only:
        try:
            return _download(repo, revision, token, cache)
        except GPT2LiteError:
            raise
        except CLIENT_ERRORS as error:
            problem = error
    names = () if isinstance(problem, RevisionNotFoundError) else _names_of(repo)
    found = next(filter(None, (_cached(name, revision, cache) for name in names)), None)
    if found is None:
        raise _explained(problem, repo, revision, cache) from problem
    return found


def fetch_file(repo: str, filename: str) -> Path:
    """One file of a Hub model, from the cache if it is there, whichever commit it was.

    Raises CheckpointError as `fetch` does.
    """
    for name in _names_of(repo):
        if isinstance(cached := try_to_load_from_cache(name, filename), str):
            return Path(cached)
    try:
        HfApi().model_info(
            repo, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )  # fails at once, where hf_hub_download tries for half a minute
        return Path(hf_hub_download(repo, filename))
    except CLIENT_ERRORS as error:
        raise _explained(error, repo, None, None) from error


def _repo_of(name: str) -> str:
    if name in OFFICIAL:
        return OFFICIAL[name]
    if name.endswith(FILE_SUFFIXES) or name.startswith(".") or os.path.isabs(name):
        raise CheckpointNotFoundError(name, "no such file or folder")
    if not REPO_ID.fullmatch(name) or len(name) > 96:
        raise CheckpointNotFoundError(
            name,
            f"no such file or folder, and no name of a model on the Hub, which is one of "
            f"{', '.join(OFFICIAL)} or owner/name",
        )
    return name


def _names_of(repo: str) -> list[str]:
    """The names under which a repository may lie in the cache: its own, and a short one."""
    return [repo, *(short for short, name in OFFICIAL.items() if name == repo)]


def _shards(weights: Path) -> list[str]:
    """The files that an index names; none for weights that are one file."""
    if not weights.name.endswith(INDEX):
        return []
    try:
        return sorted(set(map(str, json.loads(weights.read_bytes())["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(weights, "no index of shards; wanted JSON with a weight_map") from None


def _download(repo: str, revision: str | None, token: str | bool | None, cache: Path | None) -> Path:
    """The snapshot, complete; every file of the commit that the first one came from."""
    found = HfApi(token=token).model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    listed = {sibling.rfilename for sibling in found.siblings or ()}
    weights = next((name for name in WEIGHTS if name in listed), None)
    if weights is None:
        raise CheckpointNotFoundError(
            repo,
            f"holds no weights that gpt2lite opens; wanted {' or '.join(WEIGHTS)}, found {_named(listed)}",
        )
    for short in _names_of(repo)[1:]:
        if (folder := _cached(short, found.sha, cache)) and (
            CONFIG not in listed or (folder / CONFIG).exists()
        ):
            return folder
    get = partial(hf_hub_download, repo, token=token, cache_dir=cache)
    first, *rest = [name for name in (CONFIG, weights, *TOKENIZER, *SETTINGS) if name in listed]
    folder = Path(get(first, revision=revision)).parent  # snapshots/<commit>
    for name in rest:
        get(name, revision=folder.name)
    shards = _shards(folder / weights)
    if absent := [shard for shard in shards if shard not in listed]:
        raise CheckpointError(repo, f"{weights} names files that are not there: {_named(absent)}")
    for shard in shards:
        get(shard, revision=folder.name)
    return folder


def _cached(repo: str, revision: str | None, cache: Path | None) -> Path | None:
    """The snapshot as it lies in the cache, None unless it has a whole set of weights."""

    def find(name: str) -> Path | None:
        found = try_to_load_from_cache(repo, name, cache_dir=cache, revision=revision)
        return Path(found) if isinstance(found, str) else None

    sets = filter(None, map(find, WEIGHTS))
    return next((found.parent for found in sets if all(map(find, _shards(found)))), None)


def _named(names: set[str] | list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return (", ".join(sorted(names)[:MAX_NAMED]) or "nothing") + more


def _explained(
    error: Exception, repo: str, revision: str | None, cache: Path | None
) -> CheckpointError:  # the narrower classes first: GatedRepoError is a RepositoryNotFoundError
    """What the client raised, in one line that says what to do."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    kept, hub = cache or constants.HF_HUB_CACHE, constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "local_files_only=True"
        return CheckpointError(
            repo,
            f"not in the cache {kept}{_at(revision)}, and {why} forbids to fetch it. "
            f"Allow that once, or {ELSEWHERE}.",
        )
    if isinstance(error, GatedRepoError):
        return CheckpointError(
            repo, f"is gated, and you were not let in. Accept its terms on {hub}/{repo}, then {LOG_IN}."
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointNotFoundError(
            repo, f"has no revision {revision!r}; wanted a branch, a tag or a whole commit hash"
        )
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointNotFoundError(
            repo,
            f"no such file or folder, and no such model on {hub} that you may see. "
            f"Check the spelling; if it is private, {LOG_IN}.",
        )
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        do = (
            f"If it is about rights, {LOG_IN}" if status in (401, 403) else f"Try again later, or {ELSEWHERE}"
        )
        return CheckpointError(repo, f"{hub} answered {status}. {do}.")
    if isinstance(error, OSError) and error.errno is not None:
        return CheckpointError(
            repo, f"cannot be kept in {kept}: {error.strerror}. Pass another cache_dir or set HF_HOME."
        )
    said = str(error).strip().partition("\n")[0]
    return CheckpointError(
        repo,
        f"cannot be fetched from {hub} ({type(error).__name__}: {said}), and is not in the cache "
        f"{kept}{_at(revision)}. Check the network, or {ELSEWHERE}.",
    )


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at {revision}"
