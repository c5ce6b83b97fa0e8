"""The benchmark at tiny size: every part runs, and its figures fit together."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from corl_jax.devices import compiling
from corl_jax.devices import mesh as device_mesh
from corl_jax.devices.mesh import make_mesh
from corl_jax.errors import BAD_INPUT_EXIT_CODE, InputError
from corl_jax.models import modules
from corl_jax.models.llama import LlamaConfig
from corl_jax.models.lora import Lora
from corl_jax.models.siglip import SiglipConfig
from corl_jax.models.vq import VQConfig
from corl_jax.policies import decoding
from corl_jax.policies.denoising import STEPS, take_step_transitions
from corl_jax.policies.janus import sampling
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.policies.llama_adapters import add_adapters
from corl_jax.rewards import captions, similarity
from corl_jax.rewards.networks import NETWORKS
from corl_jax.rewards.registry import REGISTRY
from corl_jax.rewards.samples import Network
from corl_jax.tasks import CODES, LATENTS, TEXT
from corl_jax.types import Segment
from corl_jax.weights.layouts import KINDS
from tests.support import show_o_masks
from tests.support.tolerances import LOGPROBS
from tools.bench import __main__ as command
from tools.bench import (
    bits,
    correctness,
    generation,
    gradients,
    host,
    inputs,
    lengths,
    start,
    timing,
    training,
    versus,
    vocabularies,
    windows,
)
from tools.bench.ceilings import Ceilings
from tools.bench.cost import (
    Costs,
    Work,
    count_drawing_operations,
    count_forward_operations,
    count_step_bytes,
    count_training_operations,
)
from tools.bench.families import describe_janus
from tools.bench.setting import Setting
from tools.bench.sizes import JANUS_FLOW_PARTS, PARTS, SHOW_O_PARTS, SIZES
from tools.bench.timing import Record, Timing

PROMPTS, GROUP = 2, 2
SLOW = pytest.mark.slow
TINY = ["--size", "tiny", "--prompts", str(PROMPTS), "--group", str(GROUP), "--repeats", "1"]
SPECIAL = SpecialTokens(bos=1, eos=2, pad=0, boi=3, eoi=4, image=5)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What a run of all parts writes."""
    out = tmp_path_factory.mktemp("bench") / "new" / "bench.jsonl"
    command.main([*TINY, "--peer", "transformers", "--out", str(out)])
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def found(lines):
    """What this project measured of itself, and PyTorch's."""
    return {(line["part"], line["name"]): line for line in lines[1:]}


def published(name: str, folder: Path) -> Setting:
    """8 x 8 of a size, with ceilings of 1."""
    size = SIZES[name]
    processor = size.measured.write_processor(folder / name, size.policy)
    mesh = make_mesh(devices=jax.local_devices()[:1])
    return Setting(
        size=size, prompts=8, group=8, repeats=1, micro_batch=None, remat="full", attention="xla",
        pixel_dtype=jax.numpy.float32, offload=True, folder=folder, processor=processor, mesh=mesh,
        ceilings=Ceilings(1.0, 1.0),
    )  # fmt: skip


