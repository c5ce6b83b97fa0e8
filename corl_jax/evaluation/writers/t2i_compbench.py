"""T2I-CompBench: a folder for each category, with the prompt in the name of each image.

Source: Karine-Huang/T2I-CompBench, README.md and GORS_finetune/inference_eval.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.writers.writer import (
    IMAGES,
    HarnessPrompt,
    ImageFile,
    Outcome,
    PromptList,
    Writer,
    check_text,
    find_source,
    list_filled_lines,
)

_BLIP = "(cd BLIPvqa_eval && python BLIP_vqa.py --out_dir={0})"
_SPATIAL = "(cd UniDet_eval && python 2D_spatial_eval.py --outpath={0}{1})"
_CLIP = "python CLIPScore_eval/CLIP_similarity.py --outpath={0}{1}"
SCORERS: dict[str, tuple[str, ...]] = {
    "color": (_BLIP,),
    "shape": (_BLIP,),
    "texture": (_BLIP,),
    "spatial": (_SPATIAL,),
    "3d_spatial": ("(cd UniDet_eval && python 3D_spatial_eval.py --outpath={0})",),
    "non_spatial": (_CLIP,),
    "numeracy": ("(cd UniDet_eval && python numeracy_eval.py --outpath={0})",),
    "complex": (_BLIP, _SPATIAL, _CLIP,
                "(cd 3_in_1_eval && python 3_in_1.py --outpath={0} --data_path={2})"),
}  # fmt: skip
"""Category -> the harness's scorers, with the folder of images and the option of `complex`."""
ENDING = "_val.txt"
NUM_PROMPTS = 300  # of a category
EXPECTED = (
    "examples/dataset of T2I-CompBench: a folder with a file CATEGORY_val.txt, or such files, for "
    f"the categories {', '.join(SCORERS)}; a prompt a line"
)
MAX_NAME = 255  # bytes of a file name


def read_categories(paths: Sequence[Path], problems: Problems) -> PromptList:
    """Reads the validation prompts of the categories that are there."""
    folders = [find_source(path, ("examples/dataset",)) for path in paths]
    files, prompts, notes = {}, [], []
    for path in folders:
        named = {name: path / f"{name}{ENDING}" for name in SCORERS} if path.is_dir() else {}
        files |= {name: file for name, file in named.items() if file.is_file()}
        if not path.is_dir():
            category = path.name.removesuffix(ENDING)
            if category not in SCORERS or not path.name.endswith(ENDING):
                raise InputError(f"{path}: is no list of a category; expected {EXPECTED}")
            files[category] = path
    if not files:
        raise InputError(f"{folders[0]}: holds no list of a category; expected {EXPECTED}")
    # In the table's order, so that numbers do not depend on the order of the arguments.
    files = {name: files[name] for name in SCORERS if name in files}
    for category, file in files.items():
        with problems.collect():
            lines = list_filled_lines(file, EXPECTED)
            prompts += [
                _read_prompt(file, category, place, *line, problems)
                for place, line in enumerate(lines)
            ]
            if len(lines) != NUM_PROMPTS:
                notes.append(f"{file}: found {len(lines)} prompts; T2I-CompBench has {NUM_PROMPTS}")
    if missing := [name for name in SCORERS if name not in files]:
        notes.append(f"no prompts of the categories {', '.join(missing)}; the others are drawn")
    return PromptList(tuple(prompts), tuple(files.values()), tuple(notes))


def _read_prompt(
    file: Path, category: str, place: int, number: int, line: str, problems: Problems
) -> HarnessPrompt:
    where = f"{file}: line {number}"
    text = check_text(line, where, problems)
    if "/" in text or "_" in text or "\0" in text:
        problems.add(
            f"{where}: found {line!r}; the harness reads the prompt from the name of its image, up "
            "to the first _, so expected a text without / and _"
        )
    elif len(_name_image(text, 0).encode(errors="replace")) > MAX_NAME:
        problems.add(f"{where}: has {len(text)} characters, too many for the name of a file")
    return HarnessPrompt(text, f"{category}/{place:04d}", category, line)


def _name_image(text: str, number: int) -> str:
    return f"{text}_{number:06d}.png"


def list_files(prompts: Sequence[HarnessPrompt], samples: int) -> list[ImageFile]:
    """Lists CATEGORY/samples/PROMPT_NNNNNN.png; the numbers run over all images of a category."""
    files, counts = [], dict.fromkeys(SCORERS, 0)
    for number, prompt in enumerate(prompts):
        folder = f"{IMAGES}/{prompt.category}/samples"
        for sample in range(samples):
            name = _name_image(prompt.text, counts[prompt.category])
            counts[prompt.category] += 1
            files.append(ImageFile(f"{folder}/{name}", number, (sample,)))
    return files


def describe_next(outcome: Outcome) -> str:
    """Returns the commands of each category's scorers."""
    lines = ["# in the clone of T2I-CompBench; scores are the means of vqa_result.json"]
    data = shlex.quote(f"{outcome.prompts.files[0].absolute().parent}/")
    for category in dict.fromkeys(prompt.category for prompt in outcome.prompts.prompts):
        # With a slash at the end: the scorers join the path with names by adding texts.
        folder = shlex.quote(f"{outcome.images / category}/")
        flag = " --complex True" if len(SCORERS[category]) > 1 else ""
        lines += [scorer.format(folder, flag, data) for scorer in SCORERS[category]]
    return "\n".join(lines) + "\n"


WRITER = Writer(
    title="T2I-CompBench", expected=EXPECTED, read=read_categories, images_per_prompt=10,
    list_files=list_files, describe_next=describe_next,
)  # fmt: skip
