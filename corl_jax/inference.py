"""Samples images and answers: what `generate` and the Python API share.

`options` in this module has the sampling options as attributes, named as the command's options. A
sample depends only on the seed, the position of its prompt in the input and its number.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from corl_jax.config.fields import LARGEST, MAX_IMAGE_STEPS
from corl_jax.data.instructions import INSTRUCTIONS, add_instruction
from corl_jax.errors import InputError, Problems
from corl_jax.sampling_options import (
    FLOAT32,
    HARMLESS,
    find_temperature_problems,
    is_number,
)
from corl_jax.tasks import IMAGE_GENERATION, IMAGE_UNDERSTANDING, PLANNED_GENERATION, Task

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from corl_jax.data.questions import ImageQuestion
    from corl_jax.policies import Model, PolicyFiles
    from corl_jax.policies.batched import Sample
    from corl_jax.policies.family import Family, SamplingOptions

MAX_SEED = 2**32 - 1
DTYPES = ("float32", "bfloat16")
IMAGE_OPTIONS = ("cfg_scale", "temperature")
PLAN_OPTIONS = ("top_k", "top_p", "max_new_tokens")
TEXT_OPTIONS = ("temperature", "top_k", "top_p", "max_new_tokens", "instruction")

SpellOption = Callable[[str], str]
"""Option, as an attribute -> its name in messages: cfg_scale -> --cfg-scale."""


def choose_dtype(name: str | None) -> Any:
    """Returns the compute dtype of a name. None: float32 on a CPU, bfloat16 elsewhere."""
    import jax
    import jax.numpy as jnp

    return jnp.dtype(name or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def load_model(place: Any, dtype_name: str | None) -> tuple[Model, Any]:
    """Loads the model of a path or hub id; returns it and its compute dtype.

    Raises:
        InputError: listing every problem of the model's files and of JAX's settings.
    """
    from corl_jax.devices.startup import prepare_devices
    from corl_jax.policies import load_policy

    prepare_devices()
    dtype = choose_dtype(dtype_name)
    return load_policy(place, dtype), dtype


# ---- checks


def check_number(name: str, value: Any, low: float, high=math.inf, *, above=False, whole=False):
    """Returns a problem unless `value` is None or a finite number in the range."""
    # NaN fails every comparison, so it is a problem too.
    # An integer may be larger than any float.
    fits = is_number(value, whole=whole) and low <= value <= min(high, LARGEST)
    if value is None or (fits and (value > low or not above)):
        return []
    bounds = f"{'above' if above else 'at least'} {low}"
    bounds += f" and at most {high}" if math.isfinite(high) else ""
    if high == math.inf and not whole and is_number(value) and LARGEST < value < math.inf:
        return [f"{name}: found {value}; {FLOAT32}"]
    shown = value if is_number(value) else repr(value)
    return [f"{name}: found {shown}; expected a {'whole ' if whole else ''}number {bounds}"]


def check_options(
    options: argparse.Namespace, spell: SpellOption, problems: Problems, *,
    takes_greedy: bool = True,
) -> None:  # fmt: skip
    """Adds problems of the options that images and answers have."""
    for name in ("batch_size", "samples"):
        problems.add(check_number(spell(name), getattr(options, name), 1, whole=True))
    problems.add(check_number(spell("seed"), options.seed, 0, MAX_SEED, whole=True))
    problems.add(find_temperature_problems(options.temperature, spell, takes_greedy=takes_greedy))
    if options.greedy:
        problems.add(
            f"{spell(name)}: found {value:g}, which {spell('greedy')} would ignore; leave one of "
            f"them out, or set {harmless:g}"
            for name, harmless in HARMLESS.items()
            if (value := getattr(options, name, None)) not in (None, harmless) and is_number(value)
        )


def check_image_options(
    options: argparse.Namespace, spell: SpellOption, problems: Problems,
    family: Family | None = None, max_steps: int = MAX_IMAGE_STEPS,
) -> None:  # fmt: skip
    """Adds problems of the options of images; `family` None: the model is not known."""
    takes_greedy = family is None or not family.denoises
    check_options(options, spell, problems, takes_greedy=takes_greedy)
    problems.add(check_number(spell("cfg_scale"), options.cfg_scale, 0))
    steps = options.image_steps
    problems.add(check_number(spell("image_steps"), steps, 1, max_steps, whole=True))
    check_token_options(options, spell, problems)
    if not options.think:
        problems.add(
            f"{spell(name)}: found {value}, but only plans are texts; add {spell('think')}, or "
            "leave it out"
            for name in PLAN_OPTIONS
            if (value := getattr(options, name)) is not None
        )


def list_image_options(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the names of the options that a checkpoint may state for images."""
    return (*IMAGE_OPTIONS, *PLAN_OPTIONS) if options.think else IMAGE_OPTIONS


def check_token_options(
    options: argparse.Namespace, spell: SpellOption, problems: Problems
) -> None:
    """Adds problems of the options of sampled text."""
    problems.add(check_number(spell("max_new_tokens"), options.max_new_tokens, 1, whole=True))
    problems.add(check_number(spell("top_k"), options.top_k, 0, whole=True))
    problems.add(check_number(spell("top_p"), options.top_p, 0, 1, above=True))