def parameter_bytes(name: str) -> int:
    abstract = modules.make_abstract(
        KINDS[NETWORKS[name].kind].module, SIZES["tiny"].networks[name]
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


# ---- a whole run


def test_the_first_line_says_where_the_numbers_are_from(lines):
    first = lines[0]
    assert first["record"] == "environment"
    assert first["device"] == jax.local_devices()[0].device_kind
    assert first["versions"]["jax"] == jax.__version__
    assert first["command"].startswith("python -m tools.bench --size tiny --prompts 2")
    assert {line["record"] for line in lines[1:]} == {"result"}
    assert {line["part"] for line in lines[1:]} == {"ceiling", *PARTS}


def test_every_number_is_positive(found):
    may_be_zero = {"compile_s", "finite", "cut", "in_use_gib"}
    signed = {"loss", "logp_mean"}
    for (part, _), line in found.items():
        if part == "gradients":
            assert line["attention"] == "xla" and 1e-4 < line["error"] == line["error_xla"] < 0.05
            assert line["error"] < line["largest"] == line["largest_xla"] < 0.2
        elif part == "correctness":
            may_be_zero |= {key for key in line if "difference" in key}
        else:
            assert line["median_s"] == pytest.approx(np.median(line["calls_s"]))
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
        assert all(math.isfinite(value) for value in numbers.values()), line
        assert all(v > 0 for k, v in numbers.items() if k not in may_be_zero | signed), line
        assert all(v >= 0 for k, v in numbers.items() if k not in signed), line


def test_rates_are_counts_over_seconds(found):
    images = found["image", "tokens and pixels"]
    assert images["images_per_s"] * images["median_s"] == pytest.approx(PROMPTS * GROUP)
    tokens = found["image", "tokens"]
    assert tokens["ms_per_step"] * 16 == pytest.approx(1e3 * tokens["median_s"])
    text = found["text", "answers"]
    assert text["tokens_per_s"] * text["median_s"] == pytest.approx(PROMPTS * GROUP * 8)
    pixels = found["vq", "codes to pixels"]
    assert pixels["images_per_s"] * pixels["median_s"] == pytest.approx(PROMPTS * GROUP)
    step = found["train", "optimizer step"]
    tokens = PROMPTS * GROUP * (12 + 16 + 26 + 8)
    assert step["tokens_per_s"] * step["median_s"] == pytest.approx(tokens)


def test_fractions_are_of_the_rates_measured_first(found):
    copy = max(line["tb_per_s"] for (part, name), line in found.items() if name[:4] == "copy")
    for key in (("image", "tokens"), ("text", "answers")):
        line = found[key]
        for which in ("", "_shared_prompt"):
            moved = line[f"gb_per_step{which}"] / (copy * line["ms_per_step"])
            assert line[f"roofline_fraction{which}"] == pytest.approx(moved)
        assert line["gb_per_step_shared_prompt"] < line["gb_per_step"]
    (matmul,) = (line["tflop_per_s"] for line in found.values() if "tflop_per_s" in line)
    step = found["train", "optimizer step"]
    for which in ("mfu", "mfu_repeated_prompts"):
        assert step[which] == pytest.approx(step[f"{which}_tflop"] / matmul / step["median_s"])
    assert step["mfu"] < step["mfu_repeated_prompts"]


def test_updates_are_compiled_once(found):
    assert found["train", "optimizer step"]["programs"] == 1
    assert found["iteration", "rollouts and update"]["programs"] == 1


def test_sampler_and_trainer_agree(found):
    line = found["iteration", "rollouts and update"]
    assert line["t2i_logp_difference"] < 0.05
    assert line["mm2t_logp_difference"] < 0.05


@pytest.mark.parametrize("task", ["t2i", "mm2t"])
def test_cached_and_padded_compute_the_same(found, task):
    tokens = {"t2i": 16, "mm2t": 8}[task]
    cached, padded = (
        found["correctness", f"{task}, float32: {which}"] for which in ("cached", "padded")
    )
    assert cached["difference_mean"] <= cached["difference_max"] < LOGPROBS
    assert padded["difference_mean"] <= padded["difference_max"] < LOGPROBS
    assert padded["greedy_difference_max"] < LOGPROBS
    assert (padded["greedy_agreement"], padded["greedy_prefix"]) == (1.0, tokens)
    assert -8 < cached["logp_mean"] < -5  # near -log(512) and -log(640)
    repeated = found["correctness", f"{task}, float32: repeated"]
    assert (repeated["repeated_agreement"], repeated["repeated_prefix"]) == (1.0, tokens)


def test_the_peer_does_the_same_work(lines, found):
    assert lines[0]["peer"]["device"] == "cpu"
    assert lines[0]["peer"]["versions"].keys() == {"torch", "transformers"}
    for part, names in {
        "image": ("transformers generate", "eager loop"),
        "text": ("transformers generate",),
        "train": ("eager step",),
    }.items():
        ours = found[part, versus.OURS["janus"][part]]
        for name in names:
            theirs, rates = found[part, name], ("images_per_s", "tokens_per_s")
            times = theirs["median_s"] / ours["median_s"]
            assert ours[f"times_{name.replace(' ', '_')}"] == pytest.approx(times)
            # The same counts: the ratio of rates is that of seconds.
            (rate,) = (rate for rate in rates if rate in theirs)
            assert ours[rate] / theirs[rate] == pytest.approx(times)
    assert not any(key.startswith("times_") for key in found["iteration", "rollouts and update"])


def test_all_built_in_rewards_but_few_are_measured(found):
    names = {name.split(",")[0].split(" (")[0] for part, name in found if part == "rewards"}
    left_out = {
        "t2i_cycle_reward", "t2i_qa", "t2i_oc", "t2i_od", "shapes_checker", "soft_overlong",
        "geneval", "self_answer", "answer_logprob",
    }  # fmt: skip
    left_out |= {name for name, row in REGISTRY.items() if row.bind}  # servers compute them
    assert REGISTRY.keys() - left_out <= names
    scored = [line for line in found.values() if "finite" in line]
    assert len(scored) >= 8
    assert all(line["finite"] == 1 and line["images"] == PROMPTS * GROUP for line in scored)


def test_the_first_stage_is_that_of_the_config(found):
    names = ("t2i_bid_cycle_reward", "t2i_ti_sim", "qa_accuracy", "format")
    for label in ("stage 1", "stage 1 (policy)"):
        assert {key for key in found["rewards", label] if key.endswith("_s")} == {
            "median_s", "compile_s", "calls_s", *(f"{name}_s" for name in names),
        }  # fmt: skip
    assert found["rewards", "  captions by blip"]["cut"] == 1


def test_offloaded_networks_move_all_their_bytes(found):
    moved = found["rewards", "stage 1, offloaded"]["moved_gb"] * 1e9
    assert moved == pytest.approx(sum(map(parameter_bytes, ("blip", "bert", "lpips"))))
    moved = found["rewards", "aesthetic, offloaded"]["moved_gb"] * 1e9
    assert moved == pytest.approx(parameter_bytes("clip_l14") + parameter_bytes("aesthetic"))
    assert "moved_gb" not in found["rewards", "stage 1"]
    assert ("rewards", "t2i_ti_sim, offloaded") not in found


def test_a_part_alone(tmp_path, capsys):
    out = tmp_path / "bench.jsonl"
    command.main([*TINY, "--parts", "vq", "--out", str(out)])
    parts = [json.loads(line).get("part") for line in out.read_text().splitlines()]
    assert set(parts) == {None, "ceiling", "vq"}
    assert "codes to pixels" in capsys.readouterr().out


@SLOW
def test_the_detector_is_measured_in_both_dtypes(tmp_path):
    out = tmp_path / "bench.jsonl"
    command.main([*TINY, "--parts", "detector", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = {line["name"]: line for line in lines if line.get("part") == "detector"}
    assert found.keys() == {"2 images, bfloat16", "2 images, float32"}
    for line in found.values():
        assert line["images_per_s"] == pytest.approx(2 / line["median_s"])


@SLOW
def test_micro_batches_are_pieces_of_the_prompts(tmp_path):
    setting = published("tiny", tmp_path)
    assert training.make_update_options(setting).micro_batches == 1
    small = dataclasses.replace(setting, micro_batch=2)
    assert training.make_update_options(small).micro_batches == 4


@SLOW
def test_a_step_with_adapters_is_measured(capsys):
    command.main([*TINY, "--parts", "train", "--lora", "2"])
    (step,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("train"))
    assert "optimizer step" in step


@SLOW
def test_several_devices_and_a_profile(tmp_path):
    out, trace = tmp_path / "bench.jsonl", tmp_path / "trace"
    mesh = ["--mesh", "fsdp=2,tensor=2", "--trace", str(trace)]
    command.main([*TINY, "--parts", "train,vq", *mesh, "--out", str(out)])
    first, *lines = (json.loads(line) for line in out.read_text().splitlines())
    assert first["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    (step,) = (line for line in lines if line["part"] == "train")
    needed = step["mfu_tflop"] * 1e12
    ceiling = next(line["tflop_per_s"] for line in lines if "product" in line["name"]) * 1e12
    assert step["mfu"] == pytest.approx(needed / (4 * ceiling) / step["median_s"])
    assert step["programs"] == 1
    for name in ("train", "vq"):
        assert list((trace / name).rglob("perfetto_trace.json.gz"))


def test_parameters_lie_as_the_training_command_lays_them(tmp_path):
    setting = published("tiny", tmp_path)
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.local_devices()[:4])
    kernel = dataclasses.replace(setting, mesh=mesh).make_policy(jax.numpy.float32)["lm_head"][
        "kernel"
    ]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}


@SLOW
def test_both_layouts_draw_the_same(monkeypatch):
    """And only one of them asks for the policy's matrices to be gathered, inside of layers too."""
    drawn, asked, laid_out = [], [], []
    gather, constrain = sampling.gather_over_fsdp, device_mesh.constrain

    def keep(call, repeats):
        drawn.append(np.asarray(call().values))
        return Timing(1.0, (1.0,))

    monkeypatch.setattr("tools.bench.setting.measure", keep)
    monkeypatch.setattr(
        sampling, "gather_over_fsdp", lambda params, rules: asked.append(1) or gather(params, rules)
    )
    monkeypatch.setattr(
        device_mesh, "constrain", lambda x, *names: laid_out.append(names) or constrain(x, *names)
    )
    monkeypatch.setattr(decoding, "constrain", device_mesh.constrain)
    small = ["--prompts", "2", "--group", "2", "--mesh", "fsdp=2", "--repeats", "1"]
    command.main(["--size", "tiny", "--parts", "layouts", *small])
    assert len(drawn) == 2 and len(asked) == 1
    matrices = [names for names in laid_out if names[0] != "batch"]
    assert len(matrices) == 4 * SIZES["tiny"].policy.llama.num_layers, "of one of the two alone"
    assert (drawn[0] == drawn[1]).mean() > 0.5, "rounding alone parts them"


@SLOW
def test_every_build_is_measured(monkeypatch, capsys):
    """And not the one that a call would take."""
    used = []
    program = sampling.image_program
    for name in compiling.BUILDS:
        build = getattr(program, name)
        monkeypatch.setattr(
            program,
            name,
            lambda *a, _build=build, _name=name, **k: used.append(_name) or _build(*a, **k),
        )
    command.main([*TINY, "--parts", "builds"])
    assert used == [name for name in compiling.BUILDS for _ in range(2)]
    shown = capsys.readouterr().out
    assert all(f"image tokens, {name} " in shown for name in compiling.BUILDS)


def test_calls_with_the_same_bits_are_told_from_others(monkeypatch, capsys):
    """On a CPU all are alike; an update that starts elsewhere is not."""
    elsewhere, start = itertools.count(), training.start_training

    def started(setting):
        state, *rest = start(setting)
        state = dataclasses.replace(
            state, params=jax.tree.map(lambda x: x + 1e-6 * next(elsewhere), state.params)
        )
        return state, *rest

    monkeypatch.setattr(bits, "start_training", started)
    command.main([*TINY, "--parts", "bits"])
    pattern = r"^bits +(.+?)  +results (\d)  of 2  digest (\w{12})\b"
    shown = re.findall(pattern, capsys.readouterr().out, re.M)
    assert [(name, int(count)) for name, count, _ in shown] == [
        ("rollout t2i", 1), ("rollout mm2t", 1), ("pixels", 1), ("2 updates, xla", 2)
    ]  # fmt: skip
    assert len({digest for *_, digest in shown}) == 4


# ---- arguments and failures


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--mesh", "rows=2"], "--mesh: found rows=2, expected data, fsdp, tensor"),
        (["--mesh", "data=0"], "--mesh: found data=0"),
        (["--attention", "splash"], "--attention: found splash, which cpu"),
        (["--lora", "4", "--parts", "vq,train"], "--lora: has no effect on vq"),
        (["--mesh", "data=4", "--prompts", "6"], "--prompts: found 6, no multiple of the 4 parts"),
        (["--mesh", "data=2", "--parts", "rewards"], "--parts: found rewards, measured on one"),
        (["--mesh", "data=2", "--peer", "transformers"], "--peer: PyTorch runs on one device"),
        (["--parts", "layouts"], "--parts: found layouts; give --mesh fsdp=N"),
        (["--parts", "forward"], "--parts: found forward, which no janus has"),
        (["--size", "show-o-tiny", "--parts", "rewards,vq"], "found rewards, which no show_o has"),
        (
            ["--size", "janus-flow-tiny", "--parts", "correctness"],
            "found correctness, which no janus_flow has",
        ),
        (
            ["--size", "janus-flow-tiny", "--parts", "self_qa,windows"],
            "found windows, which no janus_flow has",
        ),
        (["--parts", "vq", "--out", str(Path(__file__).parent)], "cannot be written (Is a dir"),
        (
            ["--size", "janus-flow-tiny", "--parts", "text", "--peer", "transformers"],
            "--peer: --parts names none of image,unguided,train_image",
        ),
        (["--mesh", "data=64", "--prompts", "64"], "asks for 64 devices of the 8 here"),
    ],
)
def test_arguments_that_cannot_be(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["--size", "tiny", *arguments])
    assert error.value.code == BAD_INPUT_EXIT_CODE
    assert said in capsys.readouterr().err


