"""What a compiled kernel is made of: registers, spills, widths of accesses, instructions of its loops.

Read from NVIDIA's SASS, AMD's assembly and Triton's own representation, as text; no GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

SPILLS = ("LDL", "STL")  # loads and stores of a thread's own memory


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def read_sass(cubin: bytes) -> tuple[list[tuple[int, str]], str]:
    """(address, instruction) in order, predicates kept, and the resource line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _tool("cuobjdump", "-sass", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text)
    return [(int(address, 16), instruction) for address, instruction in lines], usage


def innermost_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """Bodies between a backward branch and its target that hold no other such body."""
    spans = []
    for address, instruction in code:
        match = re.search(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\d+,\s*)?(?:`?\(?)(0x[0-9a-f]+)", instruction)
        if match and int(match[1], 16) < address:
            spans.append((int(match[1], 16), address))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[i for a, i in code if begin <= a <= end] for begin, end in inner]


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _access_bits(opcode: str) -> int:
    """Width of a global load or store; 0 for anything else."""
    if not re.match(r"(LDG|STG)\b", opcode):
        return 0
    width = re.search(
        r"\.(256|128|64|[US]?16|[US]?8)\b", opcode.replace(".L2::128B", "").replace("LTC128B", "")
    )
    return int(re.sub(r"\D", "", width[1])) if width else 32


def read_nvidia(cubin: bytes, element_bits: int, is_streamed: bool) -> dict:
    """The figures of one cubin; only streamed rows have loops over logits."""
    code, usage = read_sass(cubin)
    opcodes = [_opcode(instruction) for _, instruction in code]
    slots, widest, narrow = {"slots_scan": None, "slots_grad": None}, {}, 0
    loops = innermost_loops(code)
    for body in loops if is_streamed else []:
        operations = [_opcode(i) for i in body]
        if not any(o.startswith("MUFU.EX2") for o in operations):
            continue
        loaded = sum(_access_bits(o) for o in operations if o.startswith("LDG")) / element_bits
        if not loaded:
            continue
        narrow += sum(0 < _access_bits(o) < 128 for o in operations)
        is_gradient = any(o.startswith("STG") for o in operations)
        key = "slots_grad" if is_gradient else "slots_scan"
        count = round(sum(o != "NOP" for o in operations) / loaded, 2)
        # The loops over whole blocks, not those over what does not fill one.
        if loaded > widest.get(key, 0):
            widest[key], slots[key] = loaded, count
        elif loaded == widest[key]:
            slots[key] = max(count, slots[key])
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill_instructions": sum(o.startswith(SPILLS) for o in opcodes),
        "spills_in_loops": sum(_opcode(i).startswith(SPILLS) for body in loops for i in body),
        "wide_accesses": sum(_access_bits(o) >= 128 for o in opcodes),
        "narrow_accesses_in_loops": narrow,
        "fp64_instructions": sum(bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F\.F64|MUFU\.\w*64", o)) for o in opcodes),
        **slots,
    }  # fmt: skip


def read_amd(assembly: str) -> dict:
    """The figures of one gfx binary, as far as its text gives them."""
    count = {k: int(re.search(rf"\.{k}:\s+(\d+)", assembly)[1]) for k in ("vgpr_count", "vgpr_spill_count")}
    return {
        "registers": count["vgpr_count"],
        "spill_instructions": count["vgpr_spill_count"],
        "spills_in_loops": None,
        "wide_accesses": len(re.findall(r"^\s+(?:global|buffer)_(?:load|store)_dwordx4", assembly, re.M)),
        "narrow_accesses_in_loops": None,
        "fp64_instructions": len(re.findall(r"^\s+v_\w+_f64", assembly, re.M)),
        "slots_scan": None,
        "slots_grad": None,
    }


def int32_address_products(ttir: str) -> int:
    """Products of two run-time int32 that an address depends on: they overflow for big tensors."""
    users: dict[str, list[str]] = {}
    results: dict[str, str] = {}
    for line in ttir.splitlines():
        match = re.match(r"\s*(%[\w#:]+) = ([\w.]+)(.*)", line)
        if not match:
            continue
        results[match[1]] = line
        for operand in re.findall(r"%\w+", match[3].split(" loc(")[0]):
            users.setdefault(operand, []).append(match[1])
    constants = {name for name, line in results.items() if "arith.constant" in line}

    def reaches_address(name: str, seen: set) -> bool:
        if name in seen:
            return False
        seen.add(name)
        following = users.get(name, [])
        return any("tt.addptr" in results[u] or reaches_address(u, seen) for u in following)

    found = 0
    for name, line in results.items():
        match = re.match(
            r"\s*%\w+ = arith\.muli (%\w+), (%\w+)(?: overflow<\w+>)? : (?:tensor<\S+x)?i32", line
        )
        if match and not {match[1], match[2]} & constants and reaches_address(name, set()):
            found += 1
    return found
