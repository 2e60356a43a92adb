"""``difftrain repair``: a text's wrong words found, and written anew."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from difftrain.cli.trained import add_checkpoint, add_computing

if TYPE_CHECKING:
    from difftrain.sampling.repairing import RepairRequest

TRIAL_OPTIONS = ("errors", "seed", "allow_changed_data")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "repair",
        help="find and replace the wrong words of a text",
        description="Find the words of a text that a trained model thinks wrong, write them anew, and print the "
        "repaired text.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "file", metavar="FILE", type=Path, nargs="?", help="a text, or - for standard input"
    )
    parser.add_argument(
        "--held_out", action="store_true",
        help="instead of FILE: plant errors in a piece of the validation text, and show what becomes of them",
    )  # fmt: skip
    parser.add_argument(
        "--errors", type=float, metavar="PERCENT", help="with --held_out: words that are made wrong [5]"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="with --held_out: which piece, and errors [0]"
    )
    parser.add_argument(
        "--allow_changed_data", action="store_true", default=None,
        help="with --held_out: take the text even if the data has changed since the training",
    )  # fmt: skip
    parser.add_argument(
        "--gif", type=Path, metavar="FILE",
        help="with --held_out: write what becomes of them as a moving picture (extra: plot)",
    )  # fmt: skip
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--diff", action="store_true", help="print the changed lines alone, changed words marked"
    )
    shown.add_argument(
        "--json", action="store_true", help="print the text and its edits as one JSON object"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing, name what is suspected; exit code 1 if anything is",
    )
    parser.add_argument(
        "--suspect", type=float, default=0.5, metavar="P",
        help="take a word for wrong from this probability on [0.5]",
    )  # fmt: skip
    parser.add_argument(
        "--sure", type=float, default=0.9, metavar="P",
        help="replace it where the new word has at least this probability; 0: always [0.9]",
    )  # fmt: skip
    parser.add_argument(
        "--max_changes", type=int, metavar="N", help="at most N suspects, the most suspected first [all]"
    )
    parser.add_argument(
        "--steps", type=int, default=8, metavar="N", help="passes that write a window's words anew [8]"
    )
    parser.add_argument(
        "--keep_unknown", action="store_true", help="leave characters outside the vocabulary as they are"
    )
    add_checkpoint(parser)
    add_computing(parser, "auto")
    parser.set_defaults(command=_run, parser=parser)


def _run(args: argparse.Namespace) -> int:
    from difftrain.errors import UserError
    from difftrain.sampling.loaded import load
    from difftrain.sampling.marking import diff_lines, place_lines, to_json
    from difftrain.sampling.repairing import RepairRequest

    if args.diff and args.check:
        raise UserError("--diff shows what was changed, and --check changes nothing")
    if (args.file is None) != args.held_out:
        raise UserError("give either FILE, which - makes standard input, or --held_out")
    names = [field.name for field in dataclasses.fields(RepairRequest)]
    options = {name: getattr(args, name) for name in names}
    request = RepairRequest(**options)  # before a model is loaded
    if args.held_out:
        return _run_held_out(args, request)
    for name in (*TRIAL_OPTIONS, "gif"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} goes with --held_out alone")
    name, text = _read(args.file)
    repaired = load(args.run, args.checkpoint, args.device, args.dtype).repair(text, **options)
    if args.json:
        _write(to_json(repaired) + "\n")
    elif args.check:
        _write("".join(f"{line}\n" for line in place_lines(name, repaired)))
    elif args.diff:
        _write("".join(f"{line}\n" for line in diff_lines(text, repaired, is_coloured=_is_coloured())))
    else:
        _write(repaired.text)
    return int(args.check and bool(repaired.edits))


def _run_held_out(args: argparse.Namespace, how: RepairRequest) -> int:
    from difftrain.errors import UserError
    from difftrain.sampling.marking import marked
    from difftrain.sampling.picture import check_gif, write_gif
    from difftrain.sampling.showing import Frames
    from difftrain.sampling.trial import TrialRequest, try_repair
    from difftrain.sampling.trial_frames import frames_of

    for name in ("diff", "json", "check", "keep_unknown"):
        if getattr(args, name):
            raise UserError(f"--{name} goes with FILE alone")
    given = {name: getattr(args, name) for name in TRIAL_OPTIONS if getattr(args, name) is not None}
    request = TrialRequest(checkpoint=args.checkpoint, device=args.device, dtype=args.dtype, **given)
    watch = None
    if args.gif:
        check_gif(args.gif)
        watch = Frames("\u2591")
    trial = try_repair(args.run, request, how, watch)
    show = partial(marked, is_coloured=_is_coloured())
    parts = [
        "--- held-out text",
        trial.original,
        f"--- with {len(trial.planted)} words made wrong, and what the model suspects marked",
        show(trial.wrong, trial.suspects),
        "--- repaired, what was changed marked",
        show(trial.wrong, trial.repair.edits),
        f"--- {trial.summary}",
    ]
    _write("\n".join(parts) + "\n")
    if watch:
        frames, durations = frames_of(trial, watch.frames)
        write_gif(frames, args.gif, durations)
    return 0


def _is_coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _read(file: Path) -> tuple[str, str]:
    """What a text is called, and the text as it is; raises UserError where it is none."""
    from difftrain.data.texts import NotText, decode_text
    from difftrain.errors import UserError

    is_piped = str(file) == "-"
    if is_piped and sys.stdin is None:
        raise UserError("standard input is closed; give a file")
    name = "standard input" if is_piped else str(file)
    try:
        text = decode_text(sys.stdin.buffer.read() if is_piped else file.read_bytes(), "keep")
    except NotText as what:
        raise UserError(f"{name} cannot be repaired: it is {what}") from None
    return name, text


def _write(text: str) -> None:
    """A text to standard output as it is, whatever encoding and line ends that has."""
    sys.stdout.flush()
    binary = getattr(sys.stdout, "buffer", None)
    if binary:
        binary.write(text.encode("utf-8", "surrogatepass"))
        binary.flush()
    else:
        sys.stdout.write(text)