def test_usual_parts_are_those_that_can_be():
    """With adapters, on a mesh, and both."""
    assert "gradients" in command.parse_arguments(["--lora", "4"]).parts
    assert not set(command.parse_arguments(["--mesh", "fsdp=2"]).parts) & set(command.ALONE)
    both = command.parse_arguments(["--mesh", "fsdp=2", "--lora", "4"]).parts
    assert set(both) == set(command.WITH_ADAPTERS) - set(command.ALONE)


def test_wrong_arguments_are_all_named(capsys):
    arguments = ["--parts", "image,draw", "--group", "1", "--repeats", "0"]
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == BAD_INPUT_EXIT_CODE
    said = capsys.readouterr().err
    assert "--parts: found 'draw', expected some of rewards,image" in said
    assert "--group: found 1, expected an integer of at least 2" in said
    assert "--repeats: found 0" in said


def test_micro_batches_must_divide_the_prompts(capsys):
    with pytest.raises(SystemExit):
        command.main(["--prompts", "8", "--micro-batch", "3"])
    assert "--micro-batch: found 3, which does not divide 8 prompts" in capsys.readouterr().err


def test_a_part_that_does_not_fit_is_named_and_the_others_go_on(monkeypatch, capsys):
    def too_large(setting):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        yield

    def fine(setting):
        yield Record("vq", "done", Timing(2.0, (1.0,)), {})

    monkeypatch.setitem(command.RUNS, "image", too_large)
    monkeypatch.setitem(command.RUNS, "vq", fine)
    with pytest.raises(SystemExit) as error:
        command.main([*TINY, "--parts", "image,vq"])
    assert error.value.code == "error: image: out of device memory; use fewer --prompts"
    shown = capsys.readouterr().out
    assert shown.index("RESOURCE_EXHAUSTED") < shown.index("done")


