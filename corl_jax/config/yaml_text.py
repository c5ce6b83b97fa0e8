"""Reads and writes YAML for configs and `key=value` arguments, with the types of YAML 1.2.

PyYAML follows YAML 1.1, in which 010 is 8, 1:30 is 90 and a date is not a text.
"""

from __future__ import annotations

import collections
import re
from typing import Any, ClassVar

import yaml

MAX_CHARACTERS = 2**20  # of a text; our largest config has 2**11
_TAG = "tag:yaml.org,2002:"
_AMBIGUOUS = "!ambiguous"
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # Groups of thousands, 1_000, are Python's and can mean nothing else.
    (
        "int",
        r"[-+]?\d+|0o[0-7]+|0x[0-9a-fA-F]+|[-+]?[1-9]\d{0,2}(_\d{3})+",
        list("-+0123456789"),
    ),
    (
        "float",
        r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)
"""Type, what a plain word of it looks like, first characters. The first that fits counts."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's types; refuses a key given twice, and words that are no text in YAML 1.1."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        # PyYAML itself takes the last of two equal keys without a word.
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int:
        # 1_000 -> 1000, 0o17 -> 15, 0xff -> 255, 010 -> 10
        text = str(self.construct_scalar(node)).replace("_", "").lower()
        base = {"0x": 16, "0o": 8}.get(text[:2], 10)
        return int(text if base == 10 else text[2:], base)

    def refuse_word(self, node: Any) -> None:
        truth = "true" if node.value.lower() in ("yes", "on") else "false"
        raise yaml.YAMLError(
            f"line {node.start_mark.line + 1}: found {node.value}, which is {truth} in YAML 1.1 "
            f"and a text in YAML 1.2; write {truth}, or '{node.value}' in quotes for the text"
        )


class _Dumper(yaml.SafeDumper):
    """Quotes each text that YAML 1.1 or 1.2 reads as something else."""

    yaml_implicit_resolvers: ClassVar[dict] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        # Copied, because add_implicit_resolver would change the lists of yaml.SafeDumper.
        first: list(resolvers)
        for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), _first)
_Loader.add_implicit_resolver(
    _AMBIGUOUS, re.compile(r"(?:[yY]es|YES|[nN]o|NO|[oO]n|ON|[oO]ff|OFF)$"), list("yYnNoO")
)
_Loader.add_constructor(_TAG + "int", _Loader.construct_number)
_Loader.add_constructor(_AMBIGUOUS, _Loader.refuse_word)


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML document.

    Raises: ValueError for a text that is not YAML, or too large with its aliases written out.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS:,} characters")
    try:
        tree = yaml.load(text, _Loader)
        size = _count_values(tree, {})
    except RecursionError:
        raise ValueError("it is nested too deeply, or refers to itself") from None
    except Exception as error:  # yaml's constructors end in many types, on "!!int ''" for one
        raise ValueError(str(error) or type(error).__name__) from None
    # Aliases of aliases double a tree with every line.
    if size > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS:,} values, aliases written out")
    return tree


def dump_yaml(value: Any) -> str:
    """Returns a YAML document that `parse_yaml` and readers of YAML 1.1 read as `value`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def _count_values(value: Any, known: dict[int, int]) -> int:
    """Counts a tree's values with its aliases written out; RecursionError for a cycle."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        children = [*value, *value.values()] if isinstance(value, dict) else value
        # An alias is the same object, so each is counted once and then looked up.
        known[id(value)] = 1 + sum(_count_values(child, known) for child in children)
    return known[id(value)]
