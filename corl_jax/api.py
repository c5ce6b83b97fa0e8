"""`corl_jax.load(...)`: a model that generates images and answers questions, for Python programs.

It checks and samples as the command `generate` does: equal options give equal samples.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack, overload

import numpy as np
from PIL import Image

from corl_jax import inference
from corl_jax.data.images import decode_image
from corl_jax.data.questions import ImageQuestion, find_text_problems
from corl_jax.errors import InputError, Problems
from corl_jax.input_files import expand_path
from corl_jax.nearest import suggest_name
from corl_jax.sampling_options import complete_options
from corl_jax.tasks import PLAN_COLUMN

if TYPE_CHECKING:
    from corl_jax.policies import Model

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"
"""A file, an image of Pillow, or uint8 [H, W, 3] (or [H, W, 4] with alpha, [H, W] for grey)."""
Images: TypeAlias = list[Any] | tuple[Any, ...]  # of ImageSource; lists are invariant
Texts: TypeAlias = list[str] | tuple[str, ...]


class SamplingKeywords(TypedDict, total=False):
    """Options of images and of answers. None: as generation_config.json states, else a default."""

    seed: int  # 0
    temperature: float | None  # divides the logits
    greedy: bool | None  # always take the most likely token
    batch_size: int  # samples generated at once; 16
    show_progress: bool  # a bar on a terminal; False


class ImageKeywords(SamplingKeywords, total=False):
    """Options of images. The last three are of plans."""

    cfg_scale: float | None  # scale of guidance; 1: no guidance
    # steps of a model that draws codes in any order or makes images by denoising; None: as usual
    image_steps: int | None
    inpaint: ImageSource | None  # an image of which a part is drawn anew
    mask: ImageSource | None  # of its size, white where it is drawn anew
    spread_steps: bool  # with inpaint: over the codes that are drawn, not over all; False
    think: bool  # write a plan before each image, which is then its `info["plan"]`; False
    top_k: int | None
    top_p: float | None
    max_new_tokens: int | None  # most tokens of a plan


class AnswerKeywords(SamplingKeywords, total=False):
    """Options of answers."""

    top_k: int | None  # sample from the K most likely tokens; 0: from all
    top_p: float | None  # sample from the most likely tokens with total probability P
    max_new_tokens: int | None  # most tokens of an answer
    instruction: str | None  # choice, open, auto or none: added to questions without answer tags
    system_prompt: str  # none


DEFAULTS = {
    "seed": 0,
    "batch_size": 16,
    "show_progress": False,
    "system_prompt": "",
    "think": False,
    "spread_steps": False,
}
"""Values of the keywords that generation_config.json does not have."""


def load(path_or_hub_id: str | os.PathLike[str], *, dtype: str | None = None) -> LoadedModel:
    """Loads a model: a directory of any layout, a run's `export`, a hub id, "mini" or "nano".

    `dtype` of computing: float32 or bfloat16; None: float32 on a CPU, bfloat16 elsewhere.

    Raises:
        InputError: listing every problem of the model's files and of JAX's settings.
    """
    if dtype not in (None, *inference.DTYPES):
        raise InputError(f"dtype: found {dtype!r}; expected {' or '.join(inference.DTYPES)}")
    policy, compute_dtype = inference.load_model(path_or_hub_id, dtype)
    return LoadedModel(policy, compute_dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class LoadedModel:
    """A model of any family, on the devices of this process.

    A sample depends on the seed, on the position of its prompt or question in the call, and on its
    number. Batch size, the other prompts and the number of devices change it only by rounding.
    """

    policy: Model
    dtype: Any

    def __repr__(self) -> str:
        """Returns family, folder and dtype; the parameters would fill the screen."""
        return f"<{self.policy.family.name} of {self.policy.folder}, {self.dtype.name}>"

    @overload
    def generate_images(
        self, prompts: str, n: int = 1, **options: Unpack[ImageKeywords]
    ) -> list[Image.Image]: ...

    @overload
    def generate_images(
        self, prompts: Texts, n: int = 1, **options: Unpack[ImageKeywords]
    ) -> list[list[Image.Image]]: ...

    def generate_images(
        self, prompts: str | Texts, n: int = 1, **options: Unpack[ImageKeywords]
    ) -> list[Image.Image] | list[list[Image.Image]]:
        """Returns `n` images of a prompt, or for a list of prompts a list of `n` images of each.

        With `think` the model writes a plan before each image, which is `image.info["plan"]`.
        Options: seed, cfg_scale, image_steps, inpaint, mask, spread_steps, temperature, greedy,
        batch_size, show_progress, think, and of plans top_k, top_p, max_new_tokens.

        Raises:
            InputError: listing every problem of options and prompts.
        """
        texts, problems = _list_values(prompts), Problems()
        request = self._make_request(ImageKeywords, options, n)
        inference.check_image_options(request, _spell_keyword, problems, self.policy.family)
        for name in ("inpaint", "mask"):
            if (value := getattr(request, name)) is not None:
                setattr(request, name, _read_image(value, name, problems))
        for number, text in enumerate(texts):
            problems.add(find_text_problems(f"prompt {number}", text))
        problems.add(inference.find_unread_image_options(self.policy, request, _spell_keyword))
        problems.add(complete_options(request, inference.list_image_options(request)))
        problems.raise_any()
        problems.add(inference.find_long_prompts(self.policy, request, texts, _spell_keyword))
        problems.attempt(inference.cut_given_image, self.policy, request, _spell_keyword)
        problems.raise_any()
        images: list[list[Any]] = [[None] * n for _ in texts]
        # Samples arrive sorted by the length of their prompts.
        for sample in inference.sample_images(
            self.policy, self.dtype, texts, request, request.show_progress
        ):
            image = Image.fromarray(np.asarray(sample.pixels))
            if sample.plan is not None:
                image.info[PLAN_COLUMN] = self.policy.processor.decode(sample.plan)
            images[sample.prompt][sample.number] = image
        return images if _is_several(prompts) else images[0]

    @overload
    def answer(
        self, image: ImageSource, question: str, **options: Unpack[AnswerKeywords]
    ) -> str: ...

    @overload
    def answer(
        self, image: Images, question: str, **options: Unpack[AnswerKeywords]
    ) -> list[str]: ...

    @overload
    def answer(
        self, image: ImageSource | Images, question: Texts, **options: Unpack[AnswerKeywords]
    ) -> list[str]: ...

    def answer(
        self, image: ImageSource | Images, question: str | Texts,
        **options: Unpack[AnswerKeywords],
    ) -> str | list[str]:  # fmt: skip
        """Returns the answer to a question about an image; with a list, the list of answers.

        Two lists have an image for each question. Beside one list, the single question is asked
        about every image, or all questions about the single image. Options: seed, temperature,
        greedy, top_k, top_p, max_new_tokens, instruction, system_prompt, batch_size,
        show_progress.

        Raises:
            InputError: listing every problem of options, images and questions.
        """
        problems = Problems()
        request = self._make_request(AnswerKeywords, options)
        inference.check_text_options(request, _spell_keyword, problems)
        cases = _pair_questions(_list_values(image), _list_values(question), problems)
        problems.add(complete_options(request, inference.TEXT_OPTIONS))
        problems.raise_any()
        problems.add(inference.find_long_questions(self.policy, request, cases, _spell_keyword))
        problems.raise_any()
        texts = [""] * len(cases)
        for sample in inference.sample_answers(
            self.policy, self.dtype, cases, request, request.show_progress
        ):
            texts[sample.prompt] = self.policy.processor.decode(sample.tokens.tolist())
        return texts if _is_several(image) or _is_several(question) else texts[0]

    def _make_request(
        self, kind: type, options: Mapping[str, Any], samples: int = 1
    ) -> argparse.Namespace:
        """Returns all options of a call by the names that the command has for them."""
        known = kind.__annotations__
        for name in options:
            if name not in known:
                raise TypeError(f"unexpected keyword {name!r}; {suggest_name(name, known)}")
        chosen = {name: value for name, value in options.items() if value is not None}
        values = {name: DEFAULTS.get(name) for name in known} | chosen
        return argparse.Namespace(model=self.policy.folder, samples=samples, **values)


def _spell_keyword(name: str) -> str:
    """Returns the keyword of an option."""
    return "n" if name == "samples" else name


def _is_several(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _list_values(value: Any) -> list[Any]:
    return list(value) if _is_several(value) else [value]


def _pair_questions(
    images: list[Any], questions: list[Any], problems: Problems
) -> list[ImageQuestion]:
    """Returns each question with its image; a list of one value is repeated.

    Adds problems of images and questions to `problems`, and then returns nothing of use.
    """
    files = [_read_image(value, f"image {i}", problems) for i, value in enumerate(images)]
    for number, text in enumerate(questions):
        problems.add(find_text_problems(f"question {number}", text))
    files, texts = (
        values * other if len(values) == 1 else values
        for values, other in ((files, len(questions)), (questions, len(images)))
    )
    if len(files) != len(texts):
        problems.add(
            f"found {len(files)} images and {len(texts)} questions; expected as many of both, or "
            "one of either"
        )
    pairs = enumerate(zip(files, texts, strict=False))
    return [
        ImageQuestion({"question": text}, file, f"question {number}")
        for number, (file, text) in pairs
    ]


def _read_image(value: Any, name: str, problems: Problems) -> Any:
    """Returns a file as it is, and the image of anything else; adds a problem if it is unusable."""
    with problems.collect(f"{name}: "):
        if isinstance(value, str | os.PathLike):
            value = Path(expand_path(value))
        elif not isinstance(value, Image.Image):
            value = _convert_array(np.asarray(value))
        # Files are decoded again when they are asked about, so that they need not stay in memory.
        decode_image(value)
    return value


def _convert_array(array: np.ndarray) -> Image.Image:
    """Returns the image of an array. Raises: InputError for another type or shape."""
    is_shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not is_shaped or not array.size:
        raise InputError(
            f"found an array of {array.dtype} {list(array.shape)}; expected uint8 [H, W, 3], "
            "[H, W, 4] or [H, W]"
        )
    return Image.fromarray(array)
