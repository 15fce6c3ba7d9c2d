"""Files that look like checkpoints but are not: tables that say what each is and what to do.

Formats by their first bytes: ggml's docs/gguf.md; onnx.proto, whose field 1 is ir_version, 2 the producer's
name and 7 the graph; msgpack's spec, of which Flax's files begin with a map and a string.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

DAMAGED = "truncated or damaged; copy or download it again"
MAX_SHOWN = 5  # names in a message
RESAVE = "Where it was made, save only the weights: torch.save(model.state_dict(), 'model.pth')"
UNPACK = "unpack it first, and pass what is in it"
ORIGINAL = "pass the checkpoint that it was converted from (model.safetensors or pytorch_model.bin)"
CONVERT = "save it as safetensors with transformers 4"
FIRST_BYTES = (
    (rb"\Z", "empty. Copy or download it again."),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull` in its clone"),
    (rb"(\xef\xbb\xbf)?\s*<[!?a-z]", "a web page; log in if it asks for that, then download the file itself"),
    (rb"\x1f\x8b", f"compressed with gzip; {UNPACK}"),
    (rb"BZh\d", f"compressed with bzip2; {UNPACK}"),
    (rb"\xfd7zXZ\0", f"compressed with xz; {UNPACK}"),
    (rb"\x28\xb5\x2f\xfd", f"compressed with zstd; {UNPACK}"),
    (rb"GGUF|(lm|fm|tj|la)gg", f"a GGUF or ggml file of llama.cpp; {ORIGINAL}"),
    (rb"\x89HDF\r\n", f"HDF5, as Keras writes tf_model.h5; {CONVERT} (from_tf=True)"),
    (rb"\x08[\x02-\x20][\x12\x3a]", f"an ONNX graph; {ORIGINAL}"),
    (rb"([\x81-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9]", f"Flax's msgpack; {CONVERT} (from_flax=True)"),
    (rb"\x93NUMPY", "one NumPy array; a checkpoint names its tensors: torch.save({name: tensor, …}, path)"),
    (rb".{257}ustar", f"a tar archive; {UNPACK}. If torch before 0.1.10 wrote it, load it there. {RESAVE}"),
    (rb"\x80", f"a bare pickle, readable only by running it. {RESAVE}"),
    (rb"model_checkpoint_path", "TensorFlow's list of checkpoints; pass its folder or a checkpoint's .index"),
    (rb"[\t\n\r -~][\t\n\r -~\x80-\xff]*\Z", "text, not weights; if you downloaded it, try again"),
)
READABLE = (
    "wanted a file of torch.save (zip or older), safetensors, an index of shards, the index of a TensorFlow "
    "checkpoint (not its data), or llm.c's .bin"
)
FROM_SCRIPT = "torch.save({n.replace('|', '.'): t for n, t in torch.jit.load(path).state_dict().items()}, …)"


def what_is(head: bytes) -> str | None:
    """What a file with these first bytes is, and what to do; None where no row knows them."""
    rows = ((re.match(pattern, head, re.DOTALL | re.IGNORECASE), said) for pattern, said in FIRST_BYTES)
    return next((said for found, said in rows if found), None)


def what_is_json(tree: Mapping[str, object]) -> str:
    """What a JSON object that is no index of shards is, and what to do."""
    if error := next((tree[key] for key in ("error", "message", "detail") if key in tree), None):
        return f"a server's error ({str(error)[:80]}); download the file again, logged in if it is private"
    if tree.keys() & {"architectures", "model_type", "n_layer", "n_layers", "_name_or_path"}:
        return "a model's config; pass its folder, or the weights file"
    return "JSON, not weights; pass the weights file"


def what_is_zip(names: Collection[str]) -> str:
    """What a zip is that torch.save did not write, by the names of its entries, and what to do."""
    if any(name.endswith("/constants.pkl") for name in names):
        return f"a TorchScript program, or Rust's .ot; make it a state dict: {FROM_SCRIPT}"
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy's .npz; torch.save({n: torch.from_numpy(a) for n, a in numpy.load(path).items()}, …)"
    return f"a zip without data.pkl, so torch.save did not write it; it holds {shortened(names)}: {UNPACK}"


def shortened(names: Iterable[str]) -> str:
    """Some names, and how many more there are."""
    found = sorted(names)
    more = f" and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
    return (", ".join(found[:MAX_SHOWN]) or "nothing") + more
