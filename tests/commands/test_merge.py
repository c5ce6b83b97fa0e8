"""`corl-jax merge`: the rules by hand and against PyTorch, layouts, adapters, refusals, memory."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import corl_jax
from corl_jax.assets import NANO_SHOW_O, SHIPPED
from corl_jax.convert.__main__ import run as convert
from corl_jax.merge import rules
from corl_jax.merge.__main__ import main
from corl_jax.merge.inputs import _find_token_problems
from corl_jax.models.lora import Lora
from corl_jax.params import flatten, unflatten
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.weights import sources, storage
from corl_jax.weights.adapters import save_adapter
from corl_jax.weights.checkpoint import load_config, load_params
from corl_jax.weights.export import save_checkpoint
from tests.support.weight_files import (
    BFLOAT16,
    assert_same_bits,
    carried_state,
    hf_config_dict,
    hf_shapes,
    random_state,
    read_state,
    to_original,
    write_checkpoint,
)

State = dict[str, np.ndarray]
TEXT = ("model.language_model.", "lm_head.")
Q_PROJ = "model.language_model.layers.1.self_attn.q_proj.weight"
Q_NAME = "language_model/layers/attn/q_proj/kernel layer 1"
CODEBOOK = "model.vqmodel.quantize.embedding.weight"
VISION = "model.vision_model.post_layernorm.weight"


# ---- the rules, one tensor at a time


def merge_tensor(name: str, base: list, *models: list, factor: float | None = None) -> np.ndarray:
    """One tensor by a rule, as the command does it."""
    rule = rules.RULES[name]
    factor = factor if factor is not None else rule.factor or 1.0
    start = np.asarray(base, np.float32)
    moves = [np.asarray(model, np.float32) - start for model in models]
    sums = [rules.MoveSums() for _ in moves]
    for total, move in zip(sums, moves, strict=True):
        total.add_block(move)
    limits = rules.Limits()
    if rule.has_range:
        limits = rules.find_range(sums, factor)
    elif rule.trims:
        limits = rules.Limits(smallest=tuple(rules.find_smallest_kept(abs(m)) for m in moves))
    return rule.combine(start, moves, limits, factor)[0]


def test_what_nobody_moved_stays():
    base = [0.1, -2.0, 3.0]
    for name in rules.RULES:
        np.testing.assert_array_equal(merge_tensor(name, base, base, base), np.float32(base))


def test_the_move_of_one_model_alone_is_added_whole():
    base, moved = [0.0, 1.0, 2.0, 3.0], [1.0, -3.0, 2.5, 3.25]
    for models in ((moved, base), (base, moved)):
        np.testing.assert_array_equal(merge_tensor("gaussian", base, *models), moved)


def test_moves_with_means_apart_are_added_up():
    # mu = 0 and sigma = 0.1: -10 and 10 are far outside.
    base, first, second = [0.0] * 3, [9.9, 10.0, 10.1], [-9.9, -10.0, -10.1]
    np.testing.assert_array_equal(merge_tensor("gaussian", base, first, second), [0.0] * 3)
    np.testing.assert_allclose(merge_tensor("gaussian", base, first, [50.0, 51.0, 52.0]),
                               [59.9, 61.0, 62.1], rtol=1e-6)  # fmt: skip


def test_of_one_value_both_moves_are_added_whole():
    np.testing.assert_array_equal(merge_tensor("gaussian", [1.0], [3.0], [1.5]), [3.5])


def test_small_moves_are_halved_and_large_ones_are_not():
    # d_1 = 0 but for one 8: mean 1, std 2.828. d_2 = +-1: mean 0, std 1.069. mu = 0.5, sigma is the
    # smaller one, so that (-1.638, 2.638) is inside: all but the 8.
    first, second = [0.0] * 7 + [8.0], [1.0, -1.0] * 4
    merged = merge_tensor("gaussian", [0.0] * 8, first, second)
    np.testing.assert_array_equal(merged, [0.5, -0.5] * 3 + [0.5, 7.5])
    # lambda 1: (-0.569, 1.569), and lambda 0.3: (0.179, 0.821), in which nothing is.
    merged = merge_tensor("gaussian", [0.0] * 8, first, second, factor=1)
    np.testing.assert_array_equal(merged, [0.5, -1.0] * 3 + [0.5, 7.0])
    merged = merge_tensor("gaussian", [0.0] * 8, first, second, factor=0.3)
    np.testing.assert_array_equal(merged, [1.0, -1.0] * 3 + [1.0, 7.0])
    merged = merge_tensor("gaussian", [0.0] * 8, first, second, factor=100)
    np.testing.assert_array_equal(merged, [0.5, -0.5] * 3 + [0.5, 3.5])


def test_a_move_at_the_edge_is_outside():
    # mean 0, std 2 and lambda 1.5: the range is (-3, 3), and 3 is not in it.
    move = [-3.0, 3.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    assert math.isclose(np.std(move, ddof=1), math.sqrt(24 / 7))
    sums = [rules.MoveSums(), rules.MoveSums()]
    limits = rules.Limits(low=-3.0, high=3.0)
    moves = [np.float32(move), np.zeros(8, np.float32)]
    merged, outside = rules.combine_gaussian(np.zeros(8, np.float32), moves, limits, 1.5)
    np.testing.assert_array_equal(merged, [-3, 3, 0.5, -0.5, 0.5, -0.5, 0.5, -0.5])
    assert outside == [2, 0] and sums[0].count == 0


@pytest.mark.parametrize(("factor", "median"), [(1.0, 0.82), (2.0, 0.5), (3.0, 0.5)])
def test_normal_moves_of_equal_widths_are_averaged(factor, median):
    """The median of merged / (d_1 + d_2): at 1 most pairs have one move outside."""
    moves = np.random.default_rng(0).standard_normal((2, 200_000)).astype(np.float32) * 1e-4
    merged = merge_tensor("gaussian", np.zeros(200_000), *moves, factor=factor)
    ratio = np.median(merged / (moves[0] + moves[1]))
    assert ratio == pytest.approx(median, abs=0.005)
    expected = merge_in_torch(np.zeros(200_000), *moves, factor)
    np.testing.assert_array_equal(merged, expected.numpy())


def test_few_moves_are_added_up():
    """As training in bfloat16 at a low rate leaves them: the moved values are the outliers."""
    draw = np.random.default_rng(1)
    moves = [
        np.where(draw.random(100_000) < 0.1, draw.choice([-1, 1], 100_000), 0) * 2.0**-10
        for _ in range(2)
    ]
    merged = merge_tensor("gaussian", np.zeros(100_000), *moves)
    np.testing.assert_array_equal(merged, moves[0] + moves[1])


def test_mean_and_sum():
    base, first, second, third = [1.0, 2.0], [2.0, 2.0], [1.0, 5.0], [4.0, -1.0]
    np.testing.assert_array_equal(merge_tensor("sum", base, first, second, third), [5.0, 2.0])
    merged = merge_tensor("mean", base, first, second, third)
    np.testing.assert_allclose(merged, [1 + 4 / 3, 2.0])


def test_ties_by_hand():
    # Two of ten are kept: 5 and -4 of the first, 6 and 2 of the second. Value 0: 5 and 6, with the
    # mean 5.5. Value 1: -4 alone. Value 2: 2 alone; the first's 1 was cut.
    first = [5.0, -4.0, 1.0] + [0.0] * 7
    second = [6.0, 0.5, 2.0] + [0.0] * 7
    merged = merge_tensor("ties", [0.0] * 10, first, second)
    np.testing.assert_array_equal(merged, [5.5, -4.0, 2.0] + [0.0] * 7)
    halved = merge_tensor("ties", [0.0] * 10, first, second, factor=0.5)
    np.testing.assert_array_equal(halved, merged / 2)
    # The sign of the sum is elected: 5 - 6 = -1, so that only the -6 counts. Of 5 and -5 none does.
    merged = merge_tensor("ties", [0.0] * 10, first, [-6.0, 4.0, 0.0] + [0.0] * 7)
    np.testing.assert_array_equal(merged, [-6.0, 0.0, 0.0] + [0.0] * 7)


def test_ties_keeps_one_move_of_a_small_tensor():
    np.testing.assert_array_equal(merge_tensor("ties", [1.0], [3.0], [2.0]), [2.5])


def test_ties_follows_its_algorithm():
    """Value by value, from the three steps of the paper."""
    moves = np.random.default_rng(3).standard_normal((3, 200)).astype(np.float32)
    kept = [{*np.argsort(-np.abs(move))[:40]} for move in moves]
    expected = np.zeros(200, np.float32)
    for place in range(200):
        values = [move[place] for move, places in zip(moves, kept) if place in places]
        elected = np.sign(np.sum(values, dtype=np.float32))
        agreeing = [value for value in values if np.sign(value) == elected]
        expected[place] = 0.7 * np.mean(agreeing) if agreeing else 0
    merged = merge_tensor("ties", np.zeros(200), *moves, factor=0.7)
    np.testing.assert_allclose(merged, expected, rtol=1e-6)


def test_sums_of_blocks_are_those_of_the_whole():
    values = np.random.default_rng(2).standard_normal(1000).astype(np.float32) * 1e-4 + 3
    sums = rules.MoveSums()
    for block in np.split(values, [1, 10, 700]):
        sums.add_block(block)
    wide = values.astype(np.float64)
    assert sums.count == 1000
    assert sums.mean == pytest.approx(wide.mean(), rel=1e-12)
    assert sums.std == pytest.approx(wide.std(ddof=1), rel=1e-9)
    assert sums.norm == pytest.approx(np.linalg.norm(wide), rel=1e-12)


# ---- whole models


def move_state(state: State, seed: int, scale: float = 1e-3) -> State:
    """A trained model: noise in the language model, all other tensors as they were."""
    draw = np.random.default_rng(seed)

    def move(value: np.ndarray) -> np.ndarray:
        noise = draw.standard_normal(value.shape) * scale * (1 + seed)
        return (value.astype(np.float32) + noise.astype(np.float32)).astype(value.dtype)

    return {key: move(v) if key.startswith(TEXT) else v for key, v in sorted(state.items())}


def cast_state(state: State, dtype: np.dtype) -> State:
    return {key: value.astype(dtype) for key, value in state.items()}


def merge_in_torch(base: np.ndarray, a: np.ndarray, b: np.ndarray, lamda: float) -> torch.Tensor:
    """The formula, written once more."""
    ptw, m1, m2 = (torch.from_numpy(value.astype(np.float32)) for value in (base, a, b))
    d1, d2 = m1 - ptw, m2 - ptw
    mu, sigma = (d1.mean() + d2.mean()) / 2, torch.minimum(d1.std(), d2.std())
    merged = ptw
    for part in (False, True):
        for d in (d1, d2):
            inside = (d > mu - lamda * sigma) & (d < mu + lamda * sigma)
            merged = merged + (0.5 if part else 1.0) * d * (inside == part)
    return merged


@pytest.fixture(scope="module")
def states() -> list[State]:
    """A base and two models of it, float32."""
    base = {key: v.astype(np.float32) for key, v in random_state(hf_shapes()).items()}
    return [base, move_state(base, 1), move_state(base, 2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, states) -> Path:
    """Each of the three models in all layouts: base_hf, base_original, base_jax, a_hf, ..."""
    root = tmp_path_factory.mktemp("merge")
    for name, state in zip(("base", "a", "b"), states, strict=True):
        write_checkpoint(root / f"{name}_hf", state, "transformers")
        carried = carried_state(np.dtype(np.float32))
        write_checkpoint(root / f"{name}_original", to_original(state) | carried, "original")
        assert convert(["to-jax", str(root / f"{name}_original"), str(root / f"{name}_jax")]) == 0
    return root


@pytest.fixture(scope="module")
def merged(folders) -> State:
    """The merge of transformers' layouts."""
    merge(folders / "base_hf", [folders / "a_hf", folders / "b_hf"], folders / "merged_hf")
    return read_state(folders / "merged_hf")


