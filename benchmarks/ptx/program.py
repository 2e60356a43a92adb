"""A kernel's PTX as text, read into instructions, labels and registers."""

from __future__ import annotations

import re
from dataclasses import dataclass


class Fault(Exception):
    """The program did what no program may do."""


class NotEmulated(Exception):
    """The program may be right, but this emulator cannot say."""


@dataclass
class Instruction:
    text: str
    guard: str | None  # "%p1" or "!%p1"
    opcode: str
    operands: list[str]
    line: str  # where in the Triton source


@dataclass
class Program:
    name: str
    parameters: list[tuple[str, str]]  # (name, type)
    registers: dict[str, str]  # name -> type
    instructions: list[Instruction]
    labels: dict[str, int]
    threads: int


def split_operands(text: str) -> list[str]:
    """Operands: split at commas outside brackets and braces."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def parse(ptx: str) -> Program:
    text = re.sub(r"/\*.*?\*/", "", ptx, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)", text, re.S)
    if re.search(r"\.func\b", text):
        raise NotEmulated("calls")
    parameters = []
    for declaration in entry[2].split(","):
        words = declaration.split()
        parameters.append((words[-1], words[1].lstrip(".")))
    rest = text[entry.end() :]
    threads = int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", rest)[1])
    rest = rest[rest.index("{") + 1 :]
    registers, instructions, labels, line, depth, at = {}, [], {}, "", 0, 0
    statement = re.compile(r"[^;]*;")
    while True:
        at = re.compile(r"\s*").match(rest, at).end()
        if rest[at] == "{":
            depth, at = depth + 1, at + 1
        elif rest[at] == "}":
            depth, at = depth - 1, at + 1
            if depth < 0:
                break
        elif label := re.compile(r"([\w$]+):").match(rest, at):
            labels[label[1]], at = len(instructions), label.end()
        elif location := re.compile(r"\.(?:loc|file)\b([^\n]*)\n").match(rest, at):
            line, at = " ".join(location[1].split()[:2]), location.end()
        else:
            found = statement.match(rest, at)
            at = found.end()
            body = " ".join(found[0][:-1].split())
            if body.startswith(".reg"):
                _, kind, names = body.split(None, 2)
                for name in names.split(","):
                    many = re.match(r"\s*([%\w$]+)<(\d+)>", name)
                    found_names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
                    registers.update(dict.fromkeys(found_names, kind.lstrip(".")))
            elif not body.startswith((".pragma", ".loc")):
                if body.startswith("."):
                    raise NotEmulated(body)
                parts = re.match(r"(?:@(!?[%\w$]+)\s+)?([\w.:]+)\s*(.*)", body)
                instructions.append(Instruction(body, parts[1], parts[2], split_operands(parts[3]), line))
    return Program(entry[1], parameters, registers, instructions, labels, threads)
