"""The stage `sft`: one task or both on one language model, by next-token loss.

Up to four kinds of completions come from each data row: the row's image for its prompt, the answer
to its question, and, if the data has them, the caption for the captioning instruction and a text.
The targets of images are the codes or latents that the frozen image tokenizer gives them. The loss
of latents is that of rectified flow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.config.schema import Config
from corl_jax.config.stages import STAGE_FACTS
from corl_jax.data import instructions
from corl_jax.data.columns import ANSWER_COLUMN, IMAGE_COLUMN
from corl_jax.devices.processes import all_max
from corl_jax.params import merge
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.family import NOISE_KEYS, PIXELS
from corl_jax.tasks import CODES, LATENTS, TASKS, TEXT, image_tasks, text_tasks
from corl_jax.train.image_codes import fit_pixels, read_images
from corl_jax.train.run import Iteration, Run, put_batch
from corl_jax.train.step import Batch, TaskBatch, TrainState
from corl_jax.types import Array, EncodedPrompts, Prompts, Segment

CAPTION = "caption"
"""Name of the captions beside those of the tasks, in metrics and weights."""

PLAIN_TEXT, PLAIN_TEXT_WEIGHT = "plain_text", 0.1
"""Name of the texts without image beside those of the tasks, and the weight of their loss.

