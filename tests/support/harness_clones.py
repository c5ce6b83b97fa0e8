"""Made-up clones of the benchmarks' harnesses, with the layout and the counts of the real ones."""

from __future__ import annotations

import json
from pathlib import Path

GENEVAL_TAGS = {
    "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
    "color_attr": 100,
}  # fmt: skip
COMPBENCH = (
    "color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy", "complex",
)  # fmt: skip
WISE_PARTS = {
    "cultural_common_sense": range(1, 401),
    "spatio-temporal_reasoning": range(401, 641),
    "natural_science": range(641, 1001),
}


def make_geneval(root: Path, counts: dict[str, int] = GENEVAL_TAGS) -> Path:
    """prompts/evaluation_metadata.jsonl; returns the file."""
    rows = [
        {"tag": tag, "include": [{"class": "bench", "count": 1}], "prompt": f"a photo of {tag} {i}"}
        for tag, count in counts.items()
        for i in range(count)
    ]
    return _write_lines(root / "prompts" / "evaluation_metadata.jsonl", rows)


def make_geneval2(root: Path, count: int = 800) -> Path:
    """geneval2_data.jsonl; returns the file."""
    rows = [
        {
            "prompt": f"{i} red circles", "atom_count": 3 + i % 8,
            "vqa_list": [["How many circles are in the image?", "two"]], "skills": ["count"],
        }
        for i in range(count)
    ]  # fmt: skip
    return _write_lines(root / "geneval2_data.jsonl", rows)


def make_dpg(root: Path, count: int = 1065) -> Path:
    """dpg_bench/prompts; returns the folder. One name has two dots."""
    folder = root / "dpg_bench" / "prompts"
    folder.mkdir(parents=True)
    for i in range(count):
        name = "partiprompts1.v2" if i == 0 else f"COCOval2014_{i:012d}"
        (folder / f"{name}.txt").write_text(f"  a red circle, number {i}\n")
    return folder


def make_wise(root: Path, parts: dict = WISE_PARTS) -> Path:
    """data_verified, WISE_legacy/data and its rewritten prompts; returns the root."""
    for folder, end in (("data_verified", "_verified"), ("WISE_legacy/data", ""),
                        ("WISE_legacy/data", "_rewrite")):  # fmt: skip
        (root / folder).mkdir(parents=True, exist_ok=True)
        for part, ids in parts.items():
            rows = [
                {
                    "Prompt": f"number {i}{end}", "Explanation": "so", "Category": part,
                    "Subcategory": "a part", "prompt_id": i,
                }
                for i in ids
            ]  # fmt: skip
            path = root / folder / f"{part}{end}.json"
            path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return root


def make_compbench(root: Path, count: int = 300) -> Path:
    """examples/dataset with CRLF ends and other lists beside; returns the folder."""
    folder = root / "examples" / "dataset"
    folder.mkdir(parents=True)
    for category in COMPBENCH:
        lines = "".join(f"a {category.replace('_', ' ')} circle {i}.\r\n" for i in range(count))
        (folder / f"{category}_val.txt").write_bytes(lines.encode())
        (folder / f"{category}_train.txt").write_text("a training prompt\n")
    (folder / "complex_val_spatial.txt").write_text("a complex circle 0.\n")
    return folder


def _write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
