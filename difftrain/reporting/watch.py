"""Watching a run in the terminal while it goes on: nothing but reading, at 80 columns, until it ends."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from difftrain.config import Config
from difftrain.errors import UserError
from difftrain.reporting.health import Health, HealthWarning, number
from difftrain.reporting.lines import console_line, verdict
from difftrain.reporting.log import FILE, parse_record
from difftrain.reporting.runs import config_of, read_values
from difftrain.reporting.sessions import is_gone, read_sessions

COLUMNS = 80  # at most; narrower terminals get less
BAR = 40
ANSWERS = {"target": "the target", "mask": "[MASK]", "other": "another"}
BLOCKS = {
    True: {"target": "█", "mask": "▒", "other": "░"},
    False: {"target": "#", "mask": "m", "other": "."},
}
SPARKS = {True: "▁▂▃▄▅▆▇█", False: "_.-=+*%#"}
TREND = 24  # evaluations or training records in a trend
SPEED_RECORDS = 10  # over which the speed is taken


class Follower:
    """Reads the records that come to a run's ``metrics.jsonl``; from the beginning again where it was written anew."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / FILE
        self._place: tuple[int, int] | None = None  # device and inode of the file that is read
        self._offset, self._rest = 0, b""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """What is new, and whether the file begins anew, so that all from before is void."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                is_new = (stat.st_dev, stat.st_ino) != self._place or stat.st_size < self._offset
                if is_new:
                    self._place, self._offset, self._rest = (stat.st_dev, stat.st_ino), 0, b""
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            is_new, self._place = self._place is not None, None
            return [], is_new
        self._offset += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        return list(filter(None, map(parse_record, lines))), is_new


class Watched:
    """What is known of a run so far, from the records that were read."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._follower = Follower(run_dir)
        self.config: Config | None = None
        self._forget()

    def _forget(self) -> None:
        self.train: list[dict[str, Any]] = []
        self.evals: list[dict[str, Any]] = []
        self.warnings: list[HealthWarning] = []
        self.config = config_of(read_values(self.run_dir))
        self._health = Health(self.config)

    def look(self) -> list[dict[str, Any]]:
        """Read what has come; returns the new records."""
        new, is_anew = self._follower.read()
        if is_anew or self.config is None:
            self._forget()
        for record in new:
            if record["kind"] in ("train", "eval"):
                (self.train if record["kind"] == "train" else self.evals).append(record)
                self.warnings += self._health.see(record)
        return new

    @property
    def step(self) -> int:
        return max(
            [r["step"] + (r["kind"] == "train") for r in (*self.train[-1:], *self.evals[-1:])], default=0
        )

    def end(self) -> str:
        """How the run has ended; empty while it goes on, or is yet to begin."""
        sessions = read_sessions(self.run_dir)
        is_done = bool(self.config and self.evals and self.evals[-1]["step"] >= self.config.max_iters)
        if sessions and sessions[-1]["event"] == "end":
            how = str(sessions[-1].get("how", "ended"))
            done = f"{self.step} steps are done"
            return (
                f"finished, {done}"
                if is_done
                else f"stopped, {done}"
                if how == "ended"
                else f"{how}; {done}"
            )
        if is_gone(sessions):
            return f"the run's process is gone; {self.step} steps are done"
        return f"finished, {self.step} steps are done" if is_done and not sessions else ""


def watch_run(run_dir: Path, *, interval: float = 1.0, is_once: bool = False) -> None:
    """Show a run until it ends: on a terminal one picture that changes, else a line for each record.

    The run is only read, and nothing of it is locked, so that it goes on as if unwatched.

    Args:
        run_dir: the run's folder; it may be missing yet.
        interval: seconds between two looks, more than 0.
        is_once: show it as it is, and return.

    Raises:
        UserError: the interval is no such number; or, with ``is_once``, there are no records.
    """
    if not 0.0 < interval < 1e6:
        raise UserError(f"interval must be above 0 seconds, got {interval}")
    watched, is_terminal = Watched(run_dir), sys.stdout.isatty()
    is_fine = (sys.stdout.encoding or "").lower().startswith("utf")
    n_shown, n_warned, is_waiting = 0, 0, False
    while True:
        new = watched.look()
        end = watched.end()
        if is_once and not (watched.train or watched.evals):
            raise UserError(f"{run_dir} has no records yet")
        if is_terminal or is_once:
            width = min(COLUMNS, shutil.get_terminal_size((COLUMNS, 24)).columns)
            lines = [line[:width] for line in frame(watched, is_fine=is_fine)]
            # Up to the first line again, each line cleared as it is written, and what is left below.
            above = f"\x1b[{n_shown}A" if n_shown else ""
            body = "".join(f"{line}\x1b[K\n" if is_terminal else f"{line}\n" for line in lines)
            print(f"{above}{body}" + "\x1b[J" * is_terminal, end="", flush=True)
            n_shown = len(lines)
        else:
            if not new and not n_shown and not is_waiting:
                print(f"waiting for {run_dir} to begin", flush=True)
                is_waiting = True
            for record in new:
                print(_line(record), flush=True)
                n_shown += 1
            for warning in watched.warnings[n_warned:]:
                print(f"warning at step {warning.step}: {warning}", flush=True)
            n_warned = len(watched.warnings)
        if end or is_once:
            if end:
                print(f"{run_dir}: {end}", flush=True)
            return
        time.sleep(interval)