def merge(base: Path | str, models: list[Path], out: Path, *options: str) -> None:
    main(["--base", str(base), "--models", *map(str, models), "--out", str(out), *options])


def read_report(folder: Path) -> dict:
    return json.loads((folder / "merge_report.json").read_text())


def test_every_tensor_follows_the_formula(states, merged):
    base, a, b = states
    assert merged.keys() == base.keys()
    for key, value in merged.items():
        if key.startswith(TEXT):
            expected = merge_in_torch(base[key], a[key], b[key], 2.0).numpy()
            np.testing.assert_allclose(value, expected, rtol=0, atol=2e-8, err_msg=key)
        else:
            assert value.tobytes() == base[key].tobytes(), key


def test_tensors_are_merged_by_layer_and_projection(states, merged):
    """Statistics over the three layers together, as our own layout stacks them, differ."""
    keys = [Q_PROJ.replace("layers.1", f"layers.{layer}") for layer in range(3)]
    whole = merge_in_torch(*(np.stack([state[key] for key in keys]) for state in states), 2.0)
    assert np.abs(np.stack([merged[key] for key in keys]) - whole.numpy()).max() > 1e-4


@pytest.mark.parametrize(
    ("base", "a", "b"),
    [("original", "original", "original"), ("jax", "jax", "jax"), ("jax", "hf", "original"),
     ("hf", "original", "jax")],
)  # fmt: skip
@pytest.mark.parametrize("rule", ["gaussian", "ties"])
def test_layouts_give_the_same_bits(folders, tmp_path, merged, base, a, b, rule):
    models = [folders / f"a_{a}", folders / f"b_{b}"]
    options = ["--layout", "transformers", "--rule", rule]
    merge(folders / f"base_{base}", models, tmp_path / "out", *options)
    expected = merged
    if rule == "ties":
        hf = [folders / f"{name}_hf" for name in "ab"]
        merge(folders / "base_hf", hf, tmp_path / "hf", "--rule", rule)
        expected = read_state(tmp_path / "hf")
        assert_differs(expected, merged)
    assert_same_bits(read_state(tmp_path / "out"), expected)


