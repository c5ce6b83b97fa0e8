"""The generate command end to end on a tiny checkpoint, its batches and its refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import corl_jax
from corl_jax import generate, inference, policies
from corl_jax.data import questions
from corl_jax.devices import startup
from corl_jax.errors import InputError, Problems
from corl_jax.params import leaf_paths, map_with_path
from corl_jax.policies import batched, inspect_policy, load_policy, turns
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.family import SamplingOptions
from corl_jax.policies.janus import network
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.images import decode_images
from corl_jax.policies.janus.prompts import Processor
from corl_jax.serve.engine import Engine
from corl_jax.serve.requests import ApiError, read_image_request
from corl_jax.tasks import TASKS
from corl_jax.types import EncodedPrompts
from corl_jax.weights.checkpoint import load_params
from corl_jax.weights.export import save_checkpoint
from tests.support import tiny_flow
from tests.support.tiny_models import encode, encode_prompts, tiny_image, tiny_tokenizer_dir

pytestmark = pytest.mark.usefixtures("exact_products")

LONG = "a red circle left of the yellow shape " * 4  # takes a longer bucket than the others
PROMPTS = ["a red circle", LONG, "two blue squares"]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def config(tiny_config):
    """Two layers, room for the tokenizer, and sizes that transformers' class can express."""
    llama = dataclasses.replace(tiny_config.llama, num_layers=2, vocab_size=400)
    vq = dataclasses.replace(tiny_config.vq, channel_multiplier=(1, 1, 1))
    return dataclasses.replace(tiny_config, llama=llama, vq=vq, image_token_embed=32)


