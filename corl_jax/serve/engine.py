"""Turns checked requests into rows of a sampler's call, and draws them with a model."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import Any

import jax

from corl_jax.data.instructions import add_instruction
from corl_jax.errors import InputError
from corl_jax.inference import (
    TEXT_OPTIONS,
    choose_image_sampling,
    choose_text_sampling,
    find_long_prompts,
    find_unread_image_options,
    list_image_options,
)
from corl_jax.policies import Model
from corl_jax.policies.batched import Row, Sample, sample_rows
from corl_jax.policies.family import SamplingOptions
from corl_jax.sampling_options import complete_options
from corl_jax.serve.requests import ApiError, ChatRequest, ImageRequest, spell_image_field
from corl_jax.tasks import IMAGE_GENERATION, IMAGE_UNDERSTANDING, Task

LEAST_NEW_TOKENS = 16
SIZE_STEP = 4  # between the numbers of rows for which programs are compiled
MAX_PROGRAMS = 96
"""Compiled programs that are kept. Clients choose options, so their number has no other bound."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Program:
    """What the samples of one call have in common."""

    task: Task
    length: int  # padded prompt length
    options: SamplingOptions


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that is ready to be drawn."""

    program: Program
    rows: list[Row]
    seed: int
    prompt_tokens: int  # the image's included
    max_new_tokens: int = 0  # of an answer; the program may draw a few more


class Engine:
    """A model that draws rows, in few shapes so that few programs are compiled."""

    def __init__(self, model: Model, dtype: Any, batch_size: int):
        self.model, self.dtype = model, dtype
        self.limits = model.family.limits(model.sizes)
        self.sizes = list_batch_sizes(batch_size)
        self._programs: set[tuple] = set()
        self._one_at_a_time = threading.Lock()  # tokenizers are not made for several threads

    # ---- requests

    def prepare_images(self, request: ImageRequest) -> Job:
        """Returns the job of a request for images.

        Raises: ApiError for a prompt without room, and for an option that changes no image.
        """
        unread = find_unread_image_options(self.model, request.options, spell_image_field)
        if unread:
            # "temperature 0: .." is of the field temperature
            field = unread[0].partition(":")[0].split()[0]
            raise ApiError(400, unread[0], code="invalid_value", param=field)
        options = self._complete(request.options, list_image_options(request.options))
        with self._one_at_a_time:
            ids = self._read_ids(IMAGE_GENERATION, {"prompt": request.prompt})
            if problems := find_long_prompts(self.model, options, [request.prompt], str):
                text = problems[0].removeprefix("prompt 0: ")
                raise ApiError(400, f"prompt: {text}", code="context_length_exceeded")
            sampling = choose_image_sampling(self.model, self.dtype, options)
            return self._make_job(IMAGE_GENERATION, ids, None, sampling, options)

    def prepare_answers(self, request: ChatRequest) -> Job:
        """Returns the job of a question. Raises: ApiError for one that leaves no room."""
        requested = request.options.max_new_tokens
        options = self._complete(request.options, TEXT_OPTIONS)
        question = add_instruction(request.question, options.instruction)
        with self._one_at_a_time:
            ids = self._read_ids(
                IMAGE_UNDERSTANDING, {"qa_problem": question}, options.system_prompt
            )
            room = self.limits.positions - len(ids)
            if room < (requested or 1):
                raise ApiError(
                    400, f"max_tokens: found {requested or 1} after a prompt of {len(ids)} tokens; "
                    f"expected at most {max(room, 0)}: the model has {self.limits.positions} "
                    f"positions, of which the image takes {self.limits.input_image_tokens}",
                    code="context_length_exceeded", param="messages",
                )  # fmt: skip
            # The checkpoint's own number may be more than this prompt leaves room for.
            options.max_new_tokens = min(options.max_new_tokens, room)
            sampling = choose_text_sampling(self.model, self.dtype, options)
            return self._make_job(IMAGE_UNDERSTANDING, ids, request.image, sampling, options)

    def _complete(
        self, options_given: argparse.Namespace, names: Sequence[str]
    ) -> argparse.Namespace:
        """Returns options with the checkpoint's values, or else the defaults, as `generate`."""
        options = argparse.Namespace(**vars(options_given), model=self.model.folder)
        if problems := complete_options(options, names):
            raise RuntimeError("; ".join(problems))  # the start has read the same file
        return options

    def _read_ids(self, task: Task, columns: dict[str, str], system_prompt: str = "") -> list[int]:
        try:
            return self.model.processor.prompt_ids(task.turn.prompt, columns, system_prompt)
        except InputError as error:  # a control token in the text
            param = "messages" if task.makes_text else "prompt"
            raise ApiError(400, f"{param}: {error}", code="invalid_value", param=param) from error

    def _make_job(
        self, task: Task, ids: list[int], image: Any, sampling: SamplingOptions,
        options: argparse.Namespace,
    ) -> Job:  # fmt: skip
        processor, length = self.model.processor, self.model.processor.bucket(len(ids))
        images = None if image is None else [image]
        encoded = processor.encode(task.turn.prompt, [ids], images, length)
        most_tokens = sampling.max_new_tokens
        if task.makes_text:
            # Fewer programs: token t is the same, however many may follow it.
            room = max(most_tokens, self.limits.positions - length)
            sampling = dataclasses.replace(
                sampling, max_new_tokens=min(round_up(most_tokens), room)
            )
        # The prompt is number 0 of the request, as it is of a command line with one prompt.
        rows = [Row(encoded, options.seed, 0, number) for number in range(options.samples)]
        program = Program(task, length, sampling)
        return Job(program, rows, options.seed, len(ids), most_tokens if task.makes_text else 0)

    # ---- samples

    def draw(self, program: Program, rows: Sequence[Row]) -> list[Sample]:
        """Returns the sample of each row; only one thread may call it."""
        size = next(size for size in self.sizes if size >= len(rows))
        self._note_program(program, size)
        return sample_rows(self.model, program.task, rows, program.options, size)

    def _note_program(self, program: Program, size: int) -> None:
        """Drops the compiled programs when there are too many of them."""
        # Temperature and scale are arguments of a program, but guidance itself is not.
        options = dataclasses.replace(
            program.options, temperature=1.0, cfg_scale=float(program.options.cfg_scale != 1)
        )
        self._programs.add((program.task.stream, program.length, options, size))
        if len(self._programs) > MAX_PROGRAMS:
            logger.warning("more than %d programs are compiled; dropping them", MAX_PROGRAMS)
            jax.clear_caches()
            self._programs.clear()

    def read_texts(self, samples: Sequence[Sample], job: Job) -> list[tuple[str, int, bool]]:
        """Returns of each answer its text, the number of its tokens, and whether it has ended."""
        processor, texts = self.model.processor, []
        for sample in samples:
            tokens = sample.tokens[: job.max_new_tokens].tolist()
            with self._one_at_a_time:
                text = processor.decode(tokens)
            texts.append((text, len(tokens), tokens[-1] == processor.special.eos))
        return texts


def list_batch_sizes(batch_size: int) -> list[int]:
    """Returns the numbers of rows for which programs are compiled: 16 -> [1, 4, 16]."""
    sizes = [1]
    while sizes[-1] < batch_size:
        sizes.append(min(sizes[-1] * SIZE_STEP, batch_size))
    return sizes


def round_up(max_new_tokens: int) -> int:
    """Returns the next power of two, at least LEAST_NEW_TOKENS."""
    return max(LEAST_NEW_TOKENS, 1 << (max_new_tokens - 1).bit_length())