def _line(record: dict[str, Any]) -> str:
    try:
        return console_line(record)
    except (KeyError, TypeError, ValueError, AttributeError):  # of another version, or harmed
        return f"step {record['step']:>6} | {record['kind']}"


def frame(watched: Watched, *, is_fine: bool = True) -> list[str]:
    """What a run looks like now, in lines of at most 80 columns; in ASCII where it is not to be fine."""
    train, evals = (records[-1] if records else {} for records in (watched.train, watched.evals))
    if not train and not evals:
        return [f"{watched.run_dir}: waiting for its first record"]
    last = max((r for r in (train, evals) if r), key=lambda record: record["step"])
    lines = [_title(watched), _progress(watched, is_fine)]
    for name, record, records in (("training", train, watched.train), ("validation", evals, watched.evals)):
        if record:
            figures = "  ".join(
                f"{key} {_text(number(record, at))}"
                for key, at in (("loss", "loss"), ("final", "loss_final"), ("nll", "nll"))
            )
            trend = _trend(
                [v for r in records[-TREND:] if (v := number(r, "loss_final")) is not None], is_fine
            )
            lines.append(f"{name:<11}{figures}  {trend}")
    levels = evals.get("masked_nll")
    if isinstance(levels, dict):
        shown = "  ".join(f"{k} % {_text(number(levels, k))}" for k in levels if str(k).isdigit())
        lines.append(f"{'masked nll':<11}{shown}  unigram {_text(number(evals, 'unigram_entropy'))}")
    lines += _answers(last if isinstance(last.get("cases"), dict) else evals, is_fine)
    penalties = "  ".join(f"{key} {_text(number(last, key))}" for key in ("pk", "pm"))
    lines.append(
        f"{'penalties':<11}{penalties}  lr {_text(number(last, 'lr'))}  grad norm {_text(number(train, 'grad_norm'))}"
    )
    if train:
        speed, memory = number(train, "tokens_per_second"), number(train, "peak_memory_mib")
        lines.append(
            f"{'speed':<11}{_text(speed)} tokens/s  {_text(memory)} MiB  {_text(number(train, 'skipped_steps'))} steps not applied"
        )
    if evals:
        lines += _wrapped(verdict(evals))
    if watched.warnings:
        lines += _wrapped(f"warning at step {watched.warnings[-1].step}: {watched.warnings[-1]}")
    return [line[:COLUMNS] for line in lines]


def _title(watched: Watched) -> str:
    planned = f" of {watched.config.max_iters:,}" if watched.config else ""
    return f"{watched.run_dir.name}: {watched.step:,}{planned} steps"


def _progress(watched: Watched, is_fine: bool) -> str:
    """A bar of the steps, their rate and the time left, as far as they are known."""
    full, empty = ("█", "░") if is_fine else ("#", ".")
    rate = _rate(watched.train)
    if not watched.config:
        return "" if rate is None else f"{rate:.3g} steps/s"
    most = watched.config.max_iters
    share = min(watched.step / most, 1.0)
    n = int(share * BAR)
    left = "" if rate is None else f"  {rate:.3g} steps/s  {_duration((most - watched.step) / rate)} left"
    return f"{full * n}{empty * (BAR - n)} {share:4.0%}{left}"


def _rate(train: list[dict[str, Any]]) -> float | None:
    """Steps a second between the last training records, evaluations included."""
    timed = [(r["step"], t) for r in train[-SPEED_RECORDS:] if (t := number(r, "time")) is not None]
    if len(timed) < 2 or timed[-1][1] <= timed[0][1] or timed[-1][0] <= timed[0][0]:
        return None
    return (timed[-1][0] - timed[0][0]) / (timed[-1][1] - timed[0][1])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _answers(record: dict[str, Any], is_fine: bool) -> list[str]:
    """A bar for each kind of position: what it is answered."""
    cases, blocks, lines = record.get("cases"), BLOCKS[is_fine], []
    for kind in cases if isinstance(cases, dict) else ():
        shares = {answer: number(cases, kind, answer) for answer in ANSWERS}
        if None in shares.values():
            continue
        ends, done, bar = 0.0, 0, ""
        for answer, share in shares.items():
            ends += share
            bar += blocks[answer] * (min(round(BAR * ends), BAR) - done)
            done = len(bar)
        rates = " ".join(f"{blocks[a]}{100 * share:3.0f}%" for a, share in shares.items())
        lines.append(f"{str(kind)[:10]:<11}{bar:<{BAR}} {rates}")
    if lines:
        key = "  ".join(f"{blocks[answer]} {name}" for answer, name in ANSWERS.items())
        lines.append(f"{'':<11}answered: {key}")
    return lines


def _trend(values: list[float], is_fine: bool) -> str:
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low == high:
        return ""
    sparks = SPARKS[is_fine]
    return "".join(sparks[round((value - low) / (high - low) * (len(sparks) - 1))] for value in values)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
