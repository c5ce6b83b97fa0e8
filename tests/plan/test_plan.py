"""The plan command: memory as a run lays it out, loops multiplied out, collectives, exit codes."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from corl_jax.assets import MINI_JANUS
from corl_jax.config import files as config_files
from corl_jax.errors import InputError
from corl_jax.params import partition
from corl_jax.plan import __main__ as plan
from corl_jax.plan import chips, cost, hlo, programs, tables
from corl_jax.plan.command import find_sizes
from corl_jax.policies.janus import network
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.layout import RULES
from corl_jax.train import attending, build, check, memory, resolve, states
from corl_jax.train.optimizer import make_optimizer
from corl_jax.weights.checkpoint import load_config
from tests.support import tiny_runs
from tests.support.tiny_runs import options, write_config

LENGTHS = {"t2i": 32, "mm2t": 64}
LAYERS = 2
NVIDIA = SimpleNamespace(
    platform="gpu", client=SimpleNamespace(platform_version="cuda 13000"), compute_capability="9.0"
)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, model):
    """Fully sharded over eight devices; neither data nor weights are there to be read."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "sizes").mkdir()
    (folder / "sizes" / "config.json").write_text((model / "config.json").read_text())
    tree = options(
        folder / "sizes", folder / "no_data", folder / "run",
        mesh={"data": 1, "fsdp": -1}, train={"prompts_per_step": 8}, algorithm={"kl_coef": 0.1},
    )  # fmt: skip
    return write_config(folder / "config.yaml", tree)


@pytest.fixture(scope="module")
def outline(config_path):
    config = config_files.load(config_path)
    sizes = load_config(config.model.path, KIND)
    return resolve.outline_run(config, FAMILY, sizes, FAMILY.stand_in_tokens)


@pytest.fixture(scope="module")
def planned(outline):
    return programs.make_programs(outline, LENGTHS, jnp.float32)


@pytest.fixture(scope="module")
def update(outline, planned):
    kept, listed = planned
    with jax.set_mesh(outline.mesh):
        return tables.compile_program(listed[-1], kept)


# ---- the programs are the run's own


