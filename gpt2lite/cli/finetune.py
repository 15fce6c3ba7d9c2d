"""`gpt2lite finetune`: train a checkpoint further, on text, instructions or labelled texts."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from gpt2lite.cli.arguments import recipe_of
from gpt2lite.cli.loading import choose_by, config_of, load_options
from gpt2lite.cli.plots import plot_losses
from gpt2lite.cli.terminal import bytes_bar, shown_text, steps_bar
from gpt2lite.devices import resolve_device
from gpt2lite.errors import UsageError
from gpt2lite.finetuning.heads import as_classifier, relabel
from gpt2lite.finetuning.loop import Metrics, finetune, read_metrics
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.states import Task, saved_recipe
from gpt2lite.finetuning.tasks import classifier_task, held_out, instruction_task, open_text, text_task
from gpt2lite.memory import human
from gpt2lite.model import GPTModel, open_model
from gpt2lite.opening import Opened, locate
from gpt2lite.parallel import is_first
from gpt2lite.pruning import keep_blocks
from gpt2lite.tokenizer import Tokenizer, tokenizer_files, tokenizer_for, write_beside


def _task(model: GPTModel, encoding: Tokenizer, args: argparse.Namespace, recipe: Recipe) -> Task:
    """What the flags name."""
    config = model.config
    if args.classify:
        return classifier_task(args.classify, encoding, config, recipe)
    if config.n_classes:
        found = f"a classifier of {config.n_classes} classes"
        raise UsageError(f"{args.path}: {found} writes no text; use --classify")
    if args.instructions:
        return instruction_task(args.instructions, encoding, config, recipe)
    return text_task(_tokens(encoding, config.vocab_size, args), encoding, config, recipe)


def _tokens(encoding: Tokenizer, vocab_size: int, args: argparse.Namespace) -> Tensor:
    """The text's ids."""
    with tempfile.TemporaryDirectory(prefix="gpt2lite-") as folder:  # what is mapped stays without its name
        return open_text(args.text, Path(folder) / "tokens.npy", encoding, vocab_size)


def _pruned(opened: Opened[GPTModel], args: argparse.Namespace) -> Opened[GPTModel]:
    """The checkpoint without the blocks that the text's held-out tenth misses least.

    What is trained on has no say in it, and a resumed run chooses the same ones.
    """
    if args.text is None or args.parallel:
        raise UsageError("--keep-blocks chooses by --text, in one process; else run `gpt2lite prune` first")
    vocab_size = opened.config.vocab_size
    ids = held_out(_tokens(tokenizer_for(opened.path, vocab_size), vocab_size, args))
    chosen = choose_by(ids, opened, args)
    losses = " → ".join(f"{loss:.4f}" for loss in chosen.losses)
    print(f"blocks {', '.join(map(str, chosen.kept))} of {opened.config.n_layers}, loss {losses}")
    return keep_blocks(opened, chosen.kept)


def _require_same_tokens(teacher: str, encoding: Tokenizer, vocab_size: int) -> None:
    """Raise UsageError where a teacher's ids stand for other texts, as far as a tokenizer beside it tells."""
    path = locate(teacher, {})
    if open_model(path).sizes.vocab_size != vocab_size:
        return  # which `finetune` refuses
    try:
        theirs = tokenizer_for(path, vocab_size)
    except UsageError:  # there is none
        return
    for token in range(vocab_size):
        said, wanted = (each.decode_single_token_bytes(token) for each in (theirs, encoding))
        if said != wanted:
            differs = f"its token {token} is {said!r}, the student's {wanted!r}"
            raise UsageError(f"--teacher {teacher}: {differs}; both must use the same tokenizer")


def _put_head(opened: Opened[GPTModel], model: GPTModel, labels: tuple[str, ...], recipe: Recipe) -> None:
    """A head for the labels, in which a classifier's own rows are kept by name."""
    if not model.config.n_classes:
        as_classifier(model, len(labels), recipe.seed)
        return
    if not (known := opened.labels):
        found = f"no names for a head of {model.config.n_classes} classes"
        raise UsageError(f"{opened.path}: {found}; write labels.json, one name per row of the head")
    if known != labels:
        kept = relabel(model, known, labels, recipe.seed)
        parts = {"kept": kept, "new": set(labels) - set(kept), "dropped": set(known) - set(kept)}
        said = (f"{what}: {', '.join(sorted(names)) or 'none'}" for what, names in parts.items())
        print(shown_text("labels " + "; ".join(said)))


@contextmanager
def _reports(steps: int) -> Iterator[Callable[[Metrics], None]]:
    """A bar, and a line for every validation."""
    with steps_bar([""] * steps, "training") as bar:

        def report(metrics: Metrics) -> None:
            bar.update(metrics.step + 1 - bar.n)
            rate, memory = f"{metrics.tokens_per_second:.0f} tokens/s", human(metrics.memory)
            bar.set_postfix_str(f"loss {metrics.loss:.3f}, {rate}, {memory}")
            if metrics.validation_loss is None:
                return
            right = "" if metrics.accuracy is None else f"  right {100 * metrics.accuracy:.1f} %"
            losses = f"loss {metrics.loss:.4f}  validation {metrics.validation_loss:.4f}"
            bar.clear()
            print(f"step {metrics.step + 1:5}  {losses}{right}  {rate}  {memory}")
            if metrics.sample is not None:
                print(shown_text("       " + " ".join(metrics.sample.split())[:100]))

        yield report


def run_finetune(args: argparse.Namespace) -> int:
    """Train, and print where the model is."""
    recipe = recipe_of(args, saved_recipe(args.out) if args.resume else {})
    path = locate(args.path, {"revision": args.revision})
    opened = open_model(path, config=config_of(args))
    if args.keep_blocks:
        opened = _pruned(opened, args)
    with bytes_bar("loading") as progress:  # in the file's dtype, whatever it trains in: it is saved so
        options = load_options(args, progress)
        model = opened.load(resolve_device(args.device), args.strategy, **options)
    encoding = tokenizer_for(path, model.config.vocab_size)
    if recipe.teacher:
        _require_same_tokens(recipe.teacher, encoding, model.config.vocab_size)
    task = _task(model, encoding, args, recipe)
    if args.classify:
        _put_head(opened, model, task.labels, recipe)
    with _reports(recipe.steps) as report:
        model_path = finetune(model, task, args.out, recipe, resume=args.resume, report=report)
    if not is_first(model.device_mesh):
        return 0
    write_beside(model_path, tokenizer_files(path))
    try:
        plot_losses(read_metrics(args.out), args.out / "loss.png")
    except UsageError as error:  # matplotlib is an extra
        print(f"no loss.png: {error}", file=sys.stderr)
    print(model_path)
    return 0