def check_text_options(options: argparse.Namespace, spell: SpellOption, problems: Problems) -> None:
    """Adds problems of the options of answers."""
    from corl_jax.data.questions import find_text_problems

    check_options(options, spell, problems)
    check_token_options(options, spell, problems)
    if options.instruction not in (None, *INSTRUCTIONS):
        problems.add(
            f"{spell('instruction')}: found {options.instruction!r}; expected one of "
            f"{', '.join(INSTRUCTIONS)}"
        )
    if options.system_prompt:
        problems.add(find_text_problems(spell("system_prompt"), options.system_prompt))


def find_long_prompts(
    model: PolicyFiles, options: argparse.Namespace, prompts: Sequence[str], spell: SpellOption
) -> list[str]:
    """Returns a problem for each prompt that leaves no room for an image and its plan in the model.

    Returns a single one if no prompt would; the options must be complete.
    """
    limits = model.family.limits(model.sizes)
    rows = [(f"prompt {i}", {"prompt": text}) for i, text in enumerate(prompts)]
    if not options.think:
        return _find_long_rows(model, IMAGE_GENERATION, rows, limits.image_tokens)
    if lack := model.family.find_lack(PLANNED_GENERATION, model.sizes):
        return [f"{spell('think')}: the task {lack}; leave it out, or take another model"]
    image = limits.planned_image_tokens
    if options.max_new_tokens >= limits.positions - image:
        return [
            f"{spell('max_new_tokens')}: found {options.max_new_tokens}; expected less than "
            f"{limits.positions - image}: of the model's {limits.positions} positions the image "
            f"takes {image}, the prompt its own"
        ]
    return _find_long_rows(model, PLANNED_GENERATION, rows, options.max_new_tokens + image)


def find_unread_image_options(
    model: PolicyFiles, user_options: argparse.Namespace, spell: SpellOption
) -> list[str]:
    """Returns a problem for each option of the user that does not change what the model draws.

    `user_options` lack the values that defaults and checkpoint add.
    """
    family, steps, problems = model.family, user_options.image_steps, []
    if steps is not None and not family.takes_image_steps:
        problems.append(
            f"{spell('image_steps')}: found {steps}; a {family.name} draws the codes of images one "
            "by one; leave it out"
        )
    if not family.denoises:
        return problems
    way = f"a {family.name} makes images by denoising, of which only the first noise is random"
    # A plan before the image is sampled at the temperature.
    harmless = (None, HARMLESS["temperature"])
    if not user_options.think and user_options.temperature not in harmless:
        problems.append(
            f"{spell('temperature')}: found {user_options.temperature}; {way}; leave it out"
        )
    if user_options.greedy:
        problems.append(f"{spell('greedy')}: {way}; leave it out")
    return problems