@pytest.fixture(scope="module")
def model_dir(config, tmp_path_factory):
    """A checkpoint of our own layout, whose answers end after a few tokens or not at all."""
    folder = tmp_path_factory.mktemp("models") / "jax"
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = 0.15 * rng.standard_normal(leaf.shape).astype(np.float32)
        return noise + 1 if path.endswith("/scale") else noise

    params = map_with_path(draw, network.abstract(config))
    files = tiny_tokenizer_dir(folder.parent / "tokenizer", image_size=16, patch_size=4)
    params["lm_head"]["kernel"][:, Processor.from_dir(files).special.eos] *= 12
    save_checkpoint(folder, KIND, config, params, layout="jax")
    shutil.copytree(files, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def processor(model_dir):
    return Processor.from_dir(model_dir)


def run(*arguments) -> None:
    generate.main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    """What the command says when it exits with code 2, on one line."""
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- images


@pytest.fixture(scope="module")
def drawn(model_dir, tmp_path_factory):
    """Three prompts of two lengths, two samples each, and the folder they are in."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "  ", ""]))
    with jax.default_matmul_precision("highest"):
        run("image", "--model", model_dir, "--prompts", folder / "prompts.txt",
            "--out", folder / "out", "--images-per-prompt", 2, "--seed", 7)  # fmt: skip
    return folder / "out"


def test_images_and_their_lines(drawn, model_dir, config):
    records = lines_of(drawn / "samples.jsonl")
    places = [(row["index"], row["sample"]) for row in records]
    assert places == [(prompt, number) for prompt in range(3) for number in range(2)]
    assert [row["prompt"] for row in records[::2]] == [prompt.strip() for prompt in PROMPTS]
    assert {row["seed"] for row in records} == {7}
    assert {p.name for p in drawn.iterdir()} == {
        "samples.jsonl", "grid.png", *(row["file"] for row in records),
    }  # fmt: skip
    tokens = np.asarray([row["tokens"] for row in records], np.int32)
    assert tokens.shape == (6, config.num_image_tokens)
    assert len(np.unique(tokens, axis=0)) == 6
    decoded = np.asarray(decode_images(config, load_params(model_dir, KIND), tokens))
    for row, expected in zip(records, decoded, strict=True):
        found = np.asarray(Image.open(drawn / row["file"]))
        assert found.shape == expected.shape == (16, 16, 3)
        # The decoder's own chunks differ, so a value next to an integer may fall to either side.
        assert np.abs(found.astype(int) - expected).max() <= 1
    with Image.open(drawn / "grid.png") as grid:
        assert grid.width > 2 * 16 and grid.height > 3 * 16


def test_images_do_not_depend_on_the_batch(drawn, model_dir, tmp_path):
    run("image", "--model", model_dir, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1].strip(),
        "--prompt", PROMPTS[2], "--out", tmp_path / "out", "--images-per-prompt", 2, "--seed", 7,
        "--batch-size", 1)  # fmt: skip
    assert lines_of(tmp_path / "out" / "samples.jsonl") == lines_of(drawn / "samples.jsonl")


def test_greedy_images_are_transformers_own(model_dir, processor, tmp_path):
    """The checkpoint exported, read by transformers' class, drawn by its generate."""
    torch = pytest.importorskip("torch")
    from transformers import JanusForConditionalGeneration

    exported = tmp_path / "exported"
    model = load_policy(model_dir)
    save_checkpoint(
        exported, KIND, model.sizes, model.params, layout="transformers", assets_from=model_dir
    )
    run("image", "--model", exported, "--prompt", PROMPTS[0], "--prompt", PROMPTS[2],
        "--out", tmp_path / "out", "--greedy")  # fmt: skip
    found = [row["tokens"] for row in lines_of(tmp_path / "out" / "samples.jsonl")]

    model = JanusForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    encoded = encode_prompts(processor, [PROMPTS[0], PROMPTS[2]])
    try:
        expected = model.generate(
            torch.from_numpy(encoded.input_ids),
            attention_mask=torch.from_numpy(encoded.attention_mask).long(),
            generation_mode="image", do_sample=False,
        )  # fmt: skip
    except TypeError as error:
        if "prefill_chunk_size" not in str(error):
            raise
        pytest.skip("this version of transformers cannot generate images with Janus")
    assert found == expected.tolist()


def test_bfloat16(model_dir, tmp_path):
    run("image", "--model", model_dir, "--prompt", PROMPTS[0], "--out", tmp_path / "new" / "out",
        "--dtype", "bfloat16", "--cfg-scale", 1)  # fmt: skip
    assert len(lines_of(tmp_path / "new" / "out" / "samples.jsonl")) == 1


# ---- texts


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Three questions about two pictures in a folder beside the file."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "pictures").mkdir()
    tiny_image(0).save(folder / "pictures" / "a.png")
    (folder / "pictures" / "b.jpg").write_bytes(encode(tiny_image(1, (20, 30)), "JPEG"))
    rows = [
        {"image": "pictures/a.png", "question": "how many squares?"},
        {"image": "pictures/b.jpg", "question": LONG + "?"},
        {"image": "pictures/a.png", "question": "left of what?", "id": 7, "note": ["kept", None]},
    ]
    file = folder / "cases.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_texts_and_their_lines(cases, model_dir, processor, capsys, tmp_path):
    options = ["text", "--model", model_dir, "--input", cases, "--samples", 2,
               "--max-new-tokens", NEW_TOKENS, "--seed", 3]  # fmt: skip
    run(*options)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    asked = lines_of(cases)
    assert [(row["index"], row["sample"]) for row in records] == [
        (prompt, number) for prompt in range(3) for number in range(2)
    ]
    for row in records:
        assert {**row, **asked[row["index"]]} == row  # keys that are not read are passed through
        assert row["text"] == processor.decode(row["tokens"])
        assert len(row["tokens"]) <= NEW_TOKENS
        assert row["tokens"].count(processor.special.eos) == (not row["truncated"])
        if not row["truncated"]:
            assert row["tokens"][-1] == processor.special.eos
            assert row["text"] == processor.decode(row["tokens"][:-1])
    assert {row["truncated"] for row in records} == {True, False}
    assert len({tuple(row["tokens"]) for row in records}) > 4

    run(*options, "--batch-size", 1, "--out", tmp_path / "answers.jsonl")
    assert capsys.readouterr().out == ""
    assert lines_of(tmp_path / "answers.jsonl") == records
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]