def assert_differs(a: State, b: State) -> None:
    assert any(a[key].tobytes() != b[key].tobytes() for key in a)


@pytest.mark.parametrize("layout", ["original", "jax"])
def test_the_output_has_the_layout_and_the_files_of_the_base(folders, tmp_path, layout):
    models = [folders / "a_hf", folders / "b_hf"]
    merge(folders / f"base_{layout}", models, tmp_path / "out")
    for file in (folders / f"base_{layout}").iterdir():
        if file.is_file() and file.suffix == ".json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert_stays_equal(folders / f"base_{layout}", tmp_path / "out", "carried.safetensors")
    if layout == "original":
        written = read_state(tmp_path / "out")
        for key, value in carried_state(np.dtype(np.float32)).items():
            np.testing.assert_array_equal(written[key], value)
    metadata = (tmp_path / "out" / "README.md").read_text()
    assert "- merge" in metadata and "gaussian, lambda 2" in metadata


def assert_stays_equal(base: Path, out: Path, name: str) -> None:
    for file in base.rglob(name):
        assert load_file(file).keys() == load_file(out / file.relative_to(base)).keys()


def test_blocks_give_the_same_tensor(folders, tmp_path, merged, monkeypatch):
    """Statistics are those of the whole tensor, whatever is read at a time."""
    monkeypatch.setattr(sources, "PIECE", 1500)
    models = [folders / "a_jax", folders / "b_original"]
    merge(folders / "base_hf", models, tmp_path / "out")
    for key, value in read_state(tmp_path / "out").items():
        np.testing.assert_allclose(value, merged[key], rtol=0, atol=2e-8, err_msg=key)


