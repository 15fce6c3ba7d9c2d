"""What a classifier says of a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, overload

import torch
from torch.nn.utils.rnn import pad_sequence

from gpt2lite.config import Purpose
from gpt2lite.errors import UsageError
from gpt2lite.generation.decoding import NOT_FINITE
from gpt2lite.generation.engines import LanguageModel, in_eval_mode
from gpt2lite.generation.prompts import tokenizer_of
from gpt2lite.loading.options import Progress
from gpt2lite.parallel import no_gradients, rest
from gpt2lite.tokenizer import Encoding, end_of_text

TEXTS_AT_ONCE = 8


class Classification(NamedTuple):
    """The likeliest label of a text, and the probability of each label, in the order of the head's rows."""

    label: str
    probabilities: dict[str, float]


class Classifier(LanguageModel, Protocol):
    """A model with a head of classes, and what it was trained for."""

    purpose: Purpose


def ids_to_classify(ids: list[int], encoding: Encoding, seq_len: int) -> list[int]:
    """What is read of a text's ids: the first seq_len; of an empty text the token that ends one."""
    return ids[:seq_len] or [end_of_text(encoding)]


@overload
def classify(  # type: ignore[overload-overlap]  # a str is one text, not several
    model: Classifier, texts: str, *, encoding: Encoding | None = None
) -> Classification: ...


@overload
def classify(
    model: Classifier,
    texts: Iterable[str],
    *,
    encoding: Encoding | None = None,
    progress: Progress | None = None,
) -> list[Classification]: ...


def classify(
    model: Classifier,
    texts: str | Iterable[str],
    *,
    encoding: Encoding | None = None,
    progress: Progress | None = None,
) -> Classification | list[Classification]:
    """Which class a text belongs to, or each of several texts.

    As `finetune` trains and transformers' GPT2ForSequenceClassification computes: by the logits of the last
    token of each text, of which as many are read as in training (`purpose.seq_len`, else the context). The
    tokenizer is that of the model's checkpoint, or `encoding`; special tokens are plain text. Costs the
    activations of TEXTS_AT_ONCE texts, padded to the longest. Dropout is off in any mode; `progress` is
    called with (texts done, texts in all).

    Raises UsageError for a model without classes or without their names, for what is no text, and for logits
    that are NaN or infinite.
    """
    require_labels(model)
    rows = [texts] if isinstance(texts, str) else list(texts)
    if not all(isinstance(row, str) for row in rows):
        raise UsageError("classify wants a text or several, each a str")
    tokenizer, most = tokenizer_of(model, encoding), model.config.context_length
    ids, seq_len = map(tokenizer.encode_ordinary, rows), min(model.purpose.seq_len or most, most)
    read = [ids_to_classify(each, tokenizer, seq_len) for each in ids]
    found: list[Classification] = []
    for start in range(0, len(read), TEXTS_AT_ONCE):
        found += _classified(model, read[start : start + TEXTS_AT_ONCE])
        if progress:
            progress(len(found), len(rows))
    rest(model)
    return found[0] if isinstance(texts, str) else found


def require_labels(model: Classifier) -> None:
    """Raise UsageError for a model that is no classifier, or whose classes have no names."""
    n_classes, labels = model.config.n_classes, model.purpose.labels
    if not n_classes:
        raise UsageError("this model has no classes; `gpt2lite finetune --classify` trains them")
    if len(labels) != n_classes:
        found = f"this classifier has {n_classes} classes and {len(labels)} names for them"
        raise UsageError(f"{found}; write labels.json beside it, one name per row of the head")


def _classified(model: Classifier, ids: Sequence[list[int]]) -> Iterator[Classification]:
    """Of rows of any lengths, padded on the right, where nothing before sees it."""
    like, labels = model.pos_emb.weight, model.purpose.labels
    padded = pad_sequence([torch.tensor(row, device="cpu") for row in ids], batch_first=True)
    with no_gradients(model), in_eval_mode(model):
        hidden = model.hidden(padded.to(like.device))
        logits = model.out_head(hidden[range(len(ids)), [len(row) - 1 for row in ids]]).float()
    if not bool(logits.isfinite().all()):
        raise UsageError(NOT_FINITE.format("logits are NaN or infinite", like.dtype))
    for shares in logits.softmax(-1).tolist():
        likeliest = labels[shares.index(max(shares))]
        yield Classification(likeliest, dict(zip(labels, shares, strict=True)))
