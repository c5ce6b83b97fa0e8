"""Scores the cases with the registry and the weights that come with the project."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from corl_jax.config.schema import Networks
from corl_jax.data.instructions import CAPTION
from corl_jax.devices import startup
from corl_jax.policies import load_policy
from corl_jax.rewards import cycle, networks, registry, text
from corl_jax.rewards import policy as asking
from corl_jax.rewards.samples import Context, Samples, read_class_questions
from corl_jax.score.command import read_cases
from corl_jax.tasks import IMAGES
from tools.reward_examples import cases


@dataclasses.dataclass(frozen=True)
class Example:
    """A reward with options, and the range over which the figure draws its bars."""

    reward: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    low: float = 0.0
    high: float = 1.0

    @property
    def settings(self) -> str:
        return " ".join(f"{key}={value}".lower() for key, value in self.options.items())

    @property
    def label(self) -> str:
        return f"{self.reward} {self.settings}".strip()


SENTENCE = {"caption": "policy", "text_term": "sentence"}
T2I = (
    Example("shapes_checker"),
    Example("shapes_checker", {"partial_credit": 0.5}),
    Example("t2i_ti_sim", low=-1),
    Example("t2i_bid_cycle_reward", high=2),
    Example("t2i_bid_cycle_reward", {"text_term": "sentence", "image_term": "ssim"}, high=2),
    Example("t2i_cycle_reward", {"caption": "policy", "text_term": "jaccard"}),
    Example("t2i_cycle_reward", SENTENCE),
    Example("t2i_pixel_mse", low=-1),
    Example("t2i_qa"),
    Example("t2i_oc"),
    Example("t2i_od"),
    Example("answer_logprob"),
)
MM2T = (
    Example("format"),
    Example("format", {"strip": False}),
    Example("format_tag", high=0.5),
    Example("qa_accuracy"),
    Example("oc_accuracy"),
)
# Rules for answers about an own image, on answers written by hand.
OWN = (
    Example("self_answer"),
    Example("self_answer", {"strict": True}),
    Example("self_answer", {"partial": True}),
)
# Rewards whose weights do not come with the project, and their known range.
UNSCORED = (
    (Example("t2i_clip_reward"), "-2 to 2"),
    (Example("pickscore"), "about 15 to 25"),
    (Example("hpsv2"), "about 0.2 to 0.35"),
    (Example("aesthetic"), "about 1 to 10"),
    (Example("t2i_cycle_reward"), "0 to 1"),
    (Example("t2i_cycle_reward", {"text_term": "bertscore"}), "0 to 1; unrelated texts 0.4 to 0.8"),
    (
        Example(
            "t2i_bid_cycle_reward",
            {"caption": "blip", "text_term": "spice", "image_term": "lpips", "max_new_tokens": 50},
        ),
        "at most 2",
    ),
)


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores and answers that the page shows."""

    t2i: np.ndarray  # [T2I, images]
    mm2t: np.ndarray  # [answers, MM2T]
    answers: dict[str, list[str]]  # question -> the mini Janus's answers for each image
    own_answers: np.ndarray  # [answers of OWN_ANSWERS, OWN]
    boxes: dict[str, float]  # an answer with boxes -> its score by t2i_od's rule


def score_all() -> Scores:
    """Scores every case with every reward of T2I and MM2T.

    Raises:
        InputError: weights or cases that cannot be read.
    """
    startup.prepare_devices()
    image_rewards = [registry.bind_reward(example.reward, example.options) for example in T2I]
    loaded = {
        checked.name: networks.load_frozen_network(checked, None, offload=False)
        for checked in _list_networks(image_rewards)
    }
    model = load_policy(cases.MODEL, np.float32)
    context = Context(
        model.family, model.sizes, model.params, model.processor, np.float32, 0, step=0,
        networks=loaded,
    )  # fmt: skip
    text_rewards = [registry.bind_reward(example.reward, example.options) for example in MM2T]
    return Scores(
        t2i=np.stack([_score(reward, context) for reward in image_rewards]),
        mm2t=np.stack([_score(reward, context) for reward in text_rewards], axis=-1),
        answers=_collect_answers(context),
        own_answers=np.stack([_score_own(example, context) for example in OWN], axis=-1),
        boxes=_score_boxes(),
    )


def _list_networks(resolved: list[registry.BoundReward]) -> list[networks.CheckedNetwork]:
    """Returns the networks of the rewards, each once."""
    all_checked = networks.check_networks(resolved, Networks(), "float32")
    # Without frozen scorers, which `check_networks` lists too.
    return [checked for checked in all_checked if checked.name in networks.NETWORKS]


def _score(reward: registry.BoundReward, context: Context) -> np.ndarray:
    return registry.score([reward], _read_samples(reward.row), context)[reward.name]


def _score_own(example: Example, context: Context) -> np.ndarray:
    rows = [(tag, include, x) for tag, include, texts in cases.OWN_ANSWERS for x in texts]
    tags, includes, answers = (list(column) for column in zip(*rows, strict=True))
    samples = Samples({"tag": tags, "include": includes}, texts=answers)
    reward = registry.bind_reward(example.reward, example.options)
    return registry.score([reward], samples, context)[reward.name]


def _read_samples(row: registry.RewardRow) -> Samples:
    path = cases.DRAWINGS if row.scores == IMAGES else cases.ANSWERS
    return read_cases(path, row).samples


def _collect_answers(context: Context) -> dict[str, list[str]]:
    """Returns the mini Janus's captions and answers, which t2i rewards score."""
    # Asked again, because a reward returns its score and not the answer; greedy answers are equal.
    samples = {name: _read_samples(registry.REGISTRY[f"t2i_{name}"]) for name in ("qa", "oc", "od")}
    questions = {
        "qa": samples["qa"].column("qa_problem"),
        "oc": read_class_questions(samples["oc"])[0],
        "od": samples["od"].column("od_problem"),
    }
    answers = {
        CAPTION: cycle.start_captions(
            samples["qa"], context, "policy", scorer="policy", greedy=True,
            max_new_tokens=_get_max_new_tokens("t2i_bid_cycle_reward"), chunk=asking.CHUNK,
        )()
    }  # fmt: skip
    for name, texts in questions.items():
        # The table's first column: a question without its instructions.
        answers[texts[0].splitlines()[0].partition(",")[0]] = asking.ask_scorer(
            samples[name], context, texts, stream=name, greedy=True,
            max_new_tokens=_get_max_new_tokens(f"t2i_{name}"),
        )()  # fmt: skip
    return answers


def _get_max_new_tokens(reward: str) -> int:
    return registry.list_options(reward)["max_new_tokens"].default


def _score_boxes() -> dict[str, float]:
    """Scores answers with boxes by t2i_od's rule; the mini Janus never gives such answers."""
    (truth,) = cases.load_cases(cases.DRAWINGS)[0]["od_solution"]
    answers = {
        "the true box": [truth],
        "three quarters of it": [_cut_left_part(truth, 3 / 4)],
        "a third of it": [_cut_left_part(truth, 1 / 3)],
        "the true box and one beside it": [truth, [0, 0, 50, 50]],
    }
    return {
        description: text.od_answer_score(
            f"<answer>{[{'Position': box, 'Confidence': 0.9} for box in boxes]}</answer>", [truth]
        )
        for description, boxes in answers.items()
    }


def _cut_left_part(box: list[float], share: float) -> list[float]:
    left, top, right, bottom = box
    return [left, top, left + share * (right - left), bottom]
