"""docs/api.md shows every public name, and each has a docstring to show."""

import inspect
import re

import pytest

import difftrain
import difftrain_kernels
from pages import ROOT

TEXT = (ROOT / "docs/api.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^::: difftrain\.(\w+)$", TEXT, re.MULTILINE)


def undocumented(name, value):
    """The names of a function or class, and of a class's public methods and properties, without a docstring."""
    members = {name: value}
    if inspect.isclass(value):
        members |= {f"{name}.{key}": member for key, member in vars(value).items() if key[0] != "_"}
    kinds = (property, classmethod, staticmethod)
    described = {k: m for k, m in members.items() if callable(m) or isinstance(m, kinds)}
    # A dataclass without a docstring is given its signature for one.
    return [k for k, m in described.items() if (m.__doc__ or f"{name}(").startswith(f"{name}(")]


def test_every_public_name_is_on_the_page():
    names = [name for name in difftrain.__all__ if name != "__version__"]
    assert sorted(SHOWN) == names
    assert "`difftrain.__version__`" in TEXT
    for name in difftrain_kernels.__all__:
        assert getattr(difftrain, name) is getattr(difftrain_kernels, name)


@pytest.mark.parametrize("name", SHOWN)
def test_what_the_page_shows_has_a_docstring(name):
    assert undocumented(name, getattr(difftrain, name)) == []


def test_a_missing_docstring_is_seen():
    class Silent:
        def act(self):
            pass

        @property
        def size(self):
            """How large."""

    assert undocumented("Silent", Silent) == ["Silent", "Silent.act"]