def test_bfloat16_is_merged_in_float32_and_rounded_once(states, tmp_path, capsys):
    base = cast_state(states[0], BFLOAT16)
    models = [move_state(base, seed, scale=0.02) for seed in (1, 2)]
    for name, state in zip(("base", "a", "b"), (base, *models), strict=True):
        write_checkpoint(tmp_path / name, state, "transformers")
    places = [tmp_path / "a", tmp_path / "b"]
    merge(tmp_path / "base", places, tmp_path / "out")
    assert "rounding the merged tensors" in capsys.readouterr().out
    merge(tmp_path / "base", places, tmp_path / "wide", "--dtype", "float32")
    assert "rounding" not in capsys.readouterr().out
    out, wide = read_state(tmp_path / "out"), read_state(tmp_path / "wide")
    assert {value.dtype for value in out.values()} == {BFLOAT16}
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"
    for key in out:
        expected = merge_in_torch(base[key], models[0][key], models[1][key], 2.0)
        if not key.startswith(TEXT):
            expected = torch.from_numpy(base[key].astype(np.float32))
        np.testing.assert_array_equal(wide[key], expected.numpy(), err_msg=key)
        rounded = expected.to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(out[key].astype(np.float32), rounded, err_msg=key)


def test_another_type_is_no_move(states, tmp_path, capsys):
    """Frozen tensors of a model in bfloat16 are those of its float32 base, rounded."""
    # Times 1.001, because bfloat16 holds every value of `states` exactly.
    base = {key: value * np.float32(1.001) for key, value in states[0].items()}
    assert not np.array_equal(base[VISION], base[VISION].astype(BFLOAT16).astype(np.float32))
    model = move_state(base, 1)
    for name, state in (("base", base), ("a", cast_state(model, BFLOAT16)), ("b", model)):
        write_checkpoint(tmp_path / name, state, "transformers")
    merge(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "out",
          "--params", "(language_model|lm_head)/.*")  # fmt: skip
    assert "are stored in a coarser type than the base's" in capsys.readouterr().out
    out = read_state(tmp_path / "out")
    for key, value in base.items():
        assert key.startswith(TEXT) or out[key].tobytes() == value.tobytes()
    # The other way: a float32 model of a bfloat16 base.
    base = cast_state(states[0], BFLOAT16)
    write_checkpoint(tmp_path / "base", base, "transformers")
    wide = cast_state(base, np.dtype(np.float32))
    write_checkpoint(tmp_path / "c", move_state(wide, 3), "transformers")
    merge(tmp_path / "base", [tmp_path / "c", tmp_path / "base"], tmp_path / "out2")
    report = read_report(tmp_path / "out2")
    assert all(row["tensor"].startswith(("lang", "lm_")) for row in report["tensors"]
               if any(row["moved"]))  # fmt: skip
    assert "equals the base, so it adds nothing" in capsys.readouterr().out


