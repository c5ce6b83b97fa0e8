"""Writes the examples section of docs/reference/rewards.md from the scores, or compares the two."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from corl_jax.errors import InputError
from corl_jax.rewards import registry
from corl_jax.runs.pictures import cell_text
from tools.reward_examples import cases
from tools.reward_examples.scoring import MM2T, T2I, UNSCORED, Example, Found

PAGE = cases.ROOT / "docs" / "reference" / "rewards.md"
FIGURE = cases.ROOT / "docs" / "images" / "reward_examples.png"
BEGIN = "<!-- reward examples, written by `python -m tools.reward_examples` -->"
END = "<!-- end of reward examples -->"
TOLERANCE = 0.005
NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d+(?![\w.])")
MM2T_WIDTH = 120  # letters of an answer that are shown

TEXT = """\
A file of [generated images](../examples/rewards/drawings.jsonl) and one of
[answers](../examples/rewards/answers.jsonl), scored in float32. The policy is the
[mini Janus](../measured/mini.md), `sentence` is MiniLM. `python -m tools.reward_examples`
writes this section and the figure; with `--check` it compares them. One of the scores by hand:

    python -m corl_jax.score --reward t2i_ti_sim --input docs/examples/rewards/drawings.jsonl \\
      --model corl_jax/assets/mini_janus

### Images

Prompt: *{prompt}*
(row {row} of the drawn world's test split, seed {row_seed}). The first image is the row's real
image. The mini Janus generated the others (seed {drawing_seed}), the last one for
*{other}*. They were chosen to differ, and do not show how often it is right.

![The images and their scores](../images/reward_examples.png)

{drawings}

- Only the checker separates the two right images from all others. `t2i_qa` and `t2i_oc` see only
  what they ask for: a smudge passes the first, two yellow shapes the second.
- `t2i_bid_cycle_reward` gives swapped colours more than the right image, by word overlap and by
  sentence embeddings alike: their caption has the prompt's words in another order, while that of
  the right image also says where things lie, which the prompt does not.
- `t2i_pixel_mse` is higher for two yellow shapes than for any other generated image, because they
  lie at the same places as in the real image.
- `t2i_ti_sim` hardly differs: two yellow shapes have the highest value, the real image the lowest.
- `t2i_od`: the mini Janus never learnt boxes, so all values are 0.

Its captions and answers, greedy. Of the answers the answer block is shown:

{said}

The rule of `t2i_od` on answers written by hand, with one true box:

{boxes}

### Answers

To *{question}* with the options {options} (MC, solution B),
and as an open question (OE, solution "triangle"). `␣` is a leading space.

{answers}

`qa_accuracy` finds an answer without tags, or with a tag that is never closed; the format rewards
count the tags. A longer open answer that holds the right word gets a part.

### Not scored here

These need weights that do not come with the project (`spice` needs Java and a parser as well). So
the table has no scores, only the range to expect. With the weights in DIR, these commands score the
same images:

{commands}

{unscored}
"""


def section(found: Found) -> str:
    """What belongs between the two marks."""
    drawings, answers = cases.read(cases.DRAWINGS), cases.read(cases.ANSWERS)
    shown = [case["shows"] for case in drawings]
    values = [[_code(one), *map(_number, row)] for one, row in zip(T2I, found.t2i, strict=True)]
    said = [[what, *map(_spoken, texts)] for what, texts in found.said.items()]
    scored = [
        [_shown(case["completion"]), case["type"], *map(_number, row)]
        for case, row in zip(answers, found.mm2t, strict=True)
    ]
    return TEXT.format(
        prompt=drawings[0]["prompt"],
        other=cases.OTHER_PROMPT,
        row=cases.ROW,
        row_seed=cases.ROW_SEED,
        drawing_seed=cases.DRAWING_SEED,
        drawings=_table(["reward", *shown], values),
        said=_table(["asked", *shown], said),
        boxes=_table(["answer", "score"], [[k, _number(v)] for k, v in found.boxes.items()]),
        question=answers[0]["problem"].splitlines()[0],
        options=", ".join(cases.CHOICES),
        answers=_table(["answer", "type", *map(_code, MM2T)], scored),
        commands="\n".join(f"    {command(one)}" for one, _ in UNSCORED),
        unscored=_table(["reward", "range"], [[_code(one), known] for one, known in UNSCORED]),
    )


def command(example: Example, folder: str = "DIR") -> str:
    """The command line that scores the drawings, with each network's weights in `folder`."""
    path = cases.DRAWINGS.relative_to(cases.ROOT)
    parts = ["python -m corl_jax.score", "--reward", example.reward, "--input", str(path)]
    entry = registry.REGISTRY[example.reward]
    defaults = {key: option.default for key, option in registry.options_of(example.reward).items()}
    chosen = {**defaults, **example.options}
    asked = [values.get(chosen[option]) for option, values in entry.chosen.items()]
    parts += [f"--network {name}={folder}" for name in (*entry.networks, *asked) if name]
    return " ".join([*parts, example.settings]).strip()


def current(page: str) -> str:
    """The section as it stands in the page.

    Raises:
        InputError: the page has not the two marks, once each and in order.
    """
    parts = re.split(f"{re.escape(BEGIN)}\n\n|\n{re.escape(END)}", page)
    if len(parts) != 3 or page.find(BEGIN) > page.find(END):
        raise InputError(f"{PAGE}: expected one section between the lines {BEGIN} and {END}")
    return parts[1]


def replaced(page: str, new: str) -> str:
    """The page with another section. Raises: InputError as `current`."""
    old = current(page)
    return page.replace(f"{BEGIN}\n\n{old}\n{END}", f"{BEGIN}\n\n{new}\n{END}")


def differences(old: str, new: str) -> list[str]:
    """Lines of the two sections that differ: in words, or by more than TOLERANCE in a number."""
    before, after = old.splitlines(), new.splitlines()
    if len(before) != len(after):
        return [f"found {len(before)} lines, the scores give {len(after)}"]
    return [
        f"found {one!r}, the scores give {other!r}"
        for one, other in zip(before, after, strict=True)
        if NUMBER.sub("#", one) != NUMBER.sub("#", other)
        or any(abs(a - b) > TOLERANCE for a, b in zip(_numbers(one), _numbers(other), strict=True))
    ]


def _numbers(line: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(line)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(example: Example) -> str:
    return " ".join(f"`{part}`" for part in example.label.split())


def _number(value: float) -> str:
    return f"{value:.3f}"


def _shown(completion: str) -> str:
    start = "␣" if completion.startswith(" ") else ""
    return start + cell_text(completion.strip(), MM2T_WIDTH)


def _spoken(words: str) -> str:
    answer = re.search(r"<answer>(.*)</answer>", words, re.DOTALL)
    return cell_text(answer[1] if answer else words, MM2T_WIDTH)
