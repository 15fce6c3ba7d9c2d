"""A model's name or address → files, local or where they lie, through huggingface_hub: its cache, tokens,
bars and offline mode.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from huggingface_hub import (
    HfApi,
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from gpt2lite.checkpoint import FOLDER_FILES
from gpt2lite.checkpoint.foreign import shortened
from gpt2lite.checkpoint.http_ranges import BUSY, HttpReader, at_address, pause_of, require_as_safe
from gpt2lite.checkpoint.json_text import read_json
from gpt2lite.checkpoint.remote import Located, Remote, RemotePath, TransientError, on_fsspec
from gpt2lite.config import official_name
from gpt2lite.dialects.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError, GPT2LiteError, UsageError

OFFICIAL = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
OFFICIAL["distilgpt2"] = "distilbert/distilgpt2"

CONFIG = "config.json"
INDEX = ".index.json"
WEIGHTS = (*FOLDER_FILES, *ADAPTER_WEIGHTS)  # the first of these is fetched; an index with its shards
# Fetched too, where a repository lists them: configs, and what makes text of tokens.
BESIDE = (
    *(CONFIG, ADAPTER_CONFIG, "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
)

REPO_ID = re.compile(r"(?!.*(--|\.\.)|.{97})\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
ADDRESS = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/?(?P<file>.*)")
RESOLVED = re.compile(r"/(?P<repo>[^/]+/[^/]+)/(resolve|blob|raw)/(?P<revision>[^/]+)/(?P<file>.+)")
SCHEME = re.compile("(hf|https?|s3|gs):/?")
FILE_SUFFIXES = (".bin", ".ckpt", ".gguf", ".h5", ".index", ".json", ".pt", ".pth", ".safetensors", ".zip")

# HTTPError is the root of the client's HTTP library; a captive portal's answer, no JSON, is a ValueError.
CLIENT_ERRORS = (errors.HTTPError, OSError, ValueError)  # type: ignore[attr-defined]
LOG_IN = "run `hf auth login` (older: `huggingface-cli login`), set HF_TOKEN, or pass token="
ELSEWHERE = "download it on a machine that can, and pass the folder"
# What the client raises → what we say; the narrower classes come first.
EXPLAINED: dict[type[Exception], str] = {
    errors.OfflineModeIsEnabled: "not in the cache {cache}{at}, and {why} forbids fetching. "
    f"Allow it once, or {ELSEWHERE}",
    errors.GatedRepoError: f"is gated. Accept its terms at {{hub}}/{{repo}}, then {LOG_IN}",
    errors.RevisionNotFoundError: "has no revision {revision!r}; pass a branch, a tag or a full commit hash",
    errors.RepositoryNotFoundError: "no such file or folder, and no model on {hub} that you can access. "
    f"Check the spelling; if it is private, {LOG_IN}",
    errors.HfHubHTTPError: f"{{hub}} answered {{status}}. Try later, or {ELSEWHERE}; to get access, {LOG_IN}",
    OSError: "cannot be stored in {cache}: {error.strerror}. Pass another cache_dir or set HF_HOME",
    Exception: "cannot be fetched from {hub} ({error!r}), and is not in the cache {cache}{at}. "
    f"Check the network, or {ELSEWHERE}",
}


def fetch(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local file or folder for a name: an existing path as it is, or the snapshot of a Hub model.

    A name on the Hub is one of `OFFICIAL` or `owner/name`; its config and one set of weights, or a PEFT
    adapter, are fetched into the client's cache (`cache_dir`, else HF_HOME's) unless they are there, under
    this name or the short one (`models--gpt2`), as transformers keeps them. What is cached also serves where
    the Hub cannot be reached or must not be (`local_files_only`, HF_HUB_OFFLINE). `revision` is a branch, a
    tag or a commit; `token` None takes HF_TOKEN or the saved login. Holds no weights in memory.

    Raises CheckpointNotFoundError where nothing has this name; CheckpointError where it cannot be fetched (a
    gate, no network, a full disk); UsageError for a revision of a local path.
    """
    if Path(name).exists():
        if revision is not None:
            raise UsageError(f"{name}: a local path has no revision={revision!r}; leave it out")
        return Path(name)
    name = os.fspath(name)
    repo = OFFICIAL.get(official_name(name), name)
    is_path = name.endswith(FILE_SUFFIXES) or name.startswith(".") or os.path.isabs(name)
    if is_path or not REPO_ID.fullmatch(repo):
        also = "" if is_path else f", and not the name of a Hub model ({', '.join(OFFICIAL)} or owner/name)"
        if SCHEME.match(name):
            also = ". An address has two slashes: hf://owner/name, https://…; pass text, as a Path drops one"
        raise CheckpointNotFoundError(name, f"no such file or folder{also}")
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    try:
        if local_files_only:
            raise errors.OfflineModeIsEnabled()
        return _download(repo, revision, token, cache)
    except GPT2LiteError:
        raise
    except CLIENT_ERRORS as error:
        names = () if isinstance(error, errors.RevisionNotFoundError) else _names_of(repo)
        if folder := _cached(names, revision, cache):
            return folder
        raise _explained(error, repo, revision, cache) from error