def test_all_of_an_iteration_is_planned(planned):
    names = [(each.name, each.calls) for each in planned[1]]
    assert names == [
        ("sample t2i", 1), ("sample mm2t", 1), ("codes to pixels", 1), ("log-probs", 1),
        ("update", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("stage", ["self_sft", "self_sft_through"])
def test_the_update_on_own_images_has_the_inputs_of_its_stage(config_path, stage):
    config = config_files.load(config_path, [f"stage={stage}"])
    sizes = load_config(config.model.path, KIND)
    outline = resolve.outline_run(config, FAMILY, sizes, FAMILY.stand_in_tokens)
    lengths = {"self_qa": 32, "self_qa/question": 64}
    kept, (*_, update) = programs.make_programs(outline, lengths, jnp.float32)
    with jax.set_mesh(outline.mesh):
        state, metrics = jax.eval_shape(update.function, *update.resident, *update.inputs)
    assert state.params.keys() == kept.state.params.keys()
    assert metrics["self_qa/text/nll"].value.shape == ()


def test_each_question_about_an_own_image_has_a_cache_of_its_own(config_path):
    """Because each completion of a prompt has another image; images share the prompt's cache."""
    sizes = load_config(config_path.parent / "sizes", KIND)

    def count_bytes(*overrides):
        config = config_files.load(config_path, [*overrides, "algorithm.tasks=self_qa"])
        outline = resolve.outline_run(config, FAMILY, sizes, FAMILY.stand_in_tokens)
        lengths = {"self_qa": 32, "self_qa/question": 64}
        estimate = memory.estimate_outline(outline, lengths, lambda path: jnp.dtype("float32"))
        return estimate["sampling caches (largest task)"]

    few, many = count_bytes("rollout.group_size=2"), count_bytes("rollout.group_size=6")
    assert many == pytest.approx(3 * few)


def test_an_update_reads_each_prompt_once_for_its_completions(config_path):
    """But the question about an own image for each, because each completion has another image."""
    sizes = load_config(config_path.parent / "sizes", KIND)
    llama, image = sizes.llama, sizes.num_image_tokens

    def estimate(task: str, lengths: dict[str, int], *overrides: str):
        options = ["train.micro_batch=2", "rollout.group_size=6", "rollout.max_new_tokens=9",
                   "model.remat=full", "model.attention=xla"]  # fmt: skip
        config = config_files.load(config_path, [*options, f"algorithm.tasks={task}", *overrides])
        outline = resolve.outline_run(
            config, FAMILY, sizes, FAMILY.stand_in_tokens, jax.devices()[:1]
        )
        found = memory.estimate_outline(outline, lengths, lambda path: jnp.dtype("float32"))
        width = jnp.dtype(config.model.dtype).itemsize * llama.num_layers * llama.hidden_size
        return (
            found["activations (kept by remat)"] * memory.GIB / width,
            found["attention scores (xla)"] * memory.GIB / 4 / llama.num_heads,
        )

    tokens, pairs = estimate("mm2t", {"mm2t": 64})
    assert tokens == pytest.approx(2 * 64 + 12 * 9)
    assert pairs == pytest.approx(2 * 64**2 + 12 * 9 * (64 + 9))
    tokens, pairs = estimate("t2i", {"t2i": 32}, "algorithm.image_logprobs=guided")
    assert tokens == pytest.approx(2 * (2 * 32 + 12 * image))
    tokens, pairs = estimate("self_qa", {"self_qa": 8, "self_qa/question": 64})
    assert tokens == pytest.approx(12 * (64 + 9))
    assert pairs == pytest.approx(12 * (64**2 + 9 * (64 + 9)))


def test_arguments_are_the_shards_that_a_run_places(outline, planned, update, tiny_config):
    """Against arrays that are really on the devices, laid out by the functions of `build`."""
    config, mesh = outline.config, outline.mesh
    params = tiny_runs.random_params(outline.sizes)
    trained, frozen = (
        tiny_runs.place_params(x, mesh, RULES) for x in partition(params, outline.trained)
    )
    optimizer = make_optimizer(config.optimizer, 1)
    shardings = states.state_shardings(optimizer, trained, mesh, RULES)
    moments = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)

    def on_first(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    kept = planned[0].by_name()
    assert programs.count_shard_bytes(kept["trained parameters"]) == on_first(trained)
    assert programs.count_shard_bytes(kept["optimizer"]) == on_first(moments)
    assert programs.count_shard_bytes(kept["frozen parameters"]) == on_first(frozen)
    # Of a kernel [in, out] each of eight devices has an eighth; of a norm's scale all.
    width, rows = outline.sizes.llama.hidden_size, outline.sizes.llama.vocab_size
    state = planned[0].state.params
    assert programs.count_shard_bytes(state["lm_head"]["kernel"]) == width * rows * 4 // 8
    assert programs.count_shard_bytes(state["language_model"]["norm"]["scale"]) == width * 4
    # The image tokenizer and the vision tower's position table are not read by the update.
    read = on_first((trained, moments)) + programs.count_shard_bytes(planned[1][-1].inputs) + 4
    assert read < update.arguments < read + on_first(frozen)
    assert update.peak > update.arguments + update.temporaries


def test_kept_memory_counts_where_a_program_does_not_read_it(outline, planned):
    """While an image is drawn the optimizer's moments lie there all the same."""
    kept, listed = planned
    with jax.set_mesh(outline.mesh):
        decode = tables.compile_program(listed[2], kept)
    assert decode.program.name == "codes to pixels"
    everything = programs.count_shard_bytes(kept.by_name())
    assert decode.arguments < everything < decode.peak
    assert kept.reference is not None
    halves = programs.count_shard_bytes(kept.reference) / programs.count_shard_bytes(
        kept.state.params
    )
    assert halves == 1  # float32 compute in this config


def test_fully_sharded_parameters_are_gathered_and_their_gradients_summed(update):
    found = update.cost.collectives
    assert found["all-gather"].count > 0
    assert found["all-gather"].nbytes > 0
    assert {"all-reduce", "reduce-scatter"} & found.keys()


def test_products_are_those_of_the_network(outline, update):
    """At least three products for each weight and token, and not much more than remat's four."""
    llama = outline.sizes.llama
    attn = llama.hidden_size * llama.head_dim * 2 * (llama.num_heads + llama.num_kv_heads)
    layer = attn + 3 * llama.hidden_size * llama.intermediate_size
    rows, prompts = 16, 8
    tokens = rows * (outline.sizes.num_image_tokens - 1) + prompts * LENGTHS["t2i"]
    tokens += rows * (outline.config.rollout.max_new_tokens - 1) + prompts * LENGTHS["mm2t"]
    heads = rows * outline.config.rollout.max_new_tokens * llama.hidden_size * llama.vocab_size
    needed = 6 * (tokens * layer * LAYERS + heads) / 8
    assert needed < update.cost.flops < 2.5 * needed


def test_programs_do_not_take_what_only_the_machine_at_hand_can_run(outline, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [NVIDIA])
    config = config_files.validate(
        outline.config.model_dump() | {"model": {"path": "x", "dtype": "bfloat16"}}, "test"
    )

    def chosen(device, wanted="auto"):
        model = config.model.model_copy(update={"attention": wanted})
        described = dataclasses.replace(
            outline, config=config.model_copy(update={"model": model}),
            mesh=SimpleNamespace(devices=np.array([[[device]]])),
        )  # fmt: skip
        samplers = {f.args[2].attention for f in build.make_samplers(described).values()}
        return samplers, build.make_update_options(described).logprobs.attention

    tpu, cpu = (SimpleNamespace(platform=name) for name in ("tpu", "cpu"))
    assert chosen(tpu) == ({"xla"}, "splash")
    assert chosen(cpu) == ({"xla"}, "xla")
    assert chosen(NVIDIA) == ({"cudnn"}, "cudnn")
    assert chosen(NVIDIA, "xla") == ({"cudnn"}, "xla")


@pytest.mark.parametrize(
    ("stage", "tasks", "log_probs", "refused"),
    [
        ("rl", "unified", "conditional", False), ("rl", "t2i", "guided", True),
        ("rl", "mm2t", "guided", False), ("sft", "mm2t", "conditional", True),
        ("vq", "unified", "guided", False),
    ],
)  # fmt: skip
def test_cudnn_is_not_taken_where_the_flag_for_the_same_bits_breaks_it(
    outline, monkeypatch, stage, tasks, log_probs, refused
):
    devices = SimpleNamespace(devices=np.array([NVIDIA]))

    def asked(attention):
        changes = {
            "model": {"attention": attention, "dtype": "bfloat16"},
            "algorithm": {"image_logprobs": log_probs, "tasks": tasks},
        }
        changed = {
            name: getattr(outline.config, name).model_copy(update=options)
            for name, options in changes.items()
        }
        config = outline.config.model_copy(update={"stage": stage, **changed})
        return config, outline.limits.head_dim, devices

    monkeypatch.setenv("XLA_FLAGS", "")
    assert (
        attending.choose_update_kernel(*asked("auto"))
        == attending.choose_update_kernel(*asked("cudnn"))
        == "cudnn"
    )
    assert attending.find_kernel_problems(*asked("cudnn")) == []

    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    assert attending.choose_update_kernel(*asked("auto")) == "xla"
    problems = attending.find_kernel_problems(*asked("cudnn"))
    assert [problem.partition(":")[0] for problem in problems] == ["model.attention"] * refused
    assert all("set it to auto or xla" in problem for problem in problems)
    for always in ("auto", "xla"):
        assert attending.find_kernel_problems(*asked(always)) == []


# ---- the command


def test_command_prints_tables_and_says_whether_it_fits(config_path, capsys, monkeypatch):
    """One compilation for three capacities; all but the update are taken from it, too."""
    compile_once = {}

    def compiled(program, kept, real=tables.compile_program):
        if program.name not in compile_once:
            compile_once[program.name] = real(program, kept)
        return compile_once[program.name]

    monkeypatch.setattr(tables, "compile_program", compiled)
    command = ["--config", str(config_path), "--topology", "local", "--text-prompt", "64"]
    plan.main(command)
    out = capsys.readouterr().out
    assert "capacity unknown" in out
    assert "'fsdp': 8" in out
    assert re.search(r"trained parameters +0\.00", out)
    for name in ("sample t2i", "sample mm2t", "codes to pixels", "log-probs", "update"):
        assert re.search(rf"^  {name} .*\?$", out, re.M), name
        assert re.search(rf"^  {name} +1 +[\d.e,-]+", out, re.M), name
    assert re.search(r"^  update +all-gather +\d+", out, re.M)
    assert "no estimate" in out, "nobody knows a CPU's figures"
    most = max(each.peak for each in compile_once.values())
    plan.main([*command, "--hbm", str(1.01 * most / 2**30)])
    assert " NO" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        plan.main([*command, "--hbm", str(0.99 * most / 2**30)])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "NO" in out
    assert "does not fit: " in out
    with pytest.raises(SystemExit) as stopped:  # fits, but not beside the reward networks
        plan.main(
            [*command, "--hbm", str(1.01 * most / 2**30), "--reserve", str(0.02 * most / 2**30)]
        )
    assert stopped.value.code == 1
    assert re.search(r"with all kept.*\n(.*\n)*.* NO", capsys.readouterr().out)


def test_a_plan_in_words_and_its_image_are_one_program(model, rows, tmp_path, capsys):
    tree = options(model, rows, tmp_path / "run", algorithm={"tasks": "think"})
    path = write_config(tmp_path / "config.yaml", tree | {"rewards": [{"name": "t2i_pixel_mse"}]})
    command = ["--config", str(path), "--topology", "local", "--stored", "float32"]
    command += ["--only", "sample", "mesh.data=8", "train.prompts_per_step=8"]
    plan.main([*command, "data.max_prompt_length=256", "rollout.max_new_tokens=20"])
    out = capsys.readouterr().out
    assert "+ 36 tokens" in out and "sample think" in out
    # 20 tokens after the first one, 16 at most between two looks at who has ended.
    assert "at most 2 rounds" in out


def test_it_counts_the_prompts_of_the_check_and_prints_its_estimate(model, rows, tmp_path, capsys):
    tree = options(model, rows, tmp_path / "run", lora={"rank": 2})
    path = write_config(tmp_path / "config.yaml", tree)
    command = ["--config", str(path), "--topology", "local", "--stored", "float32"]
    command += ["--only", "codes", "mesh.data=8", "train.prompts_per_step=8",
                "data.max_prompt_length=60"]  # fmt: skip
    # Padded to multiples of 32, prompts are longer than the limit.
    checked = resolve.resolve_run(config_files.load(path, command[-3:]))
    lengths = memory.measure_prompt_lengths(checked)
    estimate = memory.estimate_memory(checked)
    _, totals = memory.add_up_memory(estimate)
    plan.main(command)
    out = capsys.readouterr().out
    padded = f"prompts padded to t2i {lengths['t2i']}, mm2t {lengths['mm2t']} tokens"
    assert f"{padded}, as in the first batch of {rows}; at most 60" in out
    sizes = ", ".join(f"{size:.2f} GiB {program}" for program, size in totals.items())
    assert f"estimate of `train --check` for the same prompts: at least {sizes}\n" in out
    assert f"  {memory.describe_counted(checked, estimate)}\n" in out and "compiler of cpu" in out
    assert padded in check.describe(checked)
    # Longer prompts are asked for by the options, and both figures are for them.
    plan.main([*command, "--text-prompt", "60", "--image-prompt", "60"])
    out = capsys.readouterr().out
    assert "prompts padded to t2i 64, mm2t 64 tokens, as the options say" in out


def test_without_data_prompts_are_as_long_as_allowed(config_path, capsys):
    plan.main(["--config", str(config_path), "--topology", "local", "--only", "codes"])
    out = capsys.readouterr().out
    assert "mm2t 128 tokens, as long as data.max_prompt_length allows, 128 (" in out


def test_shipped_models_have_sizes_by_name():
    assert find_sizes("mini", None) == (FAMILY, load_config(MINI_JANUS, KIND))


def test_what_is_kept_is_too_much_before_anything_is_compiled(config_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "compile_program", None)
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--config", str(config_path), "--topology", "local", "--hbm", "1e-5"])
    assert stopped.value.code == 1
    assert "does not fit: what is kept takes" in capsys.readouterr().out


def test_time_is_between_perfect_overlap_and_none():
    chip = chips.Chip("test", 2**30, bandwidth=100.0, peak=1000.0, links=10.0)
    work = cost.Cost(flops=1200.0, hbm=80.0, collectives={"all-gather": cost.Traffic(1, 21.0)})
    one = tables.CompiledProgram(programs.Program("update", None, (), (), 2), 0, 0, 0, 0, 0, work)
    assert one.estimate_seconds(chip) == pytest.approx((2.0, 1.0, 3.0))
    assert "6.0 s if products, memory and links overlap, 12.0 s" in tables.format_iteration(
        [one], chip
    )
    refused = tables.CompiledProgram(one.program, 0, 2**31, 0, 0, 2**31, None)
    assert not tables.fits([one, refused], chip, 0)
    assert "no estimate" in tables.format_iteration([one, refused], chip)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--topology", "v9:4x4"], "expected local, or one of v4, v5e, v5p, v6e"),
        (["--topology", "v5e:16"], "--topology: found 'v5e:16'"),
        (["--topology", "local", "--text-prompt", "7"], "--text-prompt: found 7; expected 18 to"),
        (["--topology", "local", "--image-prompt", "500"], "--image-prompt: found 500"),
        (["--topology", "local", "mesh.tensor=3"], "mesh: data 1 x fsdp -1 x tensor 3"),
        (["--topology", "local", "train.prompts_per_step=12"], "train.prompts_per_step: 12 is not"),
        (["--topology", "local", "mesh.fsdp=1", "mesh.tensor=8"], "8 does not divide 4 (heads of"),
        (["--topology", "local", "model.attention=cudnn"], "attention: cudnn, which cpu with"),
        (["--topology", "local", "--only", "draw"], "--only: found draw; this config's programs"),
        (["--topology", "local", "model.path=elsewhere"], "model.path: found 'elsewhere'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(config_path, extra, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--config", str(config_path), *extra])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


def test_missing_libtpu_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'corl-jax\[tpu\]'"):
        chips.describe_slice("v5e:4x4")


@pytest.mark.parametrize(
    ("path", "preset", "expected"),
    [
        ("deepseek-community/Janus-Pro-1B", None, "janus-pro-1b"),
        ("runs/janus_pro_7b/unified/export", None, "janus-pro-7b"),
        ("deepseek-ai/Janus-1.3B", None, "janus-1.3b"),
        ("runs/janus_1_3b/self_sft/export", None, "janus-1.3b"),
        ("anything", "janus-pro-7b", "janus-pro-7b"),
    ],
)
def test_sizes_come_from_a_name_where_there_are_no_files(path, preset, expected):
    assert find_sizes(path, preset) == (FAMILY, network.PRESETS[expected])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
# Anew, because JAX cannot read back a program that it kept for an absent TPU.
@pytest.mark.usefixtures("compiled_anew")
def test_tpu_slice_is_compiled_for(config_path, capsys):
    plan.main([
        "--config", str(config_path), "--topology", "v5e:2x2", "model.dtype=bfloat16",
        # half of the programs, and of kernels
        "algorithm.tasks=t2i", "rewards=[{name: t2i_pixel_mse}]",
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert "4 x TPU v5e" in out
    assert "of 15.75" in out
    assert "no rewards):" in out
    lines = re.findall(r"^  (.+): work inside of kernels is not counted: (.*)$", out, re.M)
    kernels = {name: dict(part.split(" x ") for part in said.split(", ")) for name, said in lines}
    assert kernels.keys() == {"log-probs", "update"}, "samplers attend without a kernel"
    for found in kernels.values():  # splash attention; another this chip may not have
        assert found.keys() == {"tpu_custom_call"}


# ---- counting


def compiled_text(function, *args, mesh=None):
    return jax.jit(function).lower(*args).compile().as_text()


def test_loops_are_multiplied_out():
    """XLA counts the body of a loop once; a scan in a scan runs 3 x 5 products."""
    x = jnp.zeros((8, 16))

    def product(x, _):
        return jnp.tanh(x @ jnp.ones((16, 16))), None

    def outer(x, _):
        return jax.lax.scan(product, x, None, length=5)[0], None

    text = compiled_text(lambda x: jax.lax.scan(outer, x, None, length=3)[0], x)
    assert cost.count_cost(text).flops == 15 * 2 * 8 * 16 * 16


def test_a_loop_with_an_open_end_runs_as_often_as_it_is_told():
    def body(state):
        return state[0] + 1, state[1] @ jnp.ones((16, 16))

    def loop(x):
        return jax.lax.while_loop(lambda s: (s[0] < 9) & (s[1][0, 0] < 3), body, (0, x))

    counted = cost.count_cost(compiled_text(loop, jnp.zeros((8, 16))), rounds=7)
    assert counted.open_loops == 1
    assert counted.flops == 7 * 2 * 8 * 16 * 16


def test_collectives_of_a_sharded_product(mesh):
    devices = Mesh(mesh.devices.reshape(8), ("x",))
    rows, split = (NamedSharding(devices, PartitionSpec(*axes)) for axes in ((), ("x",)))
    w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=rows)
    gathered = jax.jit(lambda w: w * 2, out_shardings=rows).lower(w).compile().as_text()
    found = cost.count_cost(gathered).collectives
    assert {kind: each.count for kind, each in found.items()} == {"all-gather": 1}
    assert found["all-gather"].nbytes == 64 * 32 * 4 * 7 / 8
    columns = NamedSharding(devices, PartitionSpec(None, "x"))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=columns)
    summed = jax.jit(jnp.matmul, out_shardings=rows).lower(x, w).compile().as_text()
    found = cost.count_cost(summed).collectives
    assert found["all-reduce"].nbytes == 2 * 8 * 32 * 4 * 7 / 8
    assert cost.count_cost(summed).flops == 2 * 8 * 64 * 32 / 8


@pytest.mark.parametrize("shape", [(4, 4, 3, 8), (5, 7, 2, 6)])
@pytest.mark.parametrize(("stride", "padding"), [(1, "SAME"), (2, "VALID"), (1, "VALID")])
def test_convolutions_are_counted_without_their_padding(shape, stride, padding):
    """Against the number of products that a convolution of ones adds up."""
    height, width, features, out = shape
    x, w = jnp.ones((2, height, width, features)), jnp.ones((3, 3, features, out))

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # jax_disable_most_optimizations keeps it a convolution on the CPU.
    text = compiled_text(convolve, x, w)
    assert cost.count_cost(text).flops == pytest.approx(2 * float(convolve(x, w).sum()))


TPU = """HloModule jit_f, is_scheduled=true, num_partitions=16

%gather_start (p0: bf16[128,64], p1: bf16[2048,64]) -> (bf16[2048,64], bf16[8,64]) {
  %p0 = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[2048,64]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.1 = bf16[2048,64]{1,0} all-gather(%p0), channel_id=7, replica_groups=mesh['a'=16,'b'=1] {'a'}, dimensions={0}
  ROOT %t = (bf16[2048,64]{1,0}, u32[]{:S(2)}) tuple(%all-gather.1)
}

%gather_done (p0: bf16[128,64], p1: bf16[2048,64]) -> bf16[2048,64] {
  %p0 = bf16[128,64]{1,0} parameter(0)
  %p1 = bf16[2048,64]{1,0} parameter(1)
  ROOT %all-gather.2 = bf16[2048,64]{1,0} all-gather(%p0), channel_id=7, replica_groups=mesh['a'=16,'b'=1] {'a'}, dimensions={0}
}

%product (p0: bf16[8,64], p1: bf16[64,32]) -> bf16[8,32] {
  %p0 = bf16[8,64]{1,0:S(1)} parameter(0)
  %p1 = bf16[64,32]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[8,32]{1,0:S(1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%body (p: (s32[], bf16[128,64], bf16[64,32])) -> (s32[], bf16[128,64], bf16[64,32]) {
  %p = (s32[]{:T(128)}, bf16[128,64]{1,0}, /*index=2*/bf16[64,32]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %w = bf16[128,64]{1,0} get-tuple-element(%p), index=1
  %v = bf16[64,32]{1,0} get-tuple-element(%p), index=2
  %buffer = bf16[2048,64]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %x = bf16[8,64]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %start = (bf16[2048,64]{1,0}, u32[]{:S(2)}) fusion(%w, %buffer), kind=kCustom, output_to_operand_aliasing={{0}: (1, {})}, calls=%gather_start
  %done = bf16[2048,64]{1,0} fusion(%w, %buffer), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%gather_done
  %y = bf16[8,32]{1,0:S(1)} fusion(%x, %v), kind=kOutput, calls=%product
  %two = s32[] constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %out = (s32[]{:T(128)}, bf16[128,64]{1,0}, bf16[64,32]{1,0}) tuple(%next, %w, %v)
}

%condition (p: (s32[], bf16[128,64], bf16[64,32])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[128,64]{1,0}, bf16[64,32]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %bound = s32[]{:T(128)} constant(9)
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

ENTRY %main (w: bf16[128,64], v: bf16[64,32]) -> bf16[128,64] {
  %w = bf16[128,64]{1,0} parameter(0)
  %v = bf16[64,32]{1,0} parameter(1)
  %first = s32[]{:T(128)} constant(1)
  %state = (s32[]{:T(128)}, bf16[128,64]{1,0}, bf16[64,32]{1,0}) tuple(%first, %w, %v)
  %loop = (s32[]{:T(128)}, bf16[128,64]{1,0}, bf16[64,32]{1,0}) while(%state), condition=%condition, body=%body
  ROOT %r = bf16[128,64]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_tpu_text_products_as_convolutions_and_gathers_spread_over_fusions():
    """Counters from 1 to 9 in steps of 2: four rounds; one gather, though two fusions show it."""
    counted = cost.count_cost(TPU)
    assert counted.flops == 4 * 2 * 8 * 64 * 32
    gather = counted.collectives["all-gather"]
    assert (gather.count, gather.nbytes) == (4, 4 * 2048 * 64 * 2 * 15 / 16)
    # The gather's two sides, the weight of the product, the counter; what has S(1) is on the chip.
    counter = 3 * 4
    assert counted.hbm == 4 * (128 * 64 * 2 + 2048 * 64 * 2 + 64 * 32 * 2 + counter)


GPU = """HloModule jit_f, num_partitions=1

ENTRY %main (a: bf16[8,64], b: bf16[64,32]) -> bf16[8,32] {
  %a = bf16[8,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %gemm = (bf16[8,32]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %fmha = (bf16[8,32]{1,0}, u8[0]{0}) custom-call(%a, %b), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %r = bf16[8,32]{1,0} get-tuple-element(%gemm), index=0
}
"""  # noqa: E501


def test_gpu_text_products_of_a_library_are_counted_and_other_kernels_named():
    counted = cost.count_cost(GPU)
    assert counted.flops == 2 * 8 * 64 * 32
    assert counted.kernels == {"__cudnn$fmhaSoftmax": 1}


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups={{0,1},{2,3}}, x={}", 2),
        ("replica_groups={}", 8),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}, y", 8),
        ("replica_groups=mesh['x'=8] {'x':(2)4}", 4),
    ],
)
def test_group_sizes(attributes, expected):
    assert cost.parse_group_size(attributes, 8) == expected


def test_scanned_weights_are_read_a_layer_at_a_time():
    """A loop over stacked weights reads each once, not the whole stack in every round."""
    weights, x = jnp.zeros((16, 64, 64)), jnp.zeros((8, 64))
    text = compiled_text(lambda x: jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0], x)
    moved = cost.count_cost(text).hbm
    assert weights.nbytes <= moved < 4 * weights.nbytes


def test_array_sizes():
    assert [
        hlo.Array(dtype, (3, 4), False).nbytes for dtype in ("pred", "bf16", "f32", "s4", "u8")
    ] == [12, 24, 48, 12, 12]