def test_one_question_in_its_own_process(cases, model_dir, tmp_path):
    picture = cases.parent / "pictures" / "a.png"
    command = [sys.executable, "-m", "corl_jax.generate", "text", "--model", model_dir,
               "--image", picture, "--question", "how many squares?", "--greedy",
               "--max-new-tokens", NEW_TOKENS, "--system-prompt", "Count."]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]

    model = load_policy(model_dir, jnp.float32)
    greedy = SamplingOptions(
        model.processor.special, greedy=True, max_new_tokens=NEW_TOKENS, dtype=jnp.float32
    )
    (sample,) = batched.answer_questions(
        model, ["how many squares?"], lambda _: Image.open(picture), greedy,
        system_prompt="Count.",
    )  # fmt: skip
    tokens = sample.tokens.tolist()
    assert row["tokens"] == tokens
    assert row["image"] == str(picture)


def test_greedy_takes_options_that_change_nothing(cases, model_dir, tmp_path, capsys):
    picture = cases.parent / "pictures" / "a.png"
    run("text", "--model", model_dir, "--image", picture, "--question", "what?", "--greedy",
        "--max-new-tokens", NEW_TOKENS, "--samples", 3, "--temperature", 1, "--top-k", 0,
        "--top-p", 1)  # fmt: skip
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2]
    assert rows[0]["tokens"] == rows[1]["tokens"] == rows[2]["tokens"]
    assert "note: --greedy makes the 3 texts of a prompt equal" in err

    folder = tmp_path / "out"
    run("image", "--model", model_dir, "--prompt", PROMPTS[0], "--out", folder, "--greedy",
        "--temperature", 1, "--images-per-prompt", 2)  # fmt: skip
    first, second = (folder / generate.name_image(0, number) for number in range(2))
    assert first.read_bytes() == second.read_bytes()
    assert "note: --greedy makes the 2 images" in capsys.readouterr().err


# ---- refusals


@pytest.fixture
def no_device_work(monkeypatch):
    def fail(*_):
        raise AssertionError("the weights were loaded before the input was checked")

    monkeypatch.setattr(policies, "load_policy", fail)


