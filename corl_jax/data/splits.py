"""Tells train, validation and test files apart by their names, so that no test row is trained on.

The rules are those of Hugging Face `datasets` (`data_files.py`): a keyword that stands between
separators, digits or the ends of a folder's or file's name. Beyond them `=` separates
(`split=test`), upper case counts (`xTest`), so do `testset`, `testdata`, `testsplit` and COCO's
`minival`, and held-out rows are test rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "holdout", "heldout", "held[-_ ]out"),
}
_SPLIT_OF = {re.compile(word): split for split, words in KEYWORDS.items() for word in words}
_LETTER = r"[^\W\d_]"
_WORDS = "|".join(word.pattern for word in _SPLIT_OF)
_KEYWORD = re.compile(
    rf"(?<!{_LETTER})(?:mini)?({_WORDS})(?:set|data|split)?(?!{_LETTER})", re.IGNORECASE
)
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")  # xTest -> x Test
# Names that the hub gives to files of any split: NAME-00000-of-00001.parquet, NAME/0000.parquet.
_HUB_NAME = re.compile(r"([^/]+?)(?:-\d{5}-of-\d{5}[^/]*|/\d{4})\.parquet")


def find_splits(path: str) -> frozenset[str]:
    """Returns the splits that the names in a relative path tell; empty if they tell none."""
    spaced = _HUMP.sub(" ", path)
    words = (match.group(1).lower() for match in _KEYWORD.finditer(spaced))
    return frozenset(
        split for word in words for known, split in _SPLIT_OF.items() if known.fullmatch(word)
    )


def group_by_split(paths: Sequence[str], root: str) -> dict[frozenset[str], list[str]]:
    """Returns the paths by the splits that their names below `root` tell.

    Beside a known split, `unsupervised-00000-of-00001.parquet` is of the split `unsupervised`.
    """
    groups: dict[frozenset[str], list[str]] = {}
    relative = {path: os.path.relpath(path, root).replace(os.sep, "/") for path in paths}
    known = any(find_splits(name) for name in relative.values())
    for path, name in relative.items():
        split = find_splits(name)
        match = _HUB_NAME.search(name)
        if not split and known and match:
            split = frozenset([match.group(1)])
        groups.setdefault(split, []).append(path)
    return groups


def has_several_splits(groups: Mapping[frozenset[str], Sequence[str]]) -> bool:
    """True if reading all groups would mix rows to train on with others.

    Files without a split beside those of `train` are more rows to train on.
    """
    return len(groups) > 1 and any(split - {"train"} for split in groups)


def describe_groups(groups: Mapping[frozenset[str], Sequence[str]]) -> str:
    """Returns "the splits test, train and 2 files that name none (a.parquet, ..)"."""
    names = sorted(" + ".join(sorted(split)) for split in groups if split)
    text = f"the split{'s' if len(names) > 1 else ''} {', '.join(names)}"
    unnamed = list(groups.get(frozenset(), ()))
    if not unnamed:
        return text
    more = ", .." if len(unnamed) > 1 else ""
    files = f"{len(unnamed)} files that name" if more else "a file that names"
    return f"{text} and {files} none ({unnamed[0]}{more})"


def suggest_pattern(
    groups: Mapping[frozenset[str], Sequence[str]],
    root: str,
    list_files: Callable[[str], Sequence[str]],
) -> str | list[str]:
    """Returns a directory or glob below `root` that names one split's files, else the files.

    The split is `train` where there is one. `list_files` gives the files of a pattern below
    `root`, and a pattern is returned only if it names no other file.
    """
    split = min(groups, key=lambda split: (split != {"train"}, "train" not in split, sorted(split)))
    paths = sorted(groups[split])
    folder = os.path.relpath(os.path.commonpath([os.path.dirname(p) for p in paths]), root)
    patterns = [] if folder == "." else [folder]
    match = _KEYWORD.search(os.path.relpath(paths[0], root))
    if match:
        word = match.group(1)
        names = (f"{word}*.parquet", f"*{word}*.parquet")
        patterns += [os.path.normpath(os.path.join(folder, name)) for name in names]
        patterns += [f"**/{name}" for name in names]
        patterns += [f"**/{word}/**/*.parquet", f"**/*{word}*/**/*.parquet"]
    for pattern in patterns:
        if sorted(list_files(pattern)) == paths:
            return pattern
    return [os.path.relpath(path, root) for path in paths]