def test_other_errors_are_not_swallowed(monkeypatch):
    def broken(setting):
        raise jax.errors.JaxRuntimeError("INTERNAL: no kernel")
        yield

    monkeypatch.setitem(command.RUNS, "image", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no kernel"):
        command.main([*TINY, "--parts", "image"])


def test_a_peer_that_cannot_run_is_said_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(versus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main([*TINY, "--peer", "transformers", "--parts", "vq"])
    said = capsys.readouterr().err
    assert "--peer: --parts names none of image,text,train" in said
    assert "--peer: needs PyTorch" in said


def test_a_part_of_the_peer_that_fails_is_named_at_the_end(monkeypatch, capsys):
    environment = {"device": "cpu", "versions": {}}
    found = [
        {"part": "image", "name": "eager loop", "failed": "TypeError: no cache"},
        {"part": "train", "name": "eager step", "calls_s": [4.0], "figures": {}, "memory": {}},
    ]
    peers = versus.parse_peers([environment, *found], complete=False)
    monkeypatch.setattr(versus, "measure_peers", lambda args: peers)

    def step(setting):
        yield Record("train", "optimizer step", Timing(2.0, (1.0, 2.0, 9.0)), {})

    monkeypatch.setitem(command.RUNS, "train", step)
    with pytest.raises(SystemExit) as error:
        command.main([*TINY, "--parts", "train", "--peer", "transformers"])
    assert error.value.code == "error: peer image (eager loop): see above"
    shown = capsys.readouterr().out
    assert "TypeError: no cache" in shown and "times_eager_step 2" in shown


def test_a_peer_that_was_killed_is_no_success():
    line = {"part": "text", "name": "x", "calls_s": [4.0], "figures": {}, "memory": {}}
    assert versus.parse_peers([{}, line], complete=False).failed == ("peer",)
    assert versus.parse_peers([{}, line], complete=True).failed == ()


# ---- pieces


def test_a_mask_that_shows_padding_is_noticed(tmp_path):
    """What the correctness part compares differs far beyond its thresholds if a mask is wrong."""
    setting = published("tiny", tmp_path)
    with jax.set_mesh(setting.mesh), jax.default_matmul_precision("highest"):
        params = setting.make_policy(jax.numpy.float32)
        score = correctness.make_scorer(setting, params, jax.numpy.float32)
        prompts = correctness.make_prompts(setting, "t2i")
        assert prompts.attention_mask[0].all() and not prompts.attention_mask[-1].all()
        tokens = np.arange(64, dtype=np.int32).reshape(4, 16)  # a shape that is compiled already
        tokens = Segment(CODES, tokens, tokens >= 0)
        right = score("t2i", prompts, tokens)
        shown = dataclasses.replace(prompts, attention_mask=np.ones_like(prompts.attention_mask))
        wrong = score("t2i", shown, tokens)
    assert correctness.measure_difference(right[:2], wrong[:2])["difference_max"] < LOGPROBS
    assert correctness.measure_difference(right[2:], wrong[2:])["difference_mean"] > 1e-3


def test_the_shorter_prompt_alone_is_all_its_tokens():
    prompts = inputs.make_questions(SIZES["tiny"], SPECIAL, 3, 26, seed=1)
    alone = correctness.remove_padding(prompts, -1)
    kept = prompts.attention_mask[-1].sum()
    assert alone.input_ids.shape == alone.attention_mask.shape == (1, kept)
    assert alone.input_ids[0, 0] == SPECIAL.bos and alone.attention_mask.all()
    assert (alone.pixel_values == prompts.pixel_values[-1:]).all()


def test_greedy_decodings_are_compared_to_where_they_part():
    def rollout(tokens, logprobs):
        tokens, logprobs = np.array([[0] * 5, tokens]), np.array([[0.0] * 5, logprobs])
        return Segment(TEXT, tokens, tokens > 0, logprobs)

    batched = rollout([3, 4, 5, 6, 7], [-1.0, -2.0, -3.0, -4.0, -5.0])
    single = rollout([3, 4, 9, 6, 8], [-1.0, -2.5, -3.25, -7.0, -9.0])
    assert correctness.compare_greedy(batched, single) == pytest.approx(
        {
            "greedy_agreement": 0.6, "greedy_prefix": 2,
            "greedy_difference_mean": 0.25, "greedy_difference_max": 0.5,
        }
    )  # fmt: skip
    same = correctness.compare_greedy(batched, batched)
    assert (same["greedy_agreement"], same["greedy_prefix"]) == (1.0, 5)


def test_repeated_draws_are_compared_token_by_token():
    def rollout(*tokens):
        tokens = np.array(tokens)
        return Segment(TEXT, tokens, tokens > 0, np.zeros(tokens.shape))

    first, second = rollout([1, 2, 3, 4], [5, 6, 7, 8]), rollout([1, 2, 3, 4], [5, 6, 9, 8])
    assert correctness.compare_tokens(first, second) == {
        "repeated_agreement": 0.875,
        "repeated_prefix": 2,
    }
    assert correctness.compare_tokens(first, first) == {
        "repeated_agreement": 1.0,
        "repeated_prefix": 4,
    }


def test_the_cache_is_made_where_janus_does_not_say_how():
    from tools.bench.peer.generation import patch_static_cache

    class Model:
        def _prepare_static_cache(self, batch_size, prefill_chunk_size):
            return batch_size, prefill_chunk_size

    model = Model()
    with patch_static_cache(model):
        assert model._prepare_static_cache(batch_size=3) == (3, None)
        assert model._prepare_static_cache(batch_size=3, prefill_chunk_size=7) == (3, 7)
    with pytest.raises(TypeError, match="prefill_chunk_size"):
        model._prepare_static_cache(batch_size=3)


def test_the_first_call_is_no_measurement(monkeypatch):
    clock = iter([0.0, 10.0, 10.0, 12.0, 12.0, 15.0, 15.0, 16.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    measured = timing.measure(lambda: 0, 3)
    assert measured == Timing(10.0, (2.0, 3.0, 1.0))
    assert (measured.median, measured.compile) == (2.0, 8.0)


def test_work_by_hand():
    config = JanusConfig(
        llama=LlamaConfig(
            vocab_size=11, hidden_size=3, intermediate_size=5, num_layers=2, num_heads=4,
            num_kv_heads=2, head_dim=7,
        ),
        siglip=SiglipConfig(num_layers=1),  # no work is counted of these two
        vq=VQConfig(num_embeddings=13, channel_multiplier=(1,), num_res_blocks=1),
        image_token_embed=6,
    )  # fmt: skip
    costs = describe_janus(config)
    layers = 2 * (3 * (28 + 14 + 14 + 28) + 3 * 3 * 5)
    text, image = Work("mm2t", 2, 3, 10, 4), Work("t2i", 2, 3, 10, 4, guided=True)
    token = 2 * 2 * 2 * 14  # keys and values, of bfloat16, in two layers
    assert count_step_bytes(costs, text, shared=False) == 2 * (layers + 3 * 11) + token * 6 * 12
    assert count_step_bytes(costs, text, shared=True) == 2 * (layers + 3 * 11) + token * (20 + 12)
    head = 3 * 6 + 6 * 13
    assert count_step_bytes(costs, image, shared=False) == 2 * (layers + head) + token * 12 * 12
    assert count_step_bytes(costs, image, shared=True) == 2 * (layers + head) + token * (40 + 24)
    operations = 6 * layers * 6 * 14 + 6 * 33 * 24 + 12 * 2 * 28 * 6 * 14**2 / 2
    assert count_training_operations(costs, (text,), shared=False) == operations
    pairs = 2 * 50 + 6 * (40 + 8)
    operations = 6 * layers * (20 + 24) + 6 * 33 * 24 + 12 * 2 * 28 * pairs
    assert count_training_operations(costs, (text,), shared=True) == operations
    llama = config.llama
    adapted = add_adapters(config, Lora(3, 6.0, ("q_proj", "down_proj")))
    wide = llama.num_heads * llama.head_dim
    adapters = 3 * llama.num_layers * (2 * llama.hidden_size + wide + llama.intermediate_size)
    operations = (4 * layers + 6 * adapters) * 44 + 4 * 33 * 24 + 12 * 2 * 28 * pairs
    assert count_training_operations(describe_janus(adapted), (text,), shared=True) == operations


def test_work_of_the_published_size():
    """Against figures that were worked out apart from this code."""
    size = SIZES["1b"]
    image = Work("t2i", 8, 8, size.image_prompt, 576, guided=True)
    text = Work("mm2t", 8, 8, size.text_prompt, size.new_tokens)
    assert count_step_bytes(size.costs, image, shared=False) == pytest.approx(10.80e9, rel=2e-3)
    assert count_step_bytes(size.costs, text, shared=False) == pytest.approx(14.613e9, rel=1e-4)
    assert count_step_bytes(size.costs, text, shared=True) == pytest.approx(7.170e9, rel=1e-4)
    works = (Work("t2i", 8, 8, 40, 576), Work("mm2t", 8, 8, 676, 256))
    operations = count_training_operations(size.costs, works, shared=False)
    assert operations == pytest.approx(783e12, rel=5e-3)


def test_prompts_are_left_padded_and_hold_one_picture():
    config = SIZES["tiny"]
    drawing = inputs.make_image_prompts(config, SPECIAL, 5, 12)
    asking = inputs.make_questions(config, SPECIAL, 5, 26)
    for prompts in (drawing, asking):
        kept = prompts.attention_mask
        assert kept[0].all() and kept.any(axis=1).all() and not kept.all()
        assert (np.diff(kept.astype(int), axis=1) >= 0).all()
        assert (prompts.input_ids[~kept] == SPECIAL.pad).all()
        first = kept.argmax(axis=1)
        assert (prompts.input_ids[np.arange(5), first] == SPECIAL.bos).all()
        assert ((prompts.input_ids == SPECIAL.bos).sum(axis=1) == 1).all()
    assert (drawing.input_ids[:, -1] == SPECIAL.boi).all()
    assert ((asking.input_ids == SPECIAL.image).sum(axis=1) == 16).all()
    batch = inputs.make_task_batch(config, SPECIAL, asking, 3, 6)
    (answers,) = batch.segments
    assert answers.values.shape == (15, 6)
    assert 3 <= answers.mask.sum(axis=1).min() < answers.mask.sum(axis=1).max() <= 6
    assert inputs.make_task_batch(config, SPECIAL, drawing, 3, 16).segments[0].mask.all()


def test_completions_of_a_prompt_share_their_row():
    columns = inputs.make_rows(2, 3)
    pictures = columns["real_image"]
    assert [id(x) == id(pictures[0]) for x in pictures] == [True] * 3 + [False] * 3
    assert columns["prompt"][0] == columns["prompt"][2] != columns["prompt"][3]


def test_a_made_up_caption_is_as_many_tokens_again(tmp_path):
    networks = SIZES["1b"].networks
    blip = vocabularies.write_network(tmp_path / "blip", "blip", networks["blip"])
    bert = vocabularies.write_network(tmp_path / "bert", "bert", networks["bert"])
    ids = [5000, 777, 30521, 20000]
    said = captions.load_tokenizer(blip, networks["blip"].text).decode(ids)
    network = Network(networks["bert"], {}, bert, None)
    assert similarity._tokenize(network, [said], 64)[said] == [101, *ids, 102]


@pytest.mark.parametrize(
    "name", ["1b", *(pytest.param(x, marks=SLOW) for x in ("7b", "show-o-512"))]
)
def test_published_sizes_trace(name, tmp_path):
    setting = published(name, tmp_path)
    params = setting.size.family.abstract(setting.size.policy)
    size = setting.size
    for task, length in (("t2i", size.limits.image_tokens), ("mm2t", size.new_tokens)):
        prompts = generation.make_prompts(setting, task)
        keys = jax.eval_shape(lambda: generation.make_keys(setting, task))  # noqa: B023
        rollout = jax.eval_shape(generation.make_samplers(setting)[task], params, prompts, keys)
        assert rollout.values.shape == (64, length)
    assert prompts.input_ids.shape == (8, size.text_prompt)


# ---- Show-o


def measure_show_o(out: Path, *arguments: str) -> dict[tuple[str, str], dict]:
    """What a run at tiny size writes, PyTorch's with it."""
    command.main(["--size", "show-o-tiny", *TINY[2:], *arguments, "--out", str(out)])
    _, *lines = (json.loads(line) for line in out.read_text().splitlines())
    return {(line["part"], line["name"]): line for line in lines}


@SLOW
def test_a_show_o_is_measured_against_the_rate_of_products(tmp_path):
    found = measure_show_o(tmp_path / "bench.jsonl", "--parts", "forward,image")
    products = next(line for line in found.values() if "tflop_per_s" in line)["tflop_per_s"]
    forward, drawing = found["forward", "texts and images to logits"], found["image", "tokens"]
    for line in (forward, drawing):
        assert line["mfu"] == pytest.approx(line["tflop"] / products / line["median_s"])
    assert drawing["steps"] == 4 and drawing["ms_per_step"] * 4 == pytest.approx(
        1e3 * drawing["median_s"]
    )
    tokens = PROMPTS * 12 + PROMPTS * GROUP * 18
    assert forward["tokens_per_s"] * forward["median_s"] == pytest.approx(tokens)


@pytest.mark.slow
def test_all_parts_of_a_show_o(tmp_path):
    """Sampler and trainer agree, and PyTorch does the same work."""
    found = measure_show_o(tmp_path / "bench.jsonl", "--peer", "transformers")
    assert {part for part, _ in found} == {"ceiling", *SHOW_O_PARTS}
    for which in ("t2i, float32: cached", "t2i, float32: one_shot", "mm2t, float32: padded"):
        assert found["correctness", which]["difference_max"] < LOGPROBS
    assert found["correctness", "t2i, float32: padded"]["greedy_agreement"] == 1
    for task in ("t2i", "mm2t"):
        line = found["gradients", task]
        assert 1e-4 < line["error"] == line["error_xla"] < 0.05
        assert 1e-5 < line["value"] < line["value_max"] < 0.05
        assert found["iteration", "rollouts and update"][f"{task}_logp_difference"] < 0.05
    for part, name in (("image", "eager loop"), ("text", "eager loop"), ("train", "eager step")):
        ours, theirs = found[part, versus.OURS["show_o"][part]], found[part, name]
        times = theirs["median_s"] / ours["median_s"]
        assert ours[f"times_{name.replace(' ', '_')}"] == pytest.approx(times)
    assert found["train", "optimizer step"]["programs"] == 1


def test_work_of_a_published_show_o():
    """Against the table of costs that was worked out apart from this code, in TFLOP."""
    for name, steps, forward, picture in (("256", 16, 0.81, 26), ("512", 50, 2.9, 290)):
        size = SIZES[f"show-o-{name}"]
        costs = size.costs
        assert costs.layer_weights == pytest.approx(1.2085e9, rel=1e-3)
        image = Work("t2i", 1, 1, 65, size.limits.image_tokens)
        assert count_forward_operations(costs, image, True) / 1e12 == pytest.approx(
            forward, rel=0.03
        )
        drawn = count_drawing_operations(costs, dataclasses.replace(image, guided=True), steps)
        # The table repeats the text in each step: S / L of the work.
        repeated = 1 + 65 / size.limits.image_tokens
        assert drawn * repeated / 1e12 == pytest.approx(picture, rel=0.03)
        trained = count_training_operations(costs, (image,), True) / 1e12
        assert trained == pytest.approx(3 * forward, rel=0.03)


def test_an_image_sees_all_of_itself_by_hand():
    costs = Costs(
        layers=2, layer_weights=100, query_width=3, key_width=3, heads={"t2i": 7, "mm2t": 11},
        any_order=True, borders=2, front=4,
    )  # fmt: skip
    image, text = Work("t2i", 2, 3, 5, 8), Work("mm2t", 2, 3, 6, 4)
    # 2 prompts of 5 tokens, and 6 images of 10 that see them and themselves; 8 codes are scored
    pairs = 2 * 5**2 / 2 + 6 * 10 * (5 + 10)
    expected = 2 * 100 * (10 + 60) + 2 * 7 * 48 + 4 * 2 * 3 * pairs
    assert count_forward_operations(costs, image, shared=True) == expected
    pairs = 2 * (6**2 + 4**2) / 2 + 6 * 4 * (6 + 4 / 2)
    expected = 2 * 100 * (12 + 24) + 2 * 11 * 24 + 4 * 2 * 3 * pairs
    assert count_forward_operations(costs, text, shared=True) == expected
    texts = 2 * 100 * 10 + 4 * 2 * 3 * 2 * 5**2 / 2
    each = count_forward_operations(costs, image, shared=True) - texts
    assert count_drawing_operations(costs, image, 3) == texts + 3 * each


def test_prompts_of_a_show_o(tmp_path):
    size = SIZES["show-o-tiny"]
    special = size.measured.write_processor(tmp_path / "words", size.policy).special
    drawing = inputs.make_image_prompts(size, special, 5, 12)
    asking = inputs.make_questions(size, special, 5, 29)
    for prompts in (drawing, asking):
        assert ((prompts.input_ids != special.pad) == prompts.attention_mask).all()
        assert prompts.attention_mask[0].all() and not prompts.attention_mask.all()
    assert drawing.input_ids[0, :2].tolist() == [special.t2i, special.eos]
    assert (drawing.input_ids[:, -1] == special.eos).all()
    front = [special.mmu, special.soi, *[special.mask] * 16, special.eoi, special.eos]
    assert asking.input_ids[0, :20].tolist() == front
    (segment,) = inputs.make_task_batch(size, special, drawing, 3, 16).segments
    assert segment.replay["noise_keys"].shape == (15, 2)
    assert segment.values.max() < 512


def test_masks_of_the_peer_are_those_of_a_show_o(tmp_path):
    import torch

    from tools.bench.peer import show_o

    size = SIZES["show-o-tiny"]
    special = size.measured.write_processor(tmp_path / "words", size.policy).special
    drawing = torch.from_numpy(inputs.make_image_prompts(size, special, 3, 12).input_ids)
    ids = show_o.add_image(drawing, torch.full((3, 16), special.mask), special)
    seen = show_o.make_mask(ids, special, "t2i")[:, 0] == 0
    expected = np.array(show_o_masks.make_generation_mask(ids.numpy(), special))
    real = ids.numpy() != special.pad
    assert (seen.numpy() == expected)[real].all()
    asking = torch.from_numpy(inputs.make_questions(size, special, 3, 29).input_ids[:1])
    seen = show_o.make_mask(asking, special, "mm2t")[:, 0] == 0
    assert (
        seen.numpy() == np.array(show_o_masks.make_question_mask(asking.numpy(), special))
    ).all()


# ---- JanusFlow


@SLOW
def test_all_parts_of_a_janus_flow(tmp_path):
    """Sampler and trainer agree, and PyTorch does the same work."""
    out = tmp_path / "bench.jsonl"
    tiny = ["--size", "janus-flow-tiny", *TINY[2:], "--peer", "transformers"]
    command.main([*tiny, "--out", str(out)])
    _, *lines = (json.loads(line) for line in out.read_text().splitlines())
    found = {(line["part"], line["name"]): line for line in lines}
    assert {part for part, _ in found} == {"ceiling", *JANUS_FLOW_PARTS}
    for part in ("image", "unguided"):
        drawing, whole = found[part, "latents"], found[part, "latents and pixels"]
        assert drawing["steps"] == 4
        for line in (drawing, whole):
            assert line["images_per_s"] * line["median_s"] == pytest.approx(PROMPTS * GROUP)
    guided, plain = (found[part, "latents"]["tflop"] for part in ("image", "unguided"))
    assert guided == pytest.approx(2 * plain)
    iteration = found["iteration", "rollouts and update"]
    assert iteration["t2i_ratio_first"] < 1e-4 and iteration["mm2t_logp_difference"] < 0.05
    for part, name in versus.OURS["janus_flow"].items():
        theirs = "eager step" if part == "train_image" else "eager loop"
        ours, times = found[part, name], found[part, theirs]["median_s"]
        assert ours[f"times_{theirs.replace(' ', '_')}"] == pytest.approx(times / ours["median_s"])


def test_work_of_a_published_janus_flow():
    """Against what was worked out apart from this code: 1.55 TFLOP a velocity."""
    size = SIZES["janus-flow-1.3b"]
    image = Work("t2i", 1, 1, 0, size.limits.image_tokens)
    assert count_drawing_operations(size.costs, image, 1) / 1e12 == pytest.approx(1.55, rel=0.03)
    assert (size.cfg_scale, size.denoising.steps, size.denoising.window.length) == (2.0, 10, 2)
    assert SIZES["1b"].cfg_scale == SIZES["show-o-512"].cfg_scale == 5.0


def test_inputs_of_a_janus_flow(tmp_path):
    """Steps that have noise go from the latents before them to those behind."""
    size = SIZES["janus-flow-tiny"]
    special = size.measured.write_processor(tmp_path / "words", size.policy).special
    drawing = inputs.make_image_prompts(size, special, 3, 12)
    assert drawing.input_ids[0, 0] == special.bos
    assert not np.isin(drawing.input_ids, [special.boi, special.eoi]).any()
    asking = inputs.make_questions(size, special, 3, size.text_prompt)
    front = [special.bos, special.boi, *[special.image] * 16, special.eoi]
    assert asking.input_ids[0, :19].tolist() == front
    (segment,) = inputs.make_task_batch(size, special, drawing, 2, 17).segments
    assert segment.values.shape == (6, 5, 8, 8, 4) and segment.kind == LATENTS
    steps = segment.replay[STEPS]
    assert (np.diff(steps) == 1).all() and steps.min() >= 0 and steps.max() <= 2
    moves = take_step_transitions(steps, size.denoising)
    for place, (keep, std) in enumerate(zip(moves.keep, moves.std, strict=True)):
        row, number = place // 2, steps[place // 2, place % 2]
        noise = (segment.values[row, number + 1] - keep * segment.values[row, number]) / std
        assert 0.8 < noise.std() < 1.2


# ---- gradients


def test_errors_of_gradients_are_shares_of_their_lengths():
    exact = {"a": np.float32([3, 4]), "b": {"c": np.float32([[12]])}, "unread": np.zeros(2)}
    found = {"a": np.float32([3, 4.5]), "b": {"c": np.float32([[12]])}, "unread": np.zeros(2)}
    assert gradients.measure_errors(found, exact) == pytest.approx(
        {"error": 0.5 / 13, "largest": 0.1}
    )
    assert gradients.measure_errors(exact, exact) == {"error": 0, "largest": 0}


@pytest.mark.slow
def test_a_wrong_kernel_shows_in_gradients(tmp_path, monkeypatch):
    """One that scales its scores otherwise."""
    real = jax.nn.dot_product_attention

    def attend(query, key, value, *, implementation=None, **rest):
        wrong = implementation == "cudnn"
        return real(query * 8 if wrong else query, key, value, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    setting = dataclasses.replace(
        published("tiny", tmp_path), attention="cudnn", prompts=2, group=2
    )
    found = {record.name: record.figures for record in gradients.measure_gradients(setting)}
    for task in ("t2i", "mm2t"):
        assert found[task]["error"] > 5 * found[task]["error_xla"] > 0
        assert found[task]["value"] > 2 * found[task]["value_xla"] > 0


# ---- rewards on the host


def test_rewards_on_the_host_are_timed(capsys):
    host.main(["--repeats", "1"])
    shown = re.findall(r"^(text|shapes) .* ([\d.]+) ms$", capsys.readouterr().out, re.M)
    assert [name for name, _ in shown] == ["text", "shapes"]
    with pytest.raises(SystemExit) as error:
        host.main(["--repeats", "0"])
    assert error.value.code == BAD_INPUT_EXIT_CODE


# ---- the training command's start


@pytest.mark.slow
def test_the_training_command_makes_its_first_step(tmp_path):
    """From an empty cache, from a full one, and after a checkpoint."""
    out = tmp_path / "new" / "start.jsonl"
    small = ["train.prompts_per_step=2", "train.micro_batch=2", "rollout.batch_prompts=2"]
    start.main(["--size", "tiny", "--out", str(out), *small, "rollout.group_size=2"])
    cold, cached, resumed = map(json.loads, out.read_text().splitlines())
    assert [x["start"] for x in (cold, cached, resumed)] == ["cold", "cached", "resumed"]
    assert cold["seconds"] > cached["seconds"] > 1
    assert cold["seconds"] > resumed["seconds"] > 1


def test_a_start_that_fails_says_why(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        start.main(["--size", "tiny", "optimizer.learning_rat=1"])
    assert error.value.code == BAD_INPUT_EXIT_CODE
    assert "did you mean optimizer.learning_rate?" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"log\.every=2: the measurement sets this option"):
        start.write_config(tmp_path, "tiny", ["log.every=2"])
    config = start.write_config(tmp_path, "tiny", [])
    with pytest.raises(InputError, match=r"(?s)no step was made.*model: no such directory"):
        start.time_first_step(config, tmp_path / "run", {})


@SLOW
def test_windows_of_codes_are_measured(tmp_path):
    """The time of their passes, and what the shipped nano draws in one."""
    out = tmp_path / "bench.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "TRAINED", ("nano",))
        command.main(
            [*TINY, "--parts", "windows,acceptance", "--windows", "1,4", "--out", str(out)]
        )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    passes = {line["name"]: line for line in lines if line.get("part") == "windows"}
    assert passes["passes of 1 codes"]["break_even"] == 1
    assert passes["passes of 4 codes"]["ms_per_pass"] > 0
    for scale in (5, 1):
        single, four = (
            next(line for line in lines if line.get("name") == f"nano, guidance {scale}, {n} codes")
            for n in (1, 4)
        )
        assert single["codes_per_pass"] == single["codes_per_loop"] == 1
        assert 1 < four["codes_per_loop"] <= four["codes_per_pass"] <= 4
        assert max(single["difference_max"], four["difference_max"]) < 1e-3


@SLOW
def test_answers_that_end_are_measured(tmp_path):
    """Their rollouts, and updates that give the same numbers whatever rows the answers share."""
    out = tmp_path / "bench.jsonl"
    many = ["--prompts", "4", "--group", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lengths, "MEANS", (60 / 512,))
        command.main([*TINY, *many, "--parts", "lengths", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = {line["name"]: line for line in lines if line.get("part") == "lengths"}
    mean = "mean 1"
    apart, packed = (
        found[f"{mean}: update, {name}"] for name in ("rows of single answers", "packed rows")
    )
    assert apart["rows"] == 1 and packed["rows"] == 0.25
    assert packed["entropy"] == pytest.approx(apart["entropy"], rel=1e-2)
    ended, longest = (
        found[f"{mean}: answers {name}"] for name in ("that end", "as long as the longest")
    )
    assert ended["longest"] == longest["longest"] > ended["mean"]