def cut_given_image(
    model: PolicyFiles, options: argparse.Namespace, spell: SpellOption
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns pixels and drawn codes of a given image, as `Inpainting.cut`; None without an image.

    Raises: InputError for a model without in-painting, and for an image or mask without use.
    """
    from corl_jax.data.images import decode_image

    files = {name: getattr(options, name) for name in ("inpaint", "mask")}
    missing = [name for name, value in files.items() if value is None]
    inpaint, mask = (spell(name) for name in files)
    if len(missing) == len(files):
        if options.spread_steps:
            raise InputError(f"{spell('spread_steps')}: has an effect with {inpaint} alone")
        return None
    problems, pictures = Problems(), {}
    if missing:
        problems.add(f"{spell(missing[0])}: not given; expected {inpaint} with {mask}")
    if options.think:
        problems.add(f"{inpaint}: draws no image after a plan; leave out {spell('think')}")
    for name, value in files.items():
        if value is not None:
            with problems.collect(f"{spell(name)}: "):
                pictures[name] = decode_image(value)
    inpainting = model.family.inpainting
    if inpainting is None:
        problems.add(
            f"{inpaint}: a {model.family.name} draws no part of a given image; leave {inpaint} and "
            f"{mask} out, or take another model, such as a Show-o"
        )
    problems.raise_any()
    assert inpainting is not None
    with problems.collect(f"{mask}: "):
        return inpainting.cut(model.sizes, pictures["inpaint"], pictures["mask"])
    problems.raise_any()
    return None


def find_long_questions(
    model: PolicyFiles,
    options: argparse.Namespace,
    questions: Sequence[ImageQuestion],
    spell: SpellOption,
) -> list[str]:
    """Returns a problem for each question that leaves no room for its answer in the model.

    Returns a single one if no question would; the options must be complete.
    """
    limits = model.family.limits(model.sizes)
    positions, image = limits.positions, limits.input_image_tokens
    if options.max_new_tokens >= positions - image:
        return [
            f"{spell('max_new_tokens')}: found {options.max_new_tokens}; expected less than "
            f"{positions - image}: of the model's {positions} positions the image takes {image}, "
            "the question its own"
        ]
    rows = [(q.where, {"qa_problem": format_question(options, q)}) for q in questions]
    return _find_long_rows(
        model, IMAGE_UNDERSTANDING, rows, options.max_new_tokens, options.system_prompt
    )


def _find_long_rows(
    model: PolicyFiles, task: Task, rows: Sequence[tuple[str, dict[str, str]]], completion: int,
    system_prompt: str = "",
) -> list[str]:  # fmt: skip
    """Returns a problem for each row, of (name in messages, columns), that is too long."""
    from corl_jax.data.questions import replace_surrogates

    positions = model.family.limits(model.sizes).positions
    room, problems = positions - completion, Problems()
    for name, columns in rows:
        # A lone surrogate is a problem already; replaced, the tokenizer can count the others.
        texts = {column: replace_surrogates(text) for column, text in columns.items()}
        system = replace_surrogates(system_prompt)
        # A text may hold a control token, which its family refuses.
        with problems.collect(f"{name}: "):
            length = len(model.processor.prompt_ids(task.turn.prompt, texts, system))
            if length > room:
                problems.add(
                    f"{name}: found {length} tokens; expected at most {room}, which leaves room "
                    f"for what is generated in the model's {positions} positions"
                )
    return list(problems)


# ---- sampling


def add_image_steps_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option that chooses the number of steps in which an image is drawn."""
    parser.add_argument(
        "--image-steps", type=int, metavar="N",
        help="steps of a model that draws the codes of an image in any order, such as Show-o "
        "(default 16 for images of up to 256 codes, else 50), or that makes images by denoising, "
        "such as JanusFlow (default 30)",
    )  # fmt: skip


def choose_steps(image_steps: int | None, *, spread: bool = False) -> dict[str, Any]:
    """Returns the sampler's options of the steps of an image; None: as many as usual.

    `spread`: over the codes that are drawn of a given image, not over all codes.
    """
    from corl_jax.policies.family import Denoising, Unmasking

    return {
        "unmasking": Unmasking(image_steps, "none", count_unknown=spread),
        "denoising": Denoising(image_steps or Denoising.steps),
    }


def choose_image_sampling(
    model: PolicyFiles, dtype: Any, options: argparse.Namespace
) -> SamplingOptions:
    """Returns the sampler's options of images; the options must be complete."""
    from corl_jax.policies.family import SamplingOptions

    return SamplingOptions(
        special=model.processor.special, cfg_scale=options.cfg_scale, greedy=options.greedy,
        temperature=options.temperature or 1.0, dtype=dtype,  # None if greedy
        # of plans; None without plans, and the first two if greedy
        top_k=options.top_k or 0, top_p=options.top_p or 1.0,
        max_new_tokens=options.max_new_tokens or 1,
        **choose_steps(options.image_steps, spread=options.spread_steps),
    )  # fmt: skip


def choose_text_sampling(
    model: PolicyFiles, dtype: Any, options: argparse.Namespace
) -> SamplingOptions:
    """Returns the sampler's options of answers; the options must be complete."""
    from corl_jax.policies.family import SamplingOptions

    return SamplingOptions(
        special=model.processor.special, max_new_tokens=options.max_new_tokens,
        greedy=options.greedy, temperature=options.temperature or 1.0,  # None if greedy
        top_k=options.top_k or 0, top_p=options.top_p or 1.0, dtype=dtype,
    )  # fmt: skip


def sample_images(
    model: Model, dtype: Any, prompts: Sequence[str], options: argparse.Namespace, progress: bool
) -> Iterator[Sample]:
    """Yields the images of prompts; the options must be complete."""
    from corl_jax.policies import batched

    sample, image = None, cut_given_image(model, options, str)
    if image is not None:
        assert model.family.inpainting is not None  # checked by `cut_given_image`
        sample = model.family.inpainting.bind(model.sizes, model.params, *image)
    yield from batched.generate_images(
        model, prompts, choose_image_sampling(model, dtype, options), samples=options.samples,
        batch_size=options.batch_size, seed=options.seed, show_progress=progress,
        think=options.think, sample=sample,
    )  # fmt: skip


def sample_answers(
    model: Model, dtype: Any, questions: Sequence[ImageQuestion], options: argparse.Namespace,
    progress: bool,
) -> Iterator[Sample]:  # fmt: skip
    """Yields the answers to questions; the options must be complete."""
    from corl_jax.data.images import decode_image
    from corl_jax.policies import batched

    def open_image(number: int) -> Image:
        return decode_image(questions[number].file)

    sampling = choose_text_sampling(model, dtype, options)
    yield from batched.answer_questions(
        model, [format_question(options, question) for question in questions], open_image,
        sampling, system_prompt=options.system_prompt, samples=options.samples,
        batch_size=options.batch_size, seed=options.seed, show_progress=progress,
    )  # fmt: skip


def format_question(options: argparse.Namespace, question: ImageQuestion) -> str:
    """Returns a question with its instruction, as the model gets it."""
    return add_instruction(question.row["question"], options.instruction)
