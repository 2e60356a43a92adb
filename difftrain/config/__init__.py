"""The configuration: defaults < preset < TOML file < command line."""

from difftrain.config.options import Config
from difftrain.config.sources import resolve_config
from difftrain.config.table import options_table
from difftrain.errors import UserError

__all__ = ["Config", "UserError", "options_table", "resolve_config"]
