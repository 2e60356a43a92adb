"""Where options come from: defaults < preset < TOML file < command line."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from difftrain.config.options import PATHS, TOML_HEADER, TYPES, Config
from difftrain.config.paths import expand_path
from difftrain.config.toml import parse_toml
from difftrain.errors import UserError, near_matches

CONFIG_FILE = "config.toml"
LARGEST_TOML = 1 << 20  # bytes; a configuration is a page, anything larger is a mistake
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_word(name: str, word: str) -> Any:
    """A command-line word as the value of option ``name``; raises UserError."""
    expected = TYPES[name]
    try:
        if expected is bool:
            return _WORDS[word.lower()]
        return expected(word) if expected in (int, float) else word
    except (KeyError, ValueError):
        kind = "true or false" if expected is bool else expected.__name__
        raise UserError(f"{name} must be {kind}, got {word!r}") from None


def preset_names() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = resources.files("difftrain.config") / "presets"
    return sorted(p.name[: -len(".toml")] for p in folder.iterdir() if p.name.endswith(".toml"))


def preset_summary(name: str) -> str:
    """The first line of a preset's file, which says what it is for."""
    return _preset_text(name).splitlines()[0].lstrip("# ")


def _preset_text(name: str) -> str:
    return (resources.files("difftrain.config") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def read_preset(name: str) -> dict[str, Any]:
    """The keys a preset sets; raises UserError with near matches when there is none."""
    if name not in preset_names():
        known = preset_names()
        hint = near_matches(name, known) or f"; there are {', '.join(known)}"
        raise UserError(f"no preset named {name!r}{hint}")
    return _read_keys(_preset_text(name), f"preset {name}")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The keys a TOML file sets; raises UserError for a file that cannot be a configuration."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"configuration file not found: {path}")
    if path.stat().st_size > LARGEST_TOML:
        raise UserError(f"{path} is larger than {LARGEST_TOML} bytes, which no configuration is")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin with a byte-order mark
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    return _read_keys(text, str(path))


def _read_keys(text: str, origin: str) -> dict[str, Any]:
    values = parse_toml(text, origin)
    known = list(TYPES)
    for key in values:
        if key not in known:
            raise UserError(f"{origin}: unknown option {key!r}{near_matches(key, known)}")
    return values


def resolve_config(
    preset: str | None, file: str | None, words: dict[str, str], *, resume: bool = False
) -> Config:
    """Defaults < preset < TOML file < command line; a resumed run's own configuration replaces the preset.

    Paths are expanded, and so a run is saved with the places that it used: a resume finds them whatever
    its environment. What a run was saved with is taken as it stands. A preset's ``budget_minutes`` goes
    where ``max_iters`` is given.

    Args:
        preset: name of a preset.
        file: path of a TOML file.
        words: option names and their command-line words.
        resume: start from the configuration that the run in ``out_dir`` was saved with.

    Raises:
        UserError: an unknown name, a wrong type or a value out of range.
    """
    base = _expanded(read_preset(preset)) if preset else {}
    explicit = read_toml(expand_path(file)) if file else {}
    explicit = _expanded(explicit | {name: parse_word(name, word) for name, word in words.items()})
    if "max_iters" in explicit:  # steps that are asked for are taken, exactly
        base.pop("budget_minutes", None)
    if not resume:
        return Config(**(base | explicit))
    out_dir = str((base | explicit).get("out_dir", Config.out_dir))
    saved = Path(out_dir) / CONFIG_FILE
    if not is_run_folder(saved.parent):
        raise UserError(f"cannot resume: {out_dir} is not a run folder")
    return Config(**(read_toml(saved) | explicit | {"out_dir": out_dir}))


def _expanded(values: dict[str, Any]) -> dict[str, Any]:
    """These options, the paths among them expanded."""
    paths = {name: values[name] for name in PATHS if isinstance(values.get(name), str)}
    return values | {name: expand_path(text) for name, text in paths.items()}


def is_run_folder(folder: Path) -> bool:
    """Whether a run was saved in this folder: its configuration begins with our header."""
    try:
        with (folder / CONFIG_FILE).open(encoding="utf-8") as file:
            return file.readline().rstrip() == TOML_HEADER
    except (OSError, UnicodeDecodeError):
        return False