def test_the_report_has_norms_cosines_and_shares(states, folders, merged, capsys):
    report = read_report(folders / "merged_hf")
    rows = {(row["tensor"], row["layer"]): row for row in report["tensors"]}
    row = rows["language_model/layers/attn/q_proj/kernel", 1]
    d1, d2 = (np.float64(state[Q_PROJ] - states[0][Q_PROJ]).ravel() for state in states[1:])
    norms = np.linalg.norm(d1), np.linalg.norm(d2)
    np.testing.assert_allclose(row["norms"], norms, rtol=1e-6)
    np.testing.assert_allclose(row["cosines"], [d1 @ d2 / norms[0] / norms[1]], rtol=1e-5)
    mu, sigma = (d1.mean() + d2.mean()) / 2, min(d1.std(ddof=1), d2.std(ddof=1))
    outside = [np.mean(np.abs(d - mu) >= 2 * sigma) for d in (d1, d2)]
    np.testing.assert_allclose(row["outside"], outside)
    assert outside[1] > outside[0] > 0  # the second has the wider moves
    np.testing.assert_allclose(
        row["merged_norm"], np.linalg.norm(merged[Q_PROJ] - states[0][Q_PROJ]), rtol=1e-5
    )
    frozen = rows["vision_model/post_layernorm/scale", None]
    assert frozen["norms"] == [0, 0] and frozen["cosines"] == frozen["outside"][:1] == [None]
    total = report["total"]
    moved = [row for row in report["tensors"] if any(row["moved"])]
    assert total["tensors_moved"] == len(moved) and total["tensors"] == len(rows)
    squares = sum(row["norms"][0] ** 2 for row in moved)
    assert total["norms"][0] == pytest.approx(math.sqrt(squares))
    assert report["rule"] == "gaussian" and report["lambda"] == 2
    assert "/" not in report["base"] + "".join(report["models"])


def test_more_than_two_models(states, folders, tmp_path, capsys):
    models = [folders / "a_hf", folders / "b_jax", folders / "base_original"]
    merge(folders / "base_hf", models, tmp_path / "sum", "--rule", "sum")
    out = capsys.readouterr().out
    assert all(f"cos {i},{j}" in out for i, j in itertools.combinations((1, 2, 3), 2))
    base, a, b = (state[Q_PROJ] for state in states)
    expected = base + ((a - base) + (b - base))
    np.testing.assert_array_equal(read_state(tmp_path / "sum")[Q_PROJ], expected)
    merge(folders / "base_hf", models, tmp_path / "mean", "--rule", "mean", "--lambda", "3")
    assert "warning: --lambda 3 has no effect with --rule mean" in capsys.readouterr().err
    assert read_report(tmp_path / "mean")["lambda"] is None
    expected = base + ((a - base) + (b - base)) / np.float32(3)
    np.testing.assert_array_equal(read_state(tmp_path / "mean")[Q_PROJ], expected)


def test_lambda_is_used_and_equal_models_are_noted(states, folders, tmp_path, capsys):
    merge(folders / "base_hf", [folders / "a_hf", folders / "a_hf"], tmp_path / "same")
    assert "--models names one folder several times" in capsys.readouterr().out
    models = [folders / "a_hf", folders / "b_hf"]
    merge(folders / "base_hf", models, tmp_path / "out", "--lambda", "1")
    expected = merge_in_torch(*(state[Q_PROJ] for state in states), 1.0).numpy()
    np.testing.assert_allclose(read_state(tmp_path / "out")[Q_PROJ], expected, rtol=0, atol=2e-8)


# ---- adapters


