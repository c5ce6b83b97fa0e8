"""Finds the split of files by their names, so that no run trains on test rows.

The rules are those of Hugging Face `datasets` (`data_files.py`). A keyword counts between
separators, digits or the ends of a folder's or file's name. In addition, `=` separates
(`split=test`), and so does an upper-case letter (`xTest`). `testset`, `testdata`, `testsplit` and
COCO's `minival` count. Held-out rows are test rows.
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
    """Returns the splits in the names of a relative path; empty if there are none."""
    spaced = _HUMP.sub(" ", path)
    words = (match.group(1).lower() for match in _KEYWORD.finditer(spaced))
    return frozenset(
        split for word in words for known, split in _SPLIT_OF.items() if known.fullmatch(word)
    )


def group_by_split(paths: Sequence[str], root: str) -> dict[frozenset[str], list[str]]:
    """Groups paths by the splits in their names below `root`."""
    # If one file has a known split, NAME-00000-of-00001.parquet is of the split NAME. Otherwise
    # NAME may be that of the data set.
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
    """Returns whether the groups mix training rows with other rows."""
    # Files without a split, next to files of `train`, count as training rows.
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

    The split is `train` if it exists. `list_files` returns the files of a pattern below `root`.
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
        # Tested, not trusted: a suggestion must not name a file of another split.
        if sorted(list_files(pattern)) == paths:
            return pattern
    return [os.path.relpath(path, root) for path in paths]
