"""The table of rewards: names, options, switches, columns, and scoring a batch."""

from __future__ import annotations

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from corl_jax.config.schema import Compat, Networks, Reward, RewardNetwork
from corl_jax.data.drawn_world import generator
from corl_jax.errors import InputError
from corl_jax.rewards import applicable, image, registry
from corl_jax.rewards.networks import NETWORKS
from corl_jax.rewards.registry import REGISTRY, BoundReward, Context, RewardRow, Samples
from corl_jax.rewards.signature import find_option_problem
from corl_jax.rewards.text_rewards import score_soft_overlong
from corl_jax.tasks import IMAGES, TEXTS, UNIFIED
from tests.support.tiny_models import tiny_image

NOWHERE = Context(None, None, None, None, None, seed=0, step=0)
ISSUE = (
    "format format_tag qa_accuracy oc_accuracy t2i_ti_sim t2i_bid_cycle_reward t2i_pixel_mse "
    "t2i_qa t2i_oc t2i_od shapes_checker t2i_cycle_reward t2i_clip_reward pickscore hpsv2 "
    "aesthetic soft_overlong geneval http http_texts self_answer answer_logprob"
)


def resolve(*rewards, **compat):
    return registry.bind_rewards([Reward(**reward) for reward in rewards], Compat(**compat))


def score(name, samples, options=None, **compat):
    reward = {"name": name, "options": options or {}}
    (one,) = resolve(reward, **compat)
    return registry.score([one], samples, NOWHERE)[name]


def texts(*completions, **columns):
    return Samples({name: list(values) for name, values in columns.items()}, texts=[*completions])


def test_the_table_is_complete_and_consistent():
    assert set(REGISTRY) == set(ISSUE.split())
    for name, entry in REGISTRY.items():
        assert entry.scores in (IMAGES, TEXTS) and entry.function.__doc__
        others = (
            "shapes_checker", "pickscore", "hpsv2", "aesthetic", "geneval", "http",
            "answer_logprob",
        )  # fmt: skip
        assert name.startswith("t2i") == (entry.scores == IMAGES) or name in others
        for key, option in registry.list_options(name).items():
            accepted = registry.list_options(name)
            assert find_option_problem(accepted, key, option.default) is None
        assert set(entry.chosen) <= set(registry.list_options(name))
        asked = {network for values in entry.chosen.values() for network in values.values()}
        assert asked | set(entry.networks) <= {"policy", *NETWORKS}
    for effects in registry.COMPAT.values():
        for name, option, value in effects:
            assert registry.list_options(name)[option].default is (not value)


def test_rewards_are_split_by_task_in_order():
    bound = resolve({"name": "qa_accuracy", "weight": 0.5}, {"name": "t2i_pixel_mse"},
                    {"name": "format", "weight": 2})  # fmt: skip
    found = registry.group_by_task(bound, UNIFIED)
    assert [(r.name, r.weight) for r in found["mm2t"]] == [("qa_accuracy", 0.5), ("format", 2.0)]
    assert [r.name for r in found["t2i"]] == ["t2i_pixel_mse"]
    assert found["t2i"][0].row is REGISTRY["t2i_pixel_mse"]
    assert registry.group_by_task([], UNIFIED) == {"t2i": [], "mm2t": []}
    assert registry.group_by_task(bound, ("t2i",)) == {"t2i": found["t2i"]}


def test_every_problem_is_reported_at_once():
    with pytest.raises(InputError) as caught:
        resolve(
            {"name": "qa_acuracy"},
            {"name": "format", "options": {"stripp": True}},
            {"name": "format"},
            {"name": "format_tag", "options": {"strip": True}},
            {"name": "t2i_bid_cycle_reward", "options": {
                "caption": "blipp", "image_term": "lpips", "text_term": "words",
                "max_new_tokens": 0, "normalise": "yes"}},
            {"name": "t2i_ti_sim", "options": {"chunk": 1.5}},
        )  # fmt: skip
    problems = caught.value.problems
    expected = [
        "unknown reward 'qa_acuracy'; did you mean qa_accuracy?",
        "format: option stripp: unknown; did you mean strip?",
        "format is listed more than once",
        "format_tag: option strip: unknown; this reward has no options",
        "caption: found 'blipp'; Input should be 'policy' or 'blip' (default 'policy')",
        "text_term: found 'words'",
        "max_new_tokens: found 0",
        "normalise: found 'yes'",
        "t2i_ti_sim: option chunk: found 1.5",
    ]
    assert len(problems) == len(expected)
    for text in expected:
        assert any(text in problem for problem in problems), text


