"""The options as a table, for docs/options.md."""

from __future__ import annotations

import dataclasses
import json

from difftrain.config.options import GROUPS, Config


def options_table() -> str:
    """The options as a Markdown table, generated from the dataclass."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            rows.append(f"| **{GROUPS[field.name]}** | | |")
        meaning = field.metadata["help"].replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{json.dumps(field.default)}` | {meaning} |")
    return "\n".join(rows)
