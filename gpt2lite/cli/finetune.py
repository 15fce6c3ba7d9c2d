"""`gpt2lite finetune`: train a checkpoint further, on text, instructions or labelled texts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from gpt2lite.cli.arguments import recipe_of
from gpt2lite.cli.loading import choose_by, config_of, load_options
from gpt2lite.cli.plots import plot_losses
from gpt2lite.cli.terminal import QUIET, bytes_bar, one_line, shown_text, steps_bar
from gpt2lite.devices import resolve_device
from gpt2lite.errors import UsageError
from gpt2lite.finetuning.heads import as_classifier, relabel
from gpt2lite.finetuning.loop import Metrics, finetune, read_metrics
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.states import Task, saved_recipe, state_files
from gpt2lite.finetuning.tasks import classifier_task, held_out, instruction_task, text_task, tokens_of
from gpt2lite.generation.prompts import tokenizer_of
from gpt2lite.memory import human
from gpt2lite.model import GPTModel, open_model
from gpt2lite.opening import Opened, locate
from gpt2lite.parallel import is_first, together
from gpt2lite.pruning import keep_blocks
from gpt2lite.tokenizer import Tokenizer


def _task(model: GPTModel, args: argparse.Namespace, recipe: Recipe) -> Task:
    """What the flags name."""
    if args.classify:
        return classifier_task(args.classify, model, recipe)
    if model.config.n_classes:
        found = f"a classifier of {model.config.n_classes} classes"
        raise UsageError(f"{args.path}: {found} writes no text; use --classify")
    if args.instructions:
        return instruction_task(args.instructions, model, recipe)
    return text_task(_tokens(tokenizer_of(model), model.config.vocab_size, args), model, recipe)


def _tokens(encoding: Tokenizer, vocab_size: int, args: argparse.Namespace) -> Tensor:
    """The text's ids, in a file without a name where there will be room for the model, too."""
    folder = next(each for each in (args.out, *args.out.absolute().parents) if each.is_dir())
    return tokens_of(args.text, encoding, vocab_size, folder)


def _pruned(opened: Opened[GPTModel], args: argparse.Namespace) -> Opened[GPTModel]:
    """The checkpoint without the blocks that the text's held-out tenth misses least.

    What is trained on has no say in it, and a resumed run chooses the same ones.
    """
    if args.text is None or args.parallel:
        raise UsageError("--keep-blocks chooses by --text, in one process; else run `gpt2lite prune` first")
    ids = held_out(_tokens(opened.beside.tokenizer, opened.config.vocab_size, args))
    chosen = choose_by(ids, opened, args)
    losses = " → ".join(f"{loss:.4f}" for loss in chosen.losses)
    print(f"blocks {', '.join(map(str, chosen.kept))} of {opened.config.n_layers}, loss {losses}")
    return keep_blocks(opened, chosen.kept)


def _require_same_tokens(teacher: str, encoding: Tokenizer, vocab_size: int) -> None:
    """Raise UsageError where a teacher's ids stand for other texts, as far as a tokenizer beside it tells."""
    opened = open_model(locate(teacher, {}))
    if opened.sizes.vocab_size != vocab_size:
        return  # which `finetune` refuses
    try:
        theirs = opened.beside.tokenizer
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
            rate, memory = f"{metrics.tokens_per_second:.0f} tok/s", human(metrics.memory)
            bar.set_postfix_str(f"loss {metrics.loss:.3f}, {rate}, {memory}")
            if metrics.validation_loss is None or QUIET.get():
                return
            right = "" if metrics.accuracy is None else f"  right {100 * metrics.accuracy:.1f}%"
            losses = f"loss {metrics.loss:.4f}  validation {metrics.validation_loss:.4f}"
            bar.clear()
            print(f"step {metrics.step + 1:5}  {losses}{right}  {rate}  {memory}")
            if metrics.sample is not None:
                print(one_line("       " + " ".join(metrics.sample.split())))

        yield report


def run_finetune(args: argparse.Namespace) -> int:
    """Train, and print where the model is."""
    recipe = recipe_of(args, saved_recipe(args.out) if args.resume else {})
    path = locate(args.path, {"revision": args.revision})
    with together(getattr(args, "mesh", None)):
        opened = open_model(path, config=config_of(args))
    if args.keep_blocks:
        opened = _pruned(opened, args)
    with bytes_bar("loading") as progress:  # in the file's dtype, whatever it trains in: it is saved so
        options = load_options(args, progress)
        model = opened.load(resolve_device(args.device), args.strategy, **options)
    if recipe.teacher:
        _require_same_tokens(recipe.teacher, opened.beside.tokenizer, model.config.vocab_size)
    task = _task(model, args, recipe)
    if args.classify:
        _put_head(opened, model, task.labels, recipe)
    try:
        with _reports(recipe.steps) as report:
            model_path = finetune(model, task, args.out, recipe, resume=args.resume, report=report)
    except KeyboardInterrupt:
        saved = state_files(args.out)
        newest = max(saved, default=0)
        how = f"{saved[newest]} has step {newest} of {recipe.steps}; to go on, add --resume" if saved else ""
        print(f"\n{how or 'nothing was saved yet'}", file=sys.stderr)
        raise
    if not is_first(model.device_mesh):
        return 0
    try:
        plot_losses(read_metrics(args.out), args.out / "loss.png")
    except UsageError as error:  # matplotlib is an extra
        print(f"no loss.png: {error}", file=sys.stderr)
    print(model_path)
    return 0