@pytest.mark.parametrize(
    ("switch", "name", "samples"),
    [
        ("mc_as_open_ended", "qa_accuracy",
         texts("<answer>A. choking</answer>", qa_solution=["A"], qa_type=["MC"])),
        ("answer_single_line", "qa_accuracy",
         texts("so\n<answer>red\n</answer>", qa_solution=["red"], qa_type=["OE"])),
        ("answer_single_line", "oc_accuracy",
         texts("so\n<answer>red\n</answer>", cls_solution=["red"])),
        ("format_without_strip", "format", texts(" <think>a</think><answer>b</answer>\n")),
        ("answer_in_thoughts", "qa_accuracy",
         texts("<think><answer>a</answer></think><answer>red</answer>", qa_solution=["red"],
               qa_type=["OE"])),
        ("answer_in_thoughts", "oc_accuracy",
         texts("<think><answer>a</answer></think><answer>red</answer>", cls_solution=["red"])),
        ("compare_by_letters", "qa_accuracy",
         texts("twenty one", qa_solution=["21"], qa_type=["OE"])),
    ],
)  # fmt: skip
def test_compat_switches_change_what_they_should(switch, name, samples):
    assert score(name, samples) == 1.0
    assert score(name, samples, **{switch: True}) < 1.0


@pytest.mark.parametrize(
    ("switch", "name", "samples"),
    [
        ("format_repeated_blocks", "format",
         texts("<think>a</think><answer>b</answer><answer>c</answer>")),
        ("compare_by_letters", "qa_accuracy", texts("35", qa_solution=["3.5"], qa_type=["OE"])),
        ("compare_by_letters", "oc_accuracy", texts("not a dog", cls_solution=["dog"])),
    ],
)  # fmt: skip
def test_compat_switches_bring_exploits_back(switch, name, samples):
    assert score(name, samples) == 0.0
    assert score(name, samples, **{switch: True}) > 0.6


def test_unknown_question_types_are_refused_by_row():
    batch = texts("B", "B", "B", qa_solution=["B"] * 3, qa_type=["mcq", "essay", None])
    with pytest.raises(InputError) as caught:
        score("qa_accuracy", batch)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("row 1: qa_type: found 'essay', expected MC or OE")


def test_rewards_that_can_score_none_of_the_first_rows_are_named():
    rewards = resolve(
        *({"name": n} for n in ("format", "qa_accuracy", "oc_accuracy", "t2i_od", "t2i_ti_sim"))
    )
    listed = rewards
    sound = {
        "qa_solution": "<answer>B</answer>", "qa_type": "MC", "prompt": "a dog",
        "od_problem": "where?", "od_solution": [[0, 0, 1, 1]],
    }  # fmt: skip
    assert applicable.find_inapplicable_rewards(listed, [sound]) == []
    assert applicable.find_inapplicable_rewards(listed, []) == []
    blank = {"qa_solution": "<answer> </answer>", "prompt": "  ", "od_solution": "no boxes"}
    assert applicable.find_inapplicable_rewards(listed, [sound, sound | blank]) == []
    lines = applicable.find_inapplicable_rewards(listed, [sound | blank] * 2)
    assert [line.split(" ")[1] for line in lines] == [
        "qa_accuracy", "oc_accuracy", "t2i_od", "t2i_ti_sim"
    ]  # fmt: skip
    assert "none of the first 2 rows, because qa_solution is null or blank in each" in lines[0]
    assert "cls_solution or qa_solution" in lines[1] and "od_solution" in lines[2]
    (line,) = applicable.find_inapplicable_rewards(listed, [sound | {"qa_type": None}])
    assert "qa_type is null" in line and "{default_type: MC}" in line


def test_a_switch_sets_the_fixed_spans_and_refuses_a_contradiction():
    (one,) = resolve({"name": "t2i_ti_sim"}, ti_sim_fixed_spans=True)
    assert isinstance(one.function, functools.partial)
    assert one.function.keywords == {"fixed_spans": True}
    options = {"fixed_spans": False}
    with pytest.raises(InputError, match=r"contradicts compat\.ti_sim_fixed_spans"):
        resolve({"name": "t2i_ti_sim", "options": options}, ti_sim_fixed_spans=True)
    assert options == {"fixed_spans": False}