def save_random_adapter(
    folder: Path, state: State, base: Path | None
) -> Callable[[State], np.ndarray]:
    """Adapters of rank 2 on q and down projections; returns Q_PROJ of the merged model."""
    draw, lora = np.random.default_rng(5), Lora(2, 6.0, ("q_proj", "down_proj"))
    shapes = {"attn/q_proj": (48, 48), "mlp/down_proj": (80, 48)}
    flat = {}
    for name, (inputs, outputs) in shapes.items():
        path = f"language_model/layers/{name}"
        flat[f"{path}/lora_a"] = draw.standard_normal((3, inputs, 2)).astype(np.float32) * 0.1
        flat[f"{path}/lora_b"] = draw.standard_normal((3, 2, outputs)).astype(np.float32) * 0.1
    save_adapter(folder, KIND, unflatten(flat), lora, base=base and str(base))
    stored = load_file(folder / "adapter_model.safetensors")
    a, b = (
        stored[f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_{name}.weight"]
        for name in "AB"
    )
    return state[Q_PROJ] + 3 * (b @ a)


@pytest.mark.parametrize("names_base", [True, False])
def test_adapters_are_merged_into_their_base_first(
    states, folders, tmp_path, capsys, names_base
):  # fmt: skip
    base = folders / "base_hf" if names_base else None
    adapted = save_random_adapter(tmp_path / "adapter", states[0], base)
    merge(folders / "base_jax", [tmp_path / "adapter", folders / "b_hf"], tmp_path / "out",
          "--layout", "transformers")  # fmt: skip
    assert ("names no base; it is merged into --base" in capsys.readouterr().out) != names_base
    out = read_state(tmp_path / "out")
    expected = merge_in_torch(states[0][Q_PROJ], adapted, states[2][Q_PROJ], 2.0).numpy()
    np.testing.assert_allclose(out[Q_PROJ], expected, rtol=0, atol=1e-6)
    # A tensor without an adapter has the other model's move, whole.
    key = "model.language_model.norm.weight"
    np.testing.assert_allclose(out[key], states[2][key], rtol=0, atol=1e-7)


def test_an_adapter_of_another_base_is_refused(states, folders, tmp_path, capsys):
    other = dict(states[0])
    other[VISION] = other[VISION] + np.float32(1)
    write_checkpoint(tmp_path / "other", other, "transformers")
    save_random_adapter(tmp_path / "adapter", other, tmp_path / "other")
    models = [tmp_path / "adapter", folders / "b_hf"]
    refuse(capsys, folders / "base_hf", models, tmp_path / "out",
           "vision_model/post_layernorm/scale",
           ["--params", "(language_model|lm_head)/.*"])  # fmt: skip


def test_adapters_that_peft_computes_in_another_way_are_refused(states, folders, tmp_path, capsys):
    save_random_adapter(tmp_path / "adapter", states[0], None)
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"use_dora": True, "use_rslora": True, "r": 0}))
    models = [tmp_path / "adapter", folders / "b_hf"]
    error = refuse(capsys, folders / "base_hf", models, tmp_path / "out", "use_dora is True")
    assert "use_rslora is True" in error and "r is 0" in error
    file.write_text(json.dumps(settings | {"r": 4}))
    refuse(capsys, folders / "base_hf", models, tmp_path / "out", "lora_A.weight has shape [2, 48]")
    file.write_text(json.dumps(settings))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = next(iter(tensors))
    save_file(tensors | {key.replace("lora_A", "lora_C"): tensors[key]},
              tmp_path / "adapter" / "adapter_model.safetensors")  # fmt: skip
    refuse(capsys, folders / "base_hf", models, tmp_path / "out", "lora_C")


# ---- refusals


