"""``difftrain sample``: text from a run's model."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from difftrain.cli.trained import add_checkpoint, add_computing


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sample",
        help="write text with a trained model",
        description="Write text with a trained model: from nothing, after a prompt, or into the gaps of a text.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--prompt", default="", metavar="TEXT", help="the text begins with this")
    start.add_argument("--infill", metavar="TEXT", help="fill the gaps: ____ is four [MASK]s, _____ five, "
                       "[[gap]] as many as the model chooses")  # fmt: skip
    start.add_argument(
        "--held_out", action="store_true", help="mask and restore a piece of the validation text"
    )
    parser.add_argument(
        "--gap_lengths", type=_lengths, metavar="N-N", help="of each [[gap]], the shortest and the longest [1-16]"
    )  # fmt: skip
    parser.add_argument(
        "--allow_changed_data", action="store_true", help="take it though the data is not what it was"
    )
    parser.add_argument("--share", type=float, default=0.15, help="share masked with --held_out [0.15]")
    parser.add_argument(
        "--length", type=int, metavar="N",
        help="tokens a text; beyond block_size the model sees a part of it at a time [block_size]",
    )  # fmt: skip
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="texts, in one batch [1]")
    parser.add_argument(
        "--policy", default="", metavar="NAME",
        help="fill, confidence, margin, entropy, ancestral, remask, remask_untrained or edit "
        "[fill; confidence where the recipe is llada or mdlm]",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, metavar="N",
        help="passes of the model for a text, the last of which fills what is left "
        "[64 a block_size of text; with fill one more]",
    )  # fmt: skip
    parser.add_argument(
        "--schedule", metavar="NAME", help="words a pass, best first: linear or cosine [linear]"
    )
    parser.add_argument(
        "--suspect", type=float, metavar="P",
        help="with policy remask: the probability of [MASK] above which a word goes back [0.1]",
    )  # fmt: skip
    parser.add_argument(
        "--block_length", type=int, metavar="N",
        help="tokens that are written before the next ones are begun [all; half of block_size in longer texts]",
    )  # fmt: skip
    parser.add_argument(
        "--approximate", action="store_true",
        help="faster: after its first pass, only a block's own tokens go through the model",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="divides the logits; 0: greedy [0.8]"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, metavar="N", help="sample among the best N; 0: all [0]"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, metavar="P", help="among the best that hold this share [1]"
    )
    parser.add_argument(
        "--min_p", type=float, default=0.0, metavar="P",
        help="among those at least this share as likely as the best [0]",
    )  # fmt: skip
    parser.add_argument(
        "--repetition", type=float, default=1.0, metavar="X",
        help="divides the odds of words that stand within 32 places before [1]",
    )  # fmt: skip
    parser.add_argument(
        "--show", action="store_true", help="show on the terminal how the first text settles, pass by pass"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write how it settles as a page on its own"
    )
    parser.add_argument(
        "--gif", type=Path, metavar="FILE", help="write how it settles as a moving picture (extra: plot)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling, and of the held-out piece [0]")
    add_checkpoint(parser)
    add_computing(parser, "auto")
    parser.set_defaults(command=_run, parser=parser)


def _lengths(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


_lengths.__name__ = "range of lengths"  # what argparse calls it in "invalid ... value"


def _run(args: argparse.Namespace) -> None:
    from difftrain.progress import quiet
    from difftrain.reporting.page.writing import check_place
    from difftrain.sampling.picture import check_gif, write_gif
    from difftrain.sampling.showing import Frames, Terminal, mask_sign, write_page
    from difftrain.sampling.texts import SampleRequest, keep_sample, sample_run

    names = {field.name for field in dataclasses.fields(SampleRequest)}
    request = SampleRequest(**{name: value for name, value in vars(args).items() if name in names})
    if args.html:
        check_place(args.html)
    if args.gif:
        check_gif(args.gif)
    watch: Frames | None = None
    if args.show and sys.stdout.isatty():
        watch = Terminal(mask_sign())
    elif args.html or args.gif:
        watch = Frames("\u2591")
    with quiet(args.quiet or isinstance(watch, Terminal)):
        sample = sample_run(args.run, request, watch)
    if isinstance(watch, Terminal):
        watch.clear()
    try:
        print(sample.text, flush=True)
    finally:  # kept even where nobody reads on, and a failure to keep it loses nothing that was shown
        try:
            keep_sample(args.run, sample)
        except OSError as error:
            print(f"difftrain: warning: no copy of the text is kept: {error}", file=sys.stderr)
    if args.gif:
        write_gif(watch.frames, args.gif)
    if args.html:
        write_page(watch.frames, args.html, f"{args.run.resolve().name}, step {sample.step}")