def elsewhere(address: str, *, revision: str | None = None, token: str | bool | None = None) -> RemotePath:
    """The place that an address or a model's name stands for, to be read there; nothing is written to disk.

    `hf://owner/name[@revision]/file`, or without a file the whole model; `https://…/model.safetensors`, which
    of the Hub itself is the same as hf://; what else fsspec knows, if that is installed. Costs one request of
    a model on the Hub, of other addresses one for the file and one for each of BESIDE.

    Raises CheckpointNotFoundError where nothing lies there, CheckpointError where it cannot be reached,
    UsageError for an address that cannot be read.
    """
    if "://" not in address:
        address = f"hf://{OFFICIAL.get(official_name(address), address)}"
    parts = urlsplit(address)
    is_hub = f"{parts.scheme}://{parts.netloc}" == constants.ENDPOINT
    found = RESOLVED.fullmatch(parts.path) if is_hub else ADDRESS.fullmatch(address)
    if found and REPO_ID.fullmatch(found["repo"]):
        said = found["revision"] and unquote(found["revision"])
        if said and revision and said != revision:
            raise UsageError(f"{address}: names the revision {said}, and revision={revision!r} was passed")
        return _on_hub(found["repo"], said or revision, token, unquote(found["file"]))
    if parts.scheme == "hf":
        raise UsageError(f"{address}: not an address on the Hub; wanted hf://owner/name[@revision]/file")
    if revision is not None:
        raise UsageError(f"{address}: only a model on the Hub has a revision; leave it out")
    if parts.scheme in ("http", "https"):
        return at_address(address, BESIDE)
    return on_fsspec(address)


def _on_hub(repo: str, revision: str | None, token: str | bool | None, file: str) -> RemotePath:
    """A file, or all of them, of a repository as it is now: a commit, which cannot change."""
    try:
        info = HfApi(token=token).model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except CLIENT_ERRORS as error:
        raise _explained(error, repo, revision, None) from error
    names = frozenset(sibling.rfilename for sibling in info.siblings or ())
    if file and not any(name == file or name.startswith(f"{file}/") for name in names):
        where = f"hf://{repo}/{file}"
        raise CheckpointNotFoundError(where, f"not in the repository, which holds {shortened(names)}")
    remote = Remote(f"hf://{repo}", names, partial(_find, repo, f"{info.sha}", token), HttpReader)
    return RemotePath(remote, PurePosixPath(file))


def _find(repo: str, commit: str, token: str | bool | None, name: str) -> Located:
    """Where a file of a commit lies. Its token goes to the Hub's own host alone."""
    address = hf_hub_url(repo, name, revision=commit, endpoint=constants.ENDPOINT)
    try:
        found = get_hf_file_metadata(address, token=token)
    except errors.EntryNotFoundError:
        raise CheckpointNotFoundError(f"hf://{repo}/{name}", "no such file in the repository") from None
    except CLIENT_ERRORS as error:
        answer = getattr(error, "response", None)
        status = getattr(answer, "status_code", None)
        if status is None or status in BUSY:
            raise TransientError(error, pause=pause_of(getattr(answer, "headers", {}))) from None
        raise _explained(error, repo, commit, None) from error
    require_as_safe(address, found.location, f"hf://{repo}/{name}")
    hosts = {urlsplit(each).netloc for each in (found.location, constants.ENDPOINT)}
    headers = {key: value for key, value in build_hf_headers(token=token).items() if len(hosts) == 1}
    tag = found.etag or ""
    stated = tag if re.fullmatch("[0-9a-f]{64}", tag) else None
    if found.size is None:
        raise CheckpointError(f"hf://{repo}/{name}", f"the Hub does not say its size; {ELSEWHERE}")
    return Located(found.location, found.size, tag, headers, stated)


