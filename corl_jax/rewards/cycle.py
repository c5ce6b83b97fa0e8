"""The cycle rewards: caption a generated image, and compare it with its real image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from corl_jax.config.fields import Positive
from corl_jax.data.instructions import CAPTION
from corl_jax.devices.batches import PendingRows
from corl_jax.rewards import captions, image, policy, similarity, spice, text
from corl_jax.rewards.image import lpips_distance
from corl_jax.rewards.image_rewards import Fit, compare_to_real_images
from corl_jax.rewards.samples import Context, Samples, score_rows

Caption = Literal["policy", "blip"]
TextTerm = Literal["jaccard", "bertscore", "sentence", "rouge", "spice"]
CycleImageTerm = Literal["rmse", "mse", "ssim", "psnr", "lpips"]


def score_bid_cycle(
    samples: Samples,
    context: Context,
    *,
    caption: Caption = "policy",
    text_term: TextTerm = "jaccard",
    image_term: CycleImageTerm = "rmse",
    image_fit: Fit = "squash",
    normalise: bool = False,
    bert_layer: int = -1,
    scorer: str = "policy",
    caption_greedy: bool = True,
    max_new_tokens: Positive = 64,
    chunk: Positive = policy.CHUNK,
) -> PendingRows:
    """Computes R_cycle: caption against prompt, plus generated against real image; in [0, 2].

    `caption`: BLIP or the policy (see the option `scorer`) captions the image in at most
    `max_new_tokens`. The policy decodes greedily; with `caption_greedy` false it samples at
    temperature 1, and the reward is random. `text_term` compares caption and prompt. `bertscore`
    compares the hidden states after `bert_layer`, where -1 is the last. `image_term` compares the
    generated image with the real one, which is resized as `image_fit` says. `normalise` clips both
    terms to [0, 1] and halves their sum. NaN without a prompt or a real image.
    Source: arXiv 2505.17534 eq. 3 (blip, spice, lpips); the released code (blip, bertscore,
    lpips) and its second version (policy, jaccard, rmse).
    """
    # Captions first: the devices work on them while the host resizes the real images.
    wait_for_captions = start_captions(
        samples, context, caption, scorer=scorer, greedy=caption_greedy,
        max_new_tokens=max_new_tokens, chunk=chunk,
    )  # fmt: skip
    image_scores = _compare_to_real_images(samples, context, image_term, image_fit)

    def finish() -> np.ndarray:
        prompts = samples.column("prompt")
        of_text = compare_texts(text_term, wait_for_captions(), prompts, context, bert_layer)
        of_image = np.asarray(image_scores)
        # Only with `normalise`: 1 - LPIPS and a cosine of sentences can be negative, and the
        # released code adds them as they are.
        if normalise:
            of_text, of_image = (np.clip(term, 0.0, 1.0) for term in (of_text, of_image))
        total = image.cycle_reward(jnp.asarray(of_text), jnp.asarray(of_image), normalise)
        return np.asarray(total, np.float32)

    return PendingRows(finish)


def score_cycle(
    samples: Samples,
    context: Context,
    *,
    caption: Caption = "blip",
    text_term: TextTerm = "spice",
    bert_layer: int = -1,
    scorer: str = "policy",
    caption_greedy: bool = True,
    max_new_tokens: Positive = 30,
    chunk: Positive = policy.CHUNK,
) -> PendingRows:
    """Compares the caption of the image with the prompt; at most 1, NaN without a prompt.

    `score_bid_cycle` explains the options.
    Source: the released code.
    """
    wait_for_captions = start_captions(
        samples, context, caption, scorer=scorer, greedy=caption_greedy,
        max_new_tokens=max_new_tokens, chunk=chunk,
    )  # fmt: skip
    prompts = samples.column("prompt")
    return PendingRows(
        lambda: compare_texts(text_term, wait_for_captions(), prompts, context, bert_layer)
    )


def start_captions(
    samples: Samples,
    context: Context,
    caption: Caption,
    *,
    scorer: str,
    greedy: bool,
    max_new_tokens: int,
    chunk: int,
) -> Callable[[], list[str]]:
    """Captions the images by BLIP or by the policy, without waiting.

    Returns a function that waits for the captions, one per image.
    """
    if caption == "blip":
        with context.network("blip") as network:
            return captions.caption_images(
                network, samples.require_images(), max_new_tokens=max_new_tokens, chunk=chunk
            )
    return policy.ask_scorer(
        samples, context, [CAPTION] * len(samples), stream="caption", scorer=scorer,
        greedy=greedy, max_new_tokens=max_new_tokens, chunk=chunk,
    )  # fmt: skip


def compare_texts(
    term: TextTerm,
    image_captions: Sequence[str],
    prompts: Sequence[str | None],
    context: Context,
    bert_layer: int = -1,
) -> np.ndarray:
    """Compares captions with prompts [N] float32, at most 1; NaN without a prompt.

    `sentence` lies in [-1, 1], the others in [0, 1].
    """
    if term == "bertscore":
        with context.network("bert") as network:
            return similarity.bert_score(network, image_captions, prompts, layer=bert_layer)
    if term == "sentence":
        with context.network("sentence") as network:
            return similarity.sentence_similarity(network, image_captions, prompts)
    if term == "spice":
        return spice.score_spice(image_captions, prompts)
    if term == "rouge":
        return similarity.rouge_l(image_captions, prompts)

    # The prompt comes first: the soft Jaccard takes the words of its first text in turn, so it is
    # not symmetric.
    def measure_overlap(prompt: str | None, caption: str) -> float:
        return text.soft_jaccard(prompt, caption, True) if (prompt or "").strip() else float("nan")

    return score_rows(measure_overlap, list(prompts), list(image_captions))


def _compare_to_real_images(samples: Samples, context: Context, term: str, fit: Fit) -> PendingRows:
    if term != "lpips":
        return compare_to_real_images(samples, context, term, fit)
    with context.network("lpips") as network:
        distance = lpips_distance(
            network, samples.require_images(), samples.column("real_image"), fit=fit
        )
    return distance.then(lambda x: 1.0 - x)


def find_option_problems(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Returns options without effect beside the others, and terms that cannot run here."""
    chosen = {**defaults, **options}
    problems = []
    if chosen["caption"] == "blip":
        problems += [
            f"option {name}: found {options[name]!r}, but caption blip does not ask the policy; "
            "leave it out, or set caption to policy"
            for name in ("scorer", "caption_greedy")
            if options.get(name, defaults[name]) != defaults[name]
        ]
    if chosen["text_term"] != "bertscore" and chosen["bert_layer"] != defaults["bert_layer"]:
        problems.append(
            f"option bert_layer: found {chosen['bert_layer']}, but text_term "
            f"{chosen['text_term']} asks no BERT; leave it out, or set text_term to bertscore"
        )
    # Before a run: both terms need packages that are not installed by default.
    check = {"spice": spice.find_spice_problem, "rouge": similarity.find_rouge_problem}
    problem = check.get(chosen["text_term"], lambda: None)()
    return [*problems, f"option text_term: {problem}"] if problem else problems


def find_network_problems(options: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """Returns option values that exceed the captioner's positions or BERT's layers."""
    problems = []
    if "blip" in sizes:
        limit, tokens = sizes["blip"].text.max_position_embeddings, options["max_new_tokens"]
        if tokens > limit:
            problems.append(
                f"option max_new_tokens: found {tokens}; expected 1 to {limit}, the captioner's "
                "positions"
            )
    if "bert" in sizes:
        depth, layer = sizes["bert"].num_layers, options["bert_layer"]
        # Hidden states 0 (embeddings) to depth, or -1 (last) to -depth - 1 (embeddings).
        if not -depth - 1 <= layer <= depth:
            problems.append(
                f"option bert_layer: found {layer}; expected {-depth - 1} to {depth}, the "
                "network's layers"
            )
    return problems
