"""Says which options of a run may differ when it is resumed, and which ones name files."""

from __future__ import annotations

import re

MAY_CHANGE = (
    "output_dir",  # a run may be moved, or named from another working directory
    r"train\.stop_after",
    r"(log|export|mesh|distributed)\..*",  # another mesh changes rounding, not the run
    r"model\.attention",  # so does another kernel
    # A new directory must have the step that saved.json names.
    r"checkpoint\.(every|keep|max_failures|directory)",
    r"eval\.(every|batch_prompts)",  # not eval.rows: training leaves them out
    r"data\.(cache_rows|max_bad_fraction)",
    r"rewards\.\d+\.(timeout_s|max_failures)",
    r"guards\..*",  # they end a run or let it continue as it is
    r"networks\.offload",
    r"algorithm\.reference",  # where the weights are, not which
)
"""Options that may have another value in a resumed run; regexes of whole keys."""

PATH_OPTIONS = (
    r"model\.path",
    r"(data|eval)\.path(\.\d+)?",
    r"networks\.\w+\.path",
    r"rewards\.\d+\.(use|options\..+)",
)
"""Options that are a path or may be one; regexes of whole keys."""


def may_change(key: str) -> bool:
    """Returns whether a resumed run may have another value of an option, such as `mesh.fsdp`."""
    return any(re.fullmatch(pattern, key) for pattern in MAY_CHANGE)


def is_path(key: str) -> bool:
    """Returns whether the value of an option may be a path."""
    return any(re.fullmatch(pattern, key) for pattern in PATH_OPTIONS)