def fetch_file(repo: str, filename: str) -> Path:
    """One file of a Hub model, from the cache if it is there, whichever commit it was.

    Raises CheckpointError as `fetch` does.
    """
    for name in _names_of(repo):
        if isinstance(cached := try_to_load_from_cache(name, filename), str):
            return Path(cached)
    try:  # model_info fails at once, where hf_hub_download tries for half a minute
        HfApi().model_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return Path(hf_hub_download(repo, filename))
    except CLIENT_ERRORS as error:
        raise _explained(error, repo, None, None) from error


def _names_of(repo: str) -> list[str]:
    """The names under which a repository may lie in the cache: its own, and a short one."""
    return [repo, *(short for short, name in OFFICIAL.items() if name == repo)]


def _shards(weights: Path) -> set[str]:
    """The files that an index names; none for weights that are one file."""
    if not weights.name.endswith(INDEX):
        return set()
    placed = read_json(weights).get("weight_map")
    if not isinstance(placed, dict):
        raise CheckpointError(weights, "not an index of shards; expected a weight_map")
    return set(map(str, placed.values()))


def _download(repo: str, revision: str | None, token: str | bool | None, cache: Path | None) -> Path:
    """The snapshot, complete; every file of the commit that the first one came from."""
    found = HfApi(token=token).model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    listed = {sibling.rfilename for sibling in found.siblings or ()}
    weights = next((name for name in WEIGHTS if name in listed), None)
    if weights is None:
        wanted = f"holds no weights that gpt2lite opens; expected {' or '.join(WEIGHTS)}"
        raise CheckpointNotFoundError(repo, f"{wanted}, found {shortened(listed)}")
    kept = _cached(_names_of(repo)[1:], found.sha, cache)
    if kept and (CONFIG not in listed or (kept / CONFIG).exists()):
        return kept
    get = partial(hf_hub_download, repo, token=token, cache_dir=cache)
    adapter = next((name for name in ADAPTER_WEIGHTS if name in listed), weights)  # beside its base
    first, *rest = [name for name in (*BESIDE, adapter, weights) if name in listed]
    folder = Path(get(first, revision=revision)).parent  # snapshots/<commit>
    for name in rest:
        get(name, revision=folder.name)
    shards = _shards(folder / weights)
    if absent := shards - listed:
        raise CheckpointError(repo, f"{weights} names files that are not there: {shortened(absent)}")
    for shard in shards:
        get(shard, revision=folder.name)
    return folder


def _cached(repos: Sequence[str], revision: str | None, cache: Path | None) -> Path | None:
    """The first snapshot of these that lies in the cache with a whole set of weights."""
    for repo, name in itertools.product(repos, WEIGHTS):
        found = try_to_load_from_cache(repo, name, cache_dir=cache, revision=revision)
        folder = Path(found).parent if isinstance(found, str) else None
        if folder and all((folder / shard).exists() for shard in _shards(folder / name)):
            return folder
    return None


def _explained(error: Exception, repo: str, revision: str | None, cache: Path | None) -> CheckpointError:
    """What the client raised, in one line that says what to do."""
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    kind = next(kind for kind in EXPLAINED if isinstance(error, kind))
    status = getattr(getattr(error, "response", None), "status_code", None)
    is_vague = status is None and getattr(error, "errno", None) is None
    kind = Exception if is_vague and kind in (errors.HfHubHTTPError, OSError) else kind
    found = {"repo": repo, "revision": revision, "status": status, "error": error, "hub": constants.ENDPOINT}
    at, place = "" if revision is None else f" at {revision}", cache or constants.HF_HUB_CACHE
    why = "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "local_files_only=True"
    said = EXPLAINED[kind].format(**found, cache=place, at=at, why=why)
    is_absent = kind in (errors.RevisionNotFoundError, errors.RepositoryNotFoundError)
    return (CheckpointNotFoundError if is_absent else CheckpointError)(repo, said)