Source: Show-o (arXiv 2408.12528): 1 for images, 0.1 for texts, 1 for answers.
"""

TEXT_PROMPT = "text"
"""Kind of prompt that begins a text without image: its first token begins any text."""

NOISE_STREAM = (1 << 16) + 1
"""Random stream of `policies.family.NOISE_KEYS`, apart from those of samples."""

TARGETS_KEPT = 1 << 16
"""Texts whose ids stay in memory, some 30 MB: each pass over the data has the same ones."""

CFG_DROPOUT = 0.1
"""Fraction of image prompts that are blanked: guidance needs a model that knows blank prompts."""


def choose_image_weight(config: Config) -> float:
    """Returns the weight of the loss of images: the option's, or else the stage's."""
    weight = config.sft.t2i_weight
    return STAGE_FACTS[config.stage].image_weight if weight is None else weight


def sft_iteration(run: Run, state: TrainState, prompts: Prompts, step: int):
    """Returns (next state, Iteration) of one batch of rows."""
    with run.phases("data"):
        params = merge(state.params, run.frozen)
        batch = put_batch(run, make_supervised_batch(run, prompts, step))
        drawn = image_tasks(tuple(batch.keys() & TASKS.keys()))
        # Before the images, because the host waits for it and the devices work in order.
        replay = {NOISE_KEYS: make_noise_bits(run, prompts)} if drawn else {}
        batch = read_images(run, params, batch)
        for task in drawn:
            pixels = batch[task].segments[0].values
            values = run.family.encode_images(run.sizes, params, pixels)
            seen = make_encoder_pixels(run, pixels)
            kind = LATENTS if run.family.denoises else CODES
            # [N, T] codes, or latents [N, 1, h, w, C], whose error is one number
            segment = Segment(kind, values, jnp.ones(values.shape[:2], bool), replay=replay | seen)
            batch[task] = dataclasses.replace(batch[task], segments=(segment,))
    with run.phases("update"):
        state, metrics = run.train_step(state, run.frozen, batch)
    return state, Iteration(metrics, {}, {}, [metrics])


def make_supervised_batch(run: Run, prompts: Prompts, step: int) -> Batch:
    """Returns the completions of each kind as host arrays; pixels stand in the place of codes."""
    options, columns = run.sft, prompts.columns
    weights = dict(run.loss_weights)
    batch: Batch = {}
    for task in image_tasks(run.tasks):
        if weights[task]:
            # Drawn for the rows of all processes, so that the choice does not depend on the mesh.
            # prompts.index counts rows of the whole run: row 70 of step 2 with 32 rows is number 6.
            total = run.train_loader.batch_size
            draws = np.random.default_rng([run.seed, step, step * total]).random(total)
            dropped = draws[prompts.index - step * total] < CFG_DROPOUT
            encoded = blank_prompts(run, prompts.encoded[task], dropped)
            pixels = fit_pixels(run, columns[IMAGE_COLUMN])
            # The codes come later, from the devices; this mask only has the right number of rows.
            segment = Segment(CODES, pixels, np.ones(len(prompts), bool))
            batch[task] = TaskBatch(encoded, (segment,))
    for task in text_tasks(run.tasks):
        questions = prompts.encoded[task]
        batch[task] = TaskBatch(questions, (make_targets(run, columns[ANSWER_COLUMN]),))
        if options.caption_column:
            turn = TASKS[task].turn
            row = dict.fromkeys(TASKS[task].columns, instructions.CAPTION)
            ids = run.processor.prompt_ids(turn.prompt, row)
            encoded = run.processor.pad([ids] * len(prompts))
            encoded = dataclasses.replace(encoded, pixel_values=questions.pixel_values)
            captions = columns[options.caption_column]
            batch[CAPTION] = TaskBatch(encoded, (make_targets(run, captions),))
    if options.text_column:
        batch[PLAIN_TEXT] = make_plain_texts(run, columns[options.text_column])
    return batch


def make_plain_texts(run: Run, texts: Sequence[str]) -> TaskBatch:
    """Returns texts without images as completions of their first token, which begins any text."""
    limit, rows = run.train_loader.options.max_prompt_length, []
    for text in texts:
        ids = run.processor.prompt_ids(TEXT_PROMPT, {"text": text})
        # A text that is cut does not end, as in Show-o's own training.
        rows.append([*ids, run.processor.special.eos][:limit])
    # A length of one token, not of a bucket: by it a family tells these prompts from questions.
    prompts = run.processor.pad([row[:1] for row in rows], length=1)
    return TaskBatch(prompts, (pad_targets(run, [row[1:] for row in rows]),))


def make_noise_bits(run: Run, prompts: Prompts, group_size: int = 1) -> Array:
    """Returns the bits [N, 2] of the random keys of the images of a batch, on the devices."""
    keys = sample_keys(run.seed, prompts.index, group_size, NOISE_STREAM)
    return put_batch(run, np.asarray(jax.random.key_data(keys)))


def make_encoder_pixels(run: Run, pixels: Array) -> dict[str, Array]:
    """Returns PIXELS of images [N, S, S, 3] in [-1, 1], if their states are aligned."""
    normalise = run.family.normalise_pixels
    if not run.sft.repa_weight:
        return {}
    assert normalise is not None, "a family with an alignment has an image encoder"
    levels = jnp.round((pixels + 1) * 127.5).astype(jnp.uint8)
    return {PIXELS: normalise(run.processor, levels)}


def blank_prompts(run: Run, prompts: EncodedPrompts, dropped: np.ndarray) -> EncodedPrompts:
    """Replaces the prompts of dropped rows by the unconditional prompts of guidance."""
    blank = np.asarray(run.family.blank_prompts(prompts.input_ids, run.processor.special))
    ids = np.where(dropped[:, None], blank, prompts.input_ids)
    return dataclasses.replace(prompts, input_ids=ids)


def make_targets(run: Run, answers: Sequence[str]) -> Segment:
    """Returns texts as a segment [B, T]: each answer and the end token, padded to a bucket."""
    return pad_targets(run, [tokenise_target(run.processor, text) for text in answers])


@functools.lru_cache(maxsize=TARGETS_KEPT)
def tokenise_target(processor: Any, text: str) -> np.ndarray:
    """Returns the ids [T] int32 of a text and the end token."""
    return np.asarray([*processor.answer_ids(text), processor.special.eos], np.int32)


def pad_targets(run: Run, rows: Sequence[Sequence[int] | np.ndarray]) -> Segment:
    """Returns ids of texts as a segment [B, T], padded to a bucket."""
    processor: Any = run.processor
    # The rows of all processes form one array, so all pad to the longest row of any process.
    length = processor.bucket(all_max(max(map(len, rows))))
    # Padding has the id of the end token. The mask tells them apart.
    tokens = np.full((len(rows), length), processor.special.eos, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        mask[index, : len(row)] = True
    return Segment(TEXT, tokens, mask)