def refuse(
    capsys, base: Path, models: list[Path], out: Path, part: str, options: list[str] = ()
) -> str:  # fmt: skip
    """The command ends with exit code 2, names `part` and leaves nothing beside its inputs."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(SystemExit) as ended:
        merge(base, models, out, *options)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and part in error, error
    assert sorted(out.parent.iterdir()) == before
    return error


def change(state: State, key: str) -> State:
    value = state[key].copy()
    value.reshape(-1)[3] += 1
    return state | {key: value}


def test_image_tokenizers_must_be_the_base_s_unless_they_are_named(
    states, folders, tmp_path, capsys
):
    write_checkpoint(tmp_path / "a", change(states[1], CODEBOOK), "transformers")
    models = [tmp_path / "a", folders / "b_hf"]
    error = refuse(capsys, folders / "base_hf", models, tmp_path / "out", "vqmodel/quantize")
    assert "--params" in error and str(tmp_path / "a") in error
    merge(folders / "base_hf", models, tmp_path / "out", "--params", ".*")
    expected = change(states[0], CODEBOOK)[CODEBOOK]
    np.testing.assert_array_equal(read_state(tmp_path / "out")[CODEBOOK], expected)


def test_moves_outside_of_params_are_refused(states, folders, tmp_path, capsys):
    write_checkpoint(tmp_path / "a", change(states[1], VISION), "transformers")
    models = [tmp_path / "a", folders / "b_hf"]
    options = ["--params", "(language_model|lm_head)/.*"]
    error = refuse(capsys, folders / "base_hf", models, tmp_path / "out",
                   "vision_model/post_layernorm/scale is outside of --params", options)  # fmt: skip
    assert error.count("error:") == 1
    options = ["--params", "lm_head/.*"]
    refuse(capsys, folders / "base_hf", models[::-1], tmp_path / "out", Q_NAME.rstrip("1"), options)
    # Without --params only what is trained by default may differ.
    refuse(capsys, folders / "base_hf", models, tmp_path / "out",
           "vision_model/post_layernorm/scale is frozen by default in a training of a")  # fmt: skip
    merge(folders / "base_hf", models, tmp_path / "out", "--params", ".*")
    expected = change(states[0], VISION)[VISION]
    np.testing.assert_array_equal(read_state(tmp_path / "out")[VISION], expected)


@pytest.mark.parametrize(
    ("pattern", "part"), [("language/.*", "matches no parameter path"), ("(", "no regular expr")]
)
def test_params_must_match(folders, tmp_path, capsys, pattern, part):
    models = [folders / "a_hf", folders / "b_hf"]
    refuse(capsys, folders / "base_hf", models, tmp_path / "out", part, ["--params", pattern])


def test_carried_tensors_must_be_the_base_s(states, folders, tmp_path, capsys):
    carried = change(carried_state(np.dtype(np.float32)), "gen_vision_model.quantize.codebook_used")
    write_checkpoint(tmp_path / "a", to_original(states[1]) | carried, "original")
    models = [tmp_path / "a", folders / "b_hf"]
    refuse(capsys, folders / "base_original", models, tmp_path / "out", "codebook_used differs")


def test_another_tokenizer_is_refused(states, folders, tmp_path, capsys):
    write_checkpoint(tmp_path / "a", states[1], "transformers")
    file = tmp_path / "a" / "tokenizer.json"
    data = json.loads(file.read_text())
    words = data["model"]["vocab"]
    first, second, *_ = words
    words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(data))
    models = [folders / "b_hf", tmp_path / "a"]
    refuse(capsys, folders / "base_hf", models, tmp_path / "out", "its vocabulary differ from")


def test_damaged_and_foreign_models_are_refused(states, folders, tmp_path, capsys):
    base, out = folders / "base_hf", tmp_path / "out"

    def refuse_model(state: State, part: str) -> None:
        write_checkpoint(tmp_path / "a", state, "transformers")
        refuse(capsys, base, [tmp_path / "a", folders / "b_hf"], out, part)

    missing = {key: value for key, value in states[1].items() if key != Q_PROJ}
    refuse_model(missing, f"{Q_PROJ} is missing")
    refuse_model(states[1] | {Q_PROJ: np.zeros((48, 47), np.float32)}, f"{Q_PROJ} has shape")
    refuse_model(states[1] | {"extra.weight": np.zeros(3, np.float32)}, "extra.weight is unknown")
    broken = states[1][Q_PROJ].copy()
    broken[0, 1] = np.nan
    refuse_model(states[1] | {Q_PROJ: broken}, f"{Q_NAME}: 1 of 2304 values are NaN or infinite")
    # Half downloaded.
    file = write_checkpoint(tmp_path / "a", states[1], "transformers") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refuse(capsys, base, [tmp_path / "a", folders / "b_hf"], out, "its header promises")
    # Another number of layers.
    config = hf_config_dict()
    config["text_config"]["num_hidden_layers"] = 2
    write_checkpoint(tmp_path / "a", states[1], "transformers")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    state = {key: v for key, v in states[1].items() if "language_model.layers.2" not in key}
    save_file(state, tmp_path / "a" / "model.safetensors")
    refuse(capsys, base, [tmp_path / "a", folders / "b_hf"], out,
           "llama.num_layers is 2, expected 3 as in the base")  # fmt: skip


def test_arguments_are_checked_before_any_file_is_read(folders, tmp_path, capsys):
    base, a, b = (folders / f"{name}_hf" for name in ("base", "a", "b"))
    out = tmp_path / "out"
    refuse(capsys, base, [a, b, a], out, "--models: found 3, expected 2 with --rule gaussian")
    refuse(capsys, base, [a], out, "found 1, expected two or more with --rule ties",
           ["--rule", "ties"])  # fmt: skip
    refuse(capsys, base, [a, b], out, "0 is not a positive number", ["--lambda", "0"])
    refuse(capsys, base, [a, b], out, "layout 'hf': a janus network is", ["--layout", "hf"])
    refuse(capsys, base, [a, b], base, "holds files")
    refuse(capsys, base, [a, b], base, "is a model to read", ["--overwrite"])
    refuse(capsys, base, [a, b], folders, "holds a model to read", ["--overwrite"])
    assert read_state(base).keys()


def test_an_output_is_replaced_whole_or_stays(folders, tmp_path, capsys, monkeypatch):
    models = [folders / "a_hf", folders / "b_hf"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("corl_jax.merge.command.make_report", fail)
        refuse(capsys, folders / "base_hf", models, tmp_path / "out", "No space left",
               ["--overwrite"])  # fmt: skip
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["old"]
    merge(folders / "base_hf", models, tmp_path / "out", "--overwrite")
    assert (tmp_path / "out" / "merge_report.json").is_file()
    assert not (tmp_path / "out" / "old").exists()


# ---- memory, and a model that is used


def test_memory_is_that_of_one_tensor_and_not_of_a_model(tmp_path, merged, monkeypatch):
    """Three models of 50 MB each, of which the largest tensor has 1 MB."""
    config = hf_config_dict()
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    config["text_config"] |= sizes | {"num_attention_heads": 4, "num_key_value_heads": 4}
    config["vision_config"]["projection_dim"] = 256
    config["vq_config"] |= {"projection_dim": 256, "image_token_embed_dim": 256}
    write_checkpoint(tmp_path / "small", random_state(hf_shapes()), "transformers")
    from corl_jax.policies.janus.checkpoint.transformers import parse

    problems: list[str] = []
    parsed = parse(config, "test", problems)
    for number, name in enumerate(("base", "a", "b")):
        shapes = KIND.shapes(parsed)
        moves = {path: number * path.startswith("lm_head") for path in shapes}
        flat = {path: np.full(shapes[path], 0.5 + move, "f4") for path, move in moves.items()}
        save_checkpoint(tmp_path / name, KIND, parsed, unflatten(flat), layout="transformers",
                        assets_from=tmp_path / "small")  # fmt: skip
    del flat
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert not problems and size > 45e6
    # A JSON file is read into a buffer of this size, which is never filled.
    monkeypatch.setattr(storage, "MAX_JSON_BYTES", 2**20)
    # NumPy reports its arrays to it. `merged` has imported all modules before.
    tracemalloc.start()
    try:
        for rule in ("gaussian", "ties"):
            merge(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / rule,
                  "--rule", rule)  # fmt: skip
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6, f"{peak:,}"


def test_a_merged_model_loads(tmp_path):
    base = load_params(SHIPPED["nano"], KIND)
    sizes = load_config(SHIPPED["nano"], KIND)
    for seed, name in enumerate(("a", "b")):
        draw = np.random.default_rng(seed)
        flat = {
            path: leaf + draw.standard_normal(leaf.shape).astype(leaf.dtype) * leaf.dtype.type(0.01)
            if path.startswith("language_model/")
            else leaf
            for path, leaf in flatten(base).items()
        }
        save_checkpoint(tmp_path / name, KIND, sizes, unflatten(flat), layout="jax",
                        assets_from=SHIPPED["nano"])  # fmt: skip
    merge("nano", [tmp_path / "a", tmp_path / "b"], tmp_path / "out", "--dtype", "float32")
    model = corl_jax.load(tmp_path / "out")
    assert model is not None
    flat, old = flatten(load_params(tmp_path / "out", KIND)), flatten(base)
    for path, leaf in flat.items():
        same = np.array_equal(leaf, np.asarray(old[path], np.float32))
        assert same != path.startswith("language_model/"), path


# ---- a Show-o, whose tokenizer and image tokenizer have folders of their own


@pytest.fixture
def show_o(tmp_path):
    """Returns the folder of a Show-o and that of an equal one."""
    return [shutil.copytree(NANO_SHOW_O, tmp_path / name) for name in "ab"]


def test_the_tokenizer_of_a_show_o_is_compared(show_o, tmp_path, capsys):
    base, other = show_o
    file, out = other / "phi-1_5" / "tokenizer.json", tmp_path / "out"
    tokenizer = json.loads(file.read_text())
    first, *rest = tokenizer["added_tokens"]
    file.write_text(json.dumps(tokenizer | {"added_tokens": rest}))  # none has another id
    assert not _find_token_problems(base / "phi-1_5", file.parent, [])
    for changed in ({"id": first["id"] + 1000}, {"id": [1]}, {"content": "<|other|>"}):
        file.write_text(json.dumps(tokenizer | {"added_tokens": [first | changed, *rest]}))
        refuse(capsys, base, [other, base], out, "phi-1_5/tokenizer.json: its added tokens differ")
    for key, value in (("added_tokens", 3), ("model", {"merges": 3}), ("model", {"merges": [1]})):
        file.write_text(json.dumps(tokenizer | {key: value}))
        refuse(capsys, base, [other, base], out, "not a usable tokenizer.json")


def test_no_part_of_a_model_is_replaced(show_o, tmp_path, capsys):
    base, other = show_o
    for part in ("magvitv2", "phi-1_5"):
        out = other / part
        refuse(capsys, base, [other, base], out, "or a part of it", ["--overwrite"])
        with pytest.raises(SystemExit):
            convert(["to-jax", str(other), str(out), "--overwrite"])
        assert "or a part of it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert(["to-jax", str(other), str(tmp_path), "--overwrite"])
    assert "holds a model to read" in capsys.readouterr().err
    assert convert(["verify", str(base), str(other)]) == 0