@pytest.mark.usefixtures("no_device_work")
def test_image_problems_are_told_together(model_dir, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("")
    (tmp_path / "empty.txt").write_text(" \n\n")
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    said = refused(
        capsys, "image", "--model", tmp_path / "model", "--prompts", tmp_path / "empty.txt",
        "--out", tmp_path / "out", "--images-per-prompt", 0, "--batch-size", -1, "--seed", -1,
        "--temperature", 0, "--cfg-scale", "nan", "--greedy",
    )  # fmt: skip
    for expected in (
        "--batch-size: found -1; expected a whole number at least 1",
        "--images-per-prompt: found 0",
        "--seed: found -1; expected a whole number at least 0 and at most 4294967295",
        "--temperature: found 0.0; expected a number above 0; give --greedy in its place",
        "--temperature: found 0, which --greedy would ignore",
        "--cfg-scale: found nan",
        f"--out {tmp_path / 'out'}: holds files",
        "empty.txt: found no line with text",
        "tokenizer.json: not found",
    ):
        assert expected in said
    assert said.count("error: ") == 9
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["kept.txt"]


@pytest.mark.usefixtures("no_device_work")
def test_text_problems_are_told_together(cases, model_dir, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    rows = [
        '{"image": "nowhere.png", "question": "what?"}',
        '{"image": "broken.png", "question": "what?"}',
        '{"image": 3, "question": " ", "text": "x"}',
        "[1]",
        "{",
    ]
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    said = refused(
        capsys, "text", "--model", model_dir, "--input", tmp_path / "bad.jsonl",
        "--max-new-tokens", 0, "--top-p", 1.5, "--top-k", -2, "--out", tmp_path / "bad.jsonl",
        "--greedy",
    )  # fmt: skip
    for expected in (
        "--max-new-tokens: found 0",
        "--top-p: found 1.5; expected a number above 0 and at most 1",
        "--top-k: found -2",
        "--top-k: found -2, which --greedy would ignore; leave one of them out, or set 0",
        "--top-p: found 1.5, which --greedy would ignore",
        "bad.jsonl: exists; name a new file",
        "line 1: ", "nowhere.png: No such file",
        "line 2: ", "broken.png",
        "line 3: text is a key of the output", "line 3: image is 3", "line 3: question is ' '",
        "line 4: found a list",
        "line 5: not valid JSON",
    ):  # fmt: skip
        assert expected in said

    assert "give --image FILE and --question TEXT" in refused(capsys, "text", "--model", model_dir)
    both = ["--input", cases, "--image", "a.png"]
    assert "--input: has its own" in refused(capsys, "text", "--model", model_dir, *both)


@pytest.mark.usefixtures("no_device_work")
def test_half_characters_are_refused_with_their_line(cases, model_dir, tmp_path, capsys):
    picture = cases.parent / "pictures" / "a.png"
    row = {"image": str(picture), "question": "what?"}
    rows = [row, row | {"question": "what \ud83d?"}, row | {"id": ["\udc00"]}, row | {"\ud83d": 1}]
    file = tmp_path / "halves.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    said = refused(capsys, "text", "--model", model_dir, "--input", file, "--max-new-tokens", 8)
    assert said.count("error: ") == 3
    for part in ("line 2: question holds", "line 3: id holds", "line 4: \\ud83d holds"):
        assert part in said
    for option, other in (("--question", "--image"), ("--system-prompt", "--input")):
        arguments = [other, picture if other == "--image" else cases, option, "what \udcff?"]
        said = refused(capsys, "text", "--model", model_dir, "--max-new-tokens", 8, *arguments)
        assert f"{option}: holds a lone surrogate" in said and said.count("error: ") == 1
    said = refused(
        capsys, "image", "--model", model_dir, "--out", tmp_path / "out", "--prompt", "a \ud83d"
    )
    assert "--prompt: number 1: holds a lone surrogate" in said and said.count("error: ") == 1


def test_files_with_a_byte_order_mark_are_read(cases, tmp_path):
    text = "\ufeff" + cases.read_text(encoding="utf-8")
    (tmp_path / "cases.jsonl").write_text(text, encoding="utf-8")
    problems = Problems()
    found = questions.read_questions(tmp_path / "cases.jsonl", "--input", (), problems)
    assert [case.row for case in found] == lines_of(cases) and not problems
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\n\r\ntwo\n")
    prompts = questions.read_prompts(tmp_path / "prompts.txt", "--prompts", problems)
    assert prompts == ["a red circle", "two"] and not problems
    (tmp_path / "latin.txt").write_bytes("Stra\xdfe".encode("latin-1"))
    questions.read_prompts(tmp_path / "latin.txt", "--prompts", problems)
    (problem,) = problems
    assert "latin.txt: is not UTF-8 at byte 4" in problem


def test_a_record_is_one_line_for_every_reader(monkeypatch, capsys):
    """Some split lines at more characters than the line feed; a console may lack some."""
    records = {
        (0, 0): {"text": "a\u2028b\u2029c\x85d\x0be \u4e2d \U0001f600"},
        (0, 1): {"text": "x"},
    }
    text = generate.format_records(records)
    assert len(text.splitlines()) == 2 and "\u4e2d" in text
    assert [json.loads(line) for line in text.splitlines()] == list(records.values())
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", newline="")
    monkeypatch.setattr(sys, "stdout", stream)
    generate.write_text(None, records)
    stream.flush()
    lines = stream.buffer.getvalue().decode("ascii").splitlines()
    assert [json.loads(line) for line in lines] == list(records.values())


def test_a_plain_question_is_asked_as_the_checkpoint_states(cases, model_dir, tmp_path, capsys):
    """And only its own values count: what is asked, and how it is sampled."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    stated = {"question_instruction": "open", "max_new_tokens": 5, "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    parse = generate.build_parser().parse_args
    base = ["text", "--model", str(folder), "--input", str(cases)]
    args = parse(base)
    with pytest.raises(InputError, match="tokens; expected at most"):
        generate.check_text(args)  # the instruction is too long for this tiny model
    assert (args.max_new_tokens, args.temperature, args.instruction) == (5, 0.5, "open")
    args = parse([*base, "--instruction", "none", "--max-new-tokens", "6", "--top-k", "3"])
    found = generate.check_text(args)
    assert inference.format_question(args, found[0]) == "how many squares?"
    assert (args.max_new_tokens, args.top_k, args.temperature) == (6, 3, 0.5)
    args.instruction = "choice"
    assert "option letter" in inference.format_question(args, found[0])
    (folder / "generation_config.json").write_text('{"guidance_scale": "x"}')
    said = refused(capsys, *base, "--max-new-tokens", 5)
    assert said.count("error: ") == 1 and "guidance_scale is 'x'" in said


@pytest.mark.usefixtures("no_device_work")
def test_prompts_that_do_not_fit_the_model(model_dir, tmp_path, capsys):
    prompts = ["--prompt", "a circle", "--prompt", LONG * 8, "--prompt", ""]
    said = refused(capsys, "image", "--model", model_dir, "--out", tmp_path / "out", *prompts)
    assert "prompt 1: found" in said and "expected at most 240" in said
    assert "--prompt: number 3 is empty" in said
    assert "prompt 0" not in said


@pytest.mark.usefixtures("no_device_work")
def test_answers_that_do_not_fit_the_model(cases, model_dir, capsys):
    asked = ["text", "--model", model_dir, "--input", cases, "--max-new-tokens"]
    said = refused(capsys, *asked, 2000)
    assert "--max-new-tokens: found 2000; expected less than 240: of the model's 256" in said
    assert said.count("error: ") == 1


def test_files_of_another_model(model_dir, tmp_path):
    """Pictures of another size, and more tokens than the network embeds."""
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    tiny_tokenizer_dir(other, image_size=32, patch_size=4)
    with pytest.raises(InputError, match="image size is 32") as error:
        inspect_policy(other)
    assert len(error.value.problems) == 2

    shutil.copytree(model_dir, other, dirs_exist_ok=True)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"vocab_size": 400', '"vocab_size": 40'))
    with pytest.raises(InputError, match="the network embeds 40"):
        inspect_policy(other)


def test_help_tells_every_default(capsys):
    for command in ("image", "text"):
        with pytest.raises(SystemExit) as exit_:
            run(command, "--help")
        assert exit_.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        for option in ("number of samples generated at once (default 16)", "(default 1)"):
            assert option in said


# ---- batches


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16, 100])
@pytest.mark.parametrize("samples", [1, 2, 5, 20])
def test_pieces_hold_every_sample_once_in_one_shape_a_length(samples, batch_size):
    lengths = [32, 64, 32, 32, 96, 64, 32, 32, 32]
    planned = list(batched.split_in_pieces(lengths, samples, batch_size))
    found = Counter(
        (prompt, piece.first + g)
        for piece in planned
        for prompt in piece.prompts
        for g in range(piece.group)
        if piece.first + g < samples
    )
    assert set(found.values()) == {1} and len(found) == len(lengths) * samples
    assert all(lengths[i] == piece.length for piece in planned for i in piece.prompts)
    assert all(piece.rows * piece.group <= batch_size for piece in planned)
    shapes = {(piece.length, piece.rows, piece.group) for piece in planned}
    assert len(shapes) == 3
    assert all(len(piece.prompts) <= piece.rows for piece in planned)


def test_keys_of_a_piece_are_those_of_the_whole():
    """Samples 2 to 5 of two prompts in a call of three."""
    whole = jax.random.key_data(sample_keys(5, np.arange(4), 6)).reshape(4, 6, -1)
    prompts = EncodedPrompts(np.array([[1], [3]]), np.ones((2, 1), bool))

    def sampler(params, prompts, keys):
        return prompts.input_ids, jax.random.key_data(keys)

    rollout = turns.sample_turn(
        sampler, {}, prompts, [1, 3], seed=5, stream=TASKS["t2i"].stream, group_size=4, first=2,
        fill_to=3,
    )  # fmt: skip
    ids, found = rollout.segments
    np.testing.assert_array_equal(ids[:, 0], [1, 3, 3])
    np.testing.assert_array_equal(found.reshape(3, 4, -1), whole[[1, 3, 3], 2:6])


# ---- start


def test_compilation_cache_is_where_and_as_the_user_says(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        startup.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == before
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.2
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)  # JAX's own
        startup.enable_compilation_cache()
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 1, "the environment has it"
        monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
        startup.enable_compilation_cache()
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        jax.config.update("jax_compilation_cache_dir", None)
        startup.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "corl_jax" / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def test_load_policy_casts_all_but_the_image_tokenizer(model_dir):
    model = load_policy(model_dir, jnp.bfloat16)
    kinds = {path: leaf.dtype for path, leaf in leaf_paths(model.params)}
    assert all(
        dtype == (jnp.float32 if path.startswith("vqmodel/") else jnp.bfloat16)
        for path, dtype in kinds.items()
    )
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.params))


def test_options_that_a_model_does_not_read_are_refused(model_dir, tmp_path, capsys):
    """A Janus has no steps to choose, and images by denoising have no token to choose."""
    flow = tiny_flow.model_dir(tmp_path / "flow")
    given = {
        model_dir: ("--image-steps", 4),
        flow: ("--image-steps", 4, "--temperature", 0.5),
    }
    for folder, options in given.items():
        message = refused(
            capsys, "image", "--model", folder, "--prompt", "a", "--out", tmp_path / "x", *options
        )
        if folder == model_dir:
            assert "--image-steps: found 4; a janus draws the codes of images one by" in message
        else:
            assert "--temperature: found 0.5; a janus_flow makes images by denoising" in message
            assert "image-steps" not in message
    message = refused(
        capsys, "image", "--model", flow, "--prompt", "a", "--out", tmp_path / "x",
        "--temperature", 0, "--cfg-scale", 1e308,
    )  # fmt: skip
    assert "--temperature: found 0.0; a janus_flow makes images" in message
    assert "greedy" not in message, "which a JanusFlow would refuse"
    assert "--cfg-scale: found 1e+308; expected a number that float32 holds, of 1.2e-38" in message
    loaded = corl_jax.load(flow, dtype="float32")
    for temperature in (1e39, 1e-39):
        with pytest.raises(InputError, match=r"temperature: .* that float32 holds"):
            loaded.generate_images("a", think=True, temperature=temperature)
    with pytest.raises(InputError, match="greedy: a janus_flow makes"):
        loaded.generate_images("a", greedy=True)
    engine = Engine(loaded.policy, jnp.dtype("float32"), batch_size=1)
    for temperature, text in ((0, "temperature 0: a janus_flow"), (0.5, "temperature: found 0.5")):
        request = {"prompt": "a", "temperature": temperature}
        with pytest.raises(ApiError, match=text) as error:
            engine.prepare_images(read_image_request(request, 16))
        assert (error.value.status, error.value.param) == (400, "temperature")


@pytest.mark.parametrize(
    ("family", "given", "keys"),
    [
        ("janus", {"temperature": 0.5, "greedy": False}, []),
        ("show_o", {"image_steps": 3, "temperature": 0.5}, []),
        ("janus_flow", {"image_steps": 3, "temperature": 1.0, "greedy": False}, []),
        ("janus_flow", {"temperature": 0.5, "greedy": True}, ["temperature", "greedy"]),
        ("janus", {"image_steps": 3}, ["image_steps"]),
    ],
)
def test_each_family_reads_its_own_options_of_images(family, given, keys):
    options = {"image_steps": None, "temperature": None, "greedy": None, "think": False} | given
    model = SimpleNamespace(family=policies.FAMILIES[family])
    problems = inference.find_unread_image_options(model, SimpleNamespace(**options), str)
    assert [problem.partition(":")[0] for problem in problems] == keys
