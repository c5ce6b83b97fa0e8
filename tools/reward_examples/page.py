"""Writes the examples section of docs/reference/rewards.md from the scores, or compares the two."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from corl_jax.data.self_questions.records import make_record
from corl_jax.errors import InputError
from corl_jax.rewards import registry
from corl_jax.runs.pictures import escape_cell
from tools.reward_examples import cases
from tools.reward_examples.scoring import MM2T, OWN, T2I, UNSCORED, Example, Scores

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

    corl-jax score --reward t2i_ti_sim --input docs/examples/rewards/drawings.jsonl \\
      --model corl_jax/assets/mini_janus

### Images

Prompt: *{prompt}*
(row {row} of the drawn world's test split, seed {row_seed}). The first image is the row's real
image. The mini Janus generated the others (seed {drawing_seed}), the last one for
*{other}*. They were chosen to differ, so they do not show how often it is right.

![The images and their scores](../images/reward_examples.png)

{drawings}

- Only the checker separates the two right images from all others. `t2i_qa` and `t2i_oc` look only
  at what they ask for: the smudged image passes `t2i_qa`, two yellow shapes pass `t2i_oc`.
- `t2i_bid_cycle_reward` scores swapped colours higher than the right image, by word overlap and by
  sentence embeddings: their caption has the prompt's words in another order. The caption of the
  right image also says where the shapes are, which the prompt does not.
- `t2i_pixel_mse` is higher for two yellow shapes than for any other generated image, because they
  are at the places of the shapes in the real image.
- `t2i_ti_sim` differs little: two yellow shapes get the highest score, the real image the lowest.
- `t2i_od`: the mini Janus was not trained on boxes, so its scores are 0.
- `answer_logprob` is near 0 everywhere: the question asks for thoughts first, which the row's
  solution does not have. The reward is for questions that are answered at once.

What the mini Janus answered, greedily (the answer block only):

{said}

The rule of `t2i_od` on answers written by hand, with one true box:

{boxes}

### Answers

To *{question}* with the options {options} (MC, solution B),
and as an open question (OE, solution "triangle"). `␣` is a leading space.

{answers}

`qa_accuracy` finds an answer without tags, or with a tag that is never closed; the format rewards
score these. A longer open answer that contains the right word gets a part.

### Answers about an own image

The question of each prompt is that of its [record](../how_to/data.md).

{own_answers}

"two hundred" is not two, and a "hot dog" is no dog. A colour is bound to one class. The inverse
relation counts when the classes are swapped.

### Not scored here

These need weights that do not come with the project (`spice` needs Java and a parser as well), so
there are no numbers, only the range to expect. With the weights in DIR, the same images are
scored by:

{commands}

{unscored}
"""


def write_section(scores: Scores) -> str:
    """Returns the text between the two marks."""
    images, answers = cases.load_cases(cases.DRAWINGS), cases.load_cases(cases.ANSWERS)
    shown = [case["shows"] for case in images]
    values = [
        [_format_code(example), *map(_format_number, row)]
        for example, row in zip(T2I, scores.t2i, strict=True)
    ]
    quotes = [[question, *map(_format_quotes, texts)] for question, texts in scores.answers.items()]
    rows = [
        [_format_text(case["completion"]), case["type"], *map(_format_number, row)]
        for case, row in zip(answers, scores.mm2t, strict=True)
    ]
    demands = [(make_record(t, include), x) for t, include, xs in cases.OWN_ANSWERS for x in xs]
    own_answers = [
        [record.prompt, _format_text(text), *map(_format_number, row)]
        for (record, text), row in zip(demands, scores.own_answers, strict=True)
    ]
    return TEXT.format(
        prompt=images[0]["prompt"],
        other=cases.OTHER_PROMPT,
        row=cases.ROW,
        row_seed=cases.ROW_SEED,
        drawing_seed=cases.DRAWING_SEED,
        drawings=_format_table(["reward", *shown], values),
        said=_format_table(["asked", *shown], quotes),
        boxes=_format_table(
            ["answer", "score"], [[k, _format_number(v)] for k, v in scores.boxes.items()]
        ),
        question=answers[0]["problem"].splitlines()[0],
        options=", ".join(cases.CHOICES),
        answers=_format_table(["answer", "type", *map(_format_code, MM2T)], rows),
        own_answers=_format_table(["prompt", "answer", *map(_format_code, OWN)], own_answers),
        commands="\n".join(f"    {write_command(example)}" for example, _ in UNSCORED),
        unscored=_format_table(
            ["reward", "range"], [[_format_code(example), known] for example, known in UNSCORED]
        ),
    )


def write_command(example: Example, folder: str = "DIR") -> str:
    """Returns the command that scores the images, with the weights of networks in `folder`."""
    path = cases.DRAWINGS.relative_to(cases.ROOT)
    parts = ["corl-jax score", "--reward", example.reward, "--input", str(path)]
    row = registry.REGISTRY[example.reward]
    defaults = {
        key: option.default for key, option in registry.list_options(example.reward).items()
    }
    chosen = {**defaults, **example.options}
    used = [values.get(chosen[option]) for option, values in row.chosen.items()]
    parts += [f"--network {name}={folder}" for name in (*row.networks, *used) if name]
    return " ".join([*parts, example.settings]).strip()


def find_section(page: str) -> str:
    """Returns the section of the page.

    Raises:
        InputError: the two marks are not on the page, once each and in order.
    """
    # "before BEGIN section END after" -> three parts
    parts = re.split(f"{re.escape(BEGIN)}\n\n|\n{re.escape(END)}", page)
    if len(parts) != 3 or page.find(BEGIN) > page.find(END):
        raise InputError(f"{PAGE}: expected one section between the lines {BEGIN} and {END}")
    return parts[1]


def replace_section(page: str, new: str) -> str:
    """Returns the page with another section. Raises: InputError as `find_section`."""
    old = find_section(page)
    return page.replace(f"{BEGIN}\n\n{old}\n{END}", f"{BEGIN}\n\n{new}\n{END}")


def list_differences(old: str, new: str) -> list[str]:
    """Returns lines of two sections that differ: in words, or by more than TOLERANCE."""

    # First the words: equal lines with "#" for numbers have equally many numbers to compare.
    def is_different(first: str, second: str) -> bool:
        if NUMBER.sub("#", first) != NUMBER.sub("#", second):
            return True
        pairs = zip(_read_numbers(first), _read_numbers(second), strict=True)
        return any(abs(a - b) > TOLERANCE for a, b in pairs)

    before, after = old.splitlines(), new.splitlines()
    if len(before) != len(after):
        return [f"found {len(before)} lines, the scores give {len(after)}"]
    return [
        f"found {old_line!r}, the scores give {new_line!r}"
        for old_line, new_line in zip(before, after, strict=True)
        if is_different(old_line, new_line)
    ]


def _read_numbers(line: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(line)]


def _format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _format_code(example: Example) -> str:
    return " ".join(f"`{part}`" for part in example.label.split())


def _format_number(value: float) -> str:
    return f"{value:.3f}"


def _format_text(completion: str) -> str:
    start = "␣" if completion.startswith(" ") else ""
    return start + escape_cell(completion.strip(), MM2T_WIDTH)


def _format_quotes(words: str) -> str:
    answer = re.search(r"<answer>(.*)</answer>", words, re.DOTALL)
    return escape_cell(answer[1] if answer else words, MM2T_WIDTH)