def test_scores_per_row_with_nan_where_not_applicable():
    batch = texts(
        "<think>x</think><answer>B</answer>", "<answer>two</answer>", "anything",
        qa_problem=["?\nA. red\nB. blue", "how many?", "?"], qa_solution=["B", "2", None],
        qa_type=["MC", "OE", "OE"],
    )  # fmt: skip
    rewards = resolve(*({"name": n} for n in ("qa_accuracy", "format", "format_tag")))
    found = registry.score(rewards, batch, NOWHERE)
    assert list(found) == ["qa_accuracy", "format", "format_tag"]
    assert all(values.dtype == np.float32 for values in found.values())
    np.testing.assert_array_equal(found["qa_accuracy"], [1, 1, np.nan])
    np.testing.assert_array_equal(found["format"], [1, 0, 0])
    np.testing.assert_array_equal(found["format_tag"], [0.5, 0.25, 0])


def test_classes_come_from_either_columns_row_by_row():
    batch = texts("fox", "fox", cls_solution=["red fox", None], qa_solution=["cat", "fox"])
    np.testing.assert_allclose(score("oc_accuracy", batch), [0.45, 1.0])
    only = texts("fox", qa_solution=["fox"])
    assert score("oc_accuracy", only) == 1.0


def test_missing_columns_are_named():
    rewards = resolve({"name": "qa_accuracy"}, {"name": "oc_accuracy"})
    with pytest.raises(InputError) as caught:
        registry.score(rewards, texts("x", prompt=["y"]), NOWHERE)
    assert caught.value.problems == registry.find_missing_columns(rewards, {"prompt": 0})
    assert len(caught.value.problems) == 3
    assert "no column cls_solution or qa_solution" in caught.value.problems[2]


def test_what_a_function_returns_is_checked():
    def of(function):
        return [BoundReward("mine", 1.0, function, RewardRow(function, "mm2t"))]

    samples = texts("a", "b", "c")
    found = registry.score(of(lambda s, c: [1, np.inf, -np.inf]), samples, NOWHERE)
    np.testing.assert_array_equal(found["mine"], [1, np.nan, np.nan])
    with pytest.raises(ValueError, match=r"reward mine: gave shape \(2,\) for 3 samples"):
        registry.score(of(lambda s, c: [1, 2]), samples, NOWHERE)


def test_samples_have_results_of_one_length():
    with pytest.raises(ValueError, match="neither images nor texts"):
        Samples({})
    with pytest.raises(ValueError, match="lengths"):
        Samples({"a": [1]}, texts=["x", "y"])
    with pytest.raises(ValueError, match="found images"):
        score("format", Samples({}, images=np.zeros((1, 8, 8, 3), np.uint8)))


def test_pixel_mse_against_the_formula(mesh):
    pictures = np.stack([np.asarray(tiny_image(i, (32, 32))) for i in range(3)])
    real = [Image.fromarray(pictures[0]), tiny_image(9, (50, 30)), None]
    batch = Samples({"real_image": real}, images=pictures)
    found = score("t2i_pixel_mse", batch)
    pair = (pictures[1:2] / np.float32(255), image.fit_image(real[1], 32)[None] / np.float32(255))
    np.testing.assert_allclose(found[:2], [1.0, image.pixel_mse_reward(*pair)[0]], atol=1e-6)
    assert np.isnan(found[2])
    cropped = score("t2i_pixel_mse", batch, {"image_fit": "centre_crop"})
    assert cropped[1] != found[1]

    params = jax.device_put({"w": np.zeros(8)}, jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec("fsdp")))  # fmt: skip
    spread = Context(None, None, params, None, None, 0, 0)
    with jax.set_mesh(mesh):
        again = REGISTRY["t2i_pixel_mse"].function(batch, spread)
    np.testing.assert_allclose(again, found, atol=1e-6)


def test_the_drawn_world_is_checked_by_its_pixels():
    rows = [generator.make_row(0, i, encode=False) for i in range(6)]
    pictures = np.stack([row["real_image"] for row in rows])
    specs = [row["spec"] for row in rows]
    assert (score("shapes_checker", Samples({"spec": specs}, images=pictures)) == 1).all()
    assert (score("shapes_checker", Samples({"spec": specs}, images=pictures[::-1])) < 1).any()
    blank = Samples({"spec": [specs[0], None]}, images=np.full((2, 64, 64, 3), 250, np.uint8))
    np.testing.assert_array_equal(score("shapes_checker", blank), [0, np.nan])


def test_partial_credit_counts_the_demanded_objects():
    row = next(
        row
        for i in range(100)
        if (row := generator.make_row(0, i, encode=False))["category"] == "color_attr"
    )
    spec = json.loads(row["spec"])
    spec["include"][1]["color"] = next(
        c for c in ("red", "green", "blue") if c not in {e["color"] for e in spec["include"]}
    )
    batch = Samples({"spec": [spec]}, images=row["real_image"][None])
    assert score("shapes_checker", batch) == 0
    assert score("shapes_checker", batch, {"partial_credit": 0.5}) == 0.25


@pytest.mark.parametrize(
    "spec", ["{", "[]", '{"category": "colors"}', {"category": "x", "include": []},
             '{"category": "position", "include": [{"class": "ring", "count": 1, '
             '"position": ["left of", 4]}]}'],
)  # fmt: skip
def test_an_unreadable_spec_is_refused(spec):
    batch = Samples({"spec": [spec]}, images=np.zeros((1, 64, 64, 3), np.uint8))
    with pytest.raises(InputError, match="row 0: spec: found"):
        score("shapes_checker", batch)


def test_every_reward_network_has_its_options_and_a_reward():
    used = {network for row in REGISTRY.values() for network in row.networks}
    used |= {n for row in REGISTRY.values() for by in row.chosen.values() for n in by.values()}
    assert used - {"policy"} == {*NETWORKS}
    for name in NETWORKS:
        assert Networks().settings_of(name) == RewardNetwork()


def test_options_that_the_networks_cannot_serve_are_named():
    sizes = {
        "blip": SimpleNamespace(text=SimpleNamespace(max_position_embeddings=64)),
        "bert": SimpleNamespace(num_layers=4),
    }
    cycle = REGISTRY["t2i_cycle_reward"].find_network_problems
    assert cycle({"max_new_tokens": 64, "bert_layer": -5}, sizes) == []
    tokens, layer = cycle({"max_new_tokens": 65, "bert_layer": 5}, sizes)
    assert "max_new_tokens: found 65; expected 1 to 64" in tokens
    assert "bert_layer: found 5; expected -5 to 4" in layer
    head = SimpleNamespace(sizes=(768, 1))
    for width, problems in ((768, 0), (512, 1)):
        sizes = {"aesthetic": head, "clip_l14": SimpleNamespace(projection_dim=width)}
        found = REGISTRY["aesthetic"].find_network_problems({}, sizes)
        assert len(found) == problems and all("vectors of 768, but" in line for line in found)


# ---- the length of answers


def test_soft_overlong_is_dapos_penalty():
    """DAPO's numbers: 20480 tokens at most, the last 4096 are the buffer."""
    lengths = np.array([0, 16384, 17408, 18432, 20480, 30000])
    samples = Samples({}, texts=[""] * 6, num_tokens=lengths)
    context = dataclasses.replace(NOWHERE, max_new_tokens=20480)
    expected = [0, 0, -0.25, -0.5, -1, -1]
    assert score_soft_overlong(samples, context).tolist() == expected
    given = score_soft_overlong(samples, NOWHERE, max_tokens=20480, buffer=4096)
    assert given.tolist() == expected and given.dtype == np.float32
    few = Samples({}, texts=["a", "b"], num_tokens=np.array([7, 8]))
    assert score_soft_overlong(few, NOWHERE, max_tokens=8, buffer=2).tolist() == [-0.5, -1]


def test_lengths_are_known_in_a_run_only():
    with pytest.raises(InputError, match="soft_overlong: the numbers of tokens"):
        score_soft_overlong(Samples({}, texts=["a"]), NOWHERE, max_tokens=5)
    with pytest.raises(InputError, match="option buffer: found 9; expected at most max_tokens"):
        registry.bind_reward("soft_overlong", {"buffer": 9, "max_tokens": 8})
