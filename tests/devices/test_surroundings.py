"""What a machine may lack: a home, UTF-8, the devices asked for, JAX's usual settings, glyphs."""

from __future__ import annotations

import argparse
import ast
import fnmatch
import io
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image, ImageFont

from corl_jax import console, generate, inference
from corl_jax.devices import startup
from corl_jax.errors import InputError
from corl_jax.evaluate import __main__ as evaluate
from corl_jax.evaluate import shapes as shapes_command
from corl_jax.evaluation import shapes
from corl_jax.fonts import make_drawable
from corl_jax.input_files import parse_path, parse_place
from corl_jax.plan import __main__ as plan
from corl_jax.runs import pictures
from corl_jax.train import __main__ as train

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("corl_jax", "tools") for path in (ROOT / folder).rglob("*.py")
           if path.parent.name != "peer"]  # which runs where only PyTorch is  # fmt: skip

# ---- no home


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """As for a user of a container that only has a number; and the usual cache is looked for."""
    before = jax.config.jax_compilation_cache_dir

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_without_a_home_programs_are_not_kept_and_one_line_says_so(homeless, capsys):
    startup.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "compiled programs are not kept" in line and "JAX_COMPILATION_CACHE_DIR" in line


def test_cache_that_cannot_be_written_is_not_used(homeless, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    startup.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert "Not a directory" in capsys.readouterr().err


def test_the_users_cache_folder_is_expanded(homeless, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CORL_PLACE", str(tmp_path))
    for chosen, used in (("$CORL_PLACE/x", f"{tmp_path}/x"), ("gs://b/x", "gs://b/x"), ("", "")):
        jax.config.update("jax_compilation_cache_dir", chosen)
        startup.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == used
    jax.config.update("jax_compilation_cache_dir", "~/x")
    startup.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert "home directory of `~` is not known" in capsys.readouterr().err


# ---- consoles


def printed_in_latin(monkeypatch, function, *arguments):
    """What a function prints on a console in Latin-1."""
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        function(*arguments)
    stream.flush()
    return stream.buffer.getvalue()


def test_help_is_printed_where_the_console_is_not_utf_8(monkeypatch):
    def print_help():
        with pytest.raises(SystemExit) as error:
            train.main(["--help"])
        assert error.value.code == 0

    assert rb"integer \u2265 0" in printed_in_latin(monkeypatch, print_help)


def test_json_stays_json_where_the_console_is_not_utf_8(monkeypatch):
    record = {"text": "Bäume 木 😀"}
    line = json.dumps(record, ensure_ascii=False) + "\n"
    written = printed_in_latin(monkeypatch, console.write_json_lines, line)
    assert json.loads(written.decode("ascii")) == record


def test_json_is_as_written_where_the_console_is_utf_8(capsys):
    console.write_json_lines('{"text": "木"}\n')
    assert capsys.readouterr().out == '{"text": "木"}\n'


def test_an_error_handling_that_the_user_chose_stays(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1", errors="replace")
    monkeypatch.setattr(sys, "stdout", stream)
    console.escape_unprintable_text()
    assert stream.errors == "replace"


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def test_every_command_ends_with_lines_and_prints_any_text():
    """By the decorator of its main, or of the function `run` that its main calls."""
    commands = {path: found for path in SOURCES if "main" in (found := functions_of(path))}
    # Which runs one of the others.
    commands = {path: found for path, found in commands.items() if path.name != "cli.py"}
    assert len(commands) >= 12
    for path, functions in commands.items():
        function = functions.get("run") if path.parent.name == "convert" else None
        decorators = (function or functions["main"]).decorator_list
        assert [ast.unparse(node) for node in decorators] == ["exit_on_input_error"], path


# ---- paths of command lines


def test_paths_of_command_lines_are_expanded(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CORL_PLACE", "/scratch")
    assert parse_path("~/x") == Path("/home/me/x")
    assert parse_place("gs://a/$CORL_PLACE") == "gs://a//scratch"
    assert parse_place("./owner/name") == "./owner/name"  # no hub id
    args = generate.build_parser().parse_args(
        ["image", "--model", "~/m", "--prompts", "$CORL_PLACE/p", "--out", "${CORL_PLACE}/o"]
    )
    assert (args.model, args.prompts, args.out) == (
        "/home/me/m", Path("/scratch/p"), Path("/scratch/o"),
    )  # fmt: skip
    monkeypatch.delenv("CORL_PLACE")
    with pytest.raises(SystemExit) as error:
        evaluate.build_parser("shapes").parse_args(["--model", "$CORL_PLACE/m"])
    assert error.value.code == 2
    assert "argument --model: $CORL_PLACE/m: $CORL_PLACE is not set" in capsys.readouterr().err


def arguments_of(path: Path):
    """(flags and names, keywords as source) of every call that looks like `add_argument`."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call):
            names = {item.value for item in call.args if isinstance(item, ast.Constant)}
            yield names, {word.arg: ast.unparse(word.value) for word in call.keywords}


def test_no_command_takes_a_path_as_it_stands():
    """`type=parse_path`, or `type=parse_place` where it may be a URL or hub id."""
    flags = {"--model", "--out", "--image", "--input", "--data", "--base", "source", "out"}
    taken = 0
    for path in SOURCES:
        for names, options in arguments_of(path):
            assert options.get("type") != "Path", path
            metavar = options.get("metavar", "").strip("'\"")
            is_place = metavar.startswith(("FILE", "DIR", "PATH"))
            is_name = "choices" in options or metavar in ("KIND", "SIZES")
            # The config of a run is expanded where it is read.
            if "help" in options and (is_place or names & flags) and not is_name:
                assert "--config" in names or options.get("type", "").startswith("parse_p"), (
                    path, names,
                )  # fmt: skip
                taken += 1
    assert taken > 20


# ---- JAX's settings and devices


@pytest.fixture
def setting():
    """Sets an option of JAX until the end of the test."""
    before = {}

    def change(name, value):
        before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)

    yield change
    for name, value in before.items():
        jax.config.update(name, value)


OTHER_VALUES = {
    "jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise",
    "jax_default_prng_impl": "rbg", "jax_threefry_partitionable": False,
    "jax_legacy_prng_key": "error",
}  # fmt: skip


@pytest.mark.parametrize("name", startup.ACCEPTED_SETTINGS)
def test_settings_that_would_change_results_are_refused(setting, name):
    startup.check_jax_settings()
    kinds = {"guard": "disallow", "error_checking": "raise"}
    kind = next((value for part, value in kinds.items() if part in name), True)
    setting(name, OTHER_VALUES.get(name, kind))
    with pytest.raises(InputError) as error:
        startup.check_jax_settings()
    (line,) = error.value.problems
    assert line.startswith(f"{name.upper()}: found ") and "unset it" in line


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path}/run\nmodel: {{path: none}}\ndata: {{path: none}}\n"
        "rewards: [{name: format}]\nalgorithm: {tasks: mm2t}\n",
        encoding="utf-8",
    )
    return str(path)


COMMANDS = {
    "train": lambda path: train.main(["--config", path]),
    "plan": lambda path: plan.main(
        ["--config", path, "--topology", "local", "--model", "janus-pro-1b"]
    ),
    "generate": lambda path: inference.load_model("none", None),
    "evaluate": lambda path: shapes_command.measure(
        argparse.Namespace(model="none", dtype=None), None
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_look_at_settings_and_devices_first(setting, monkeypatch, capsys, config, command):
    def lines():
        with pytest.raises((InputError, SystemExit)) as error:
            COMMANDS[command](config)
        if isinstance(error.value, InputError):
            return error.value.problems
        assert error.value.code == 2
        return capsys.readouterr().err.splitlines()

    def cannot_start():
        raise RuntimeError("Unable to initialize backend 'x': it is not there. (set JAX_PLATFORMS)")

    setting("jax_enable_x64", True)
    assert any("JAX_ENABLE_X64: found True" in line for line in lines())
    setting("jax_enable_x64", False)
    monkeypatch.setattr(jax, "devices", cannot_start)
    (line,) = lines()
    assert "JAX_PLATFORMS: found cpu; JAX cannot start its devices (Unable to initialize" in line


def test_cuda_without_its_plugin_is_one_line(monkeypatch):
    """JAX ends in an assertion without a text."""

    def cannot_start():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", cannot_start)
    with pytest.raises(InputError, match=r"JAX_PLATFORMS: found .*unset it"):
        startup.start_devices()


# ---- glyphs


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("a red square, 3 of 4…", "a red square, 3 of 4…"),
        ("画一个红色的圆", r"\u753b\u4e00\u4e2a\u7ea2\u8272\u7684\u5706"),
        ("مربع أحمر", r"\u0645\u0631\u0628\u0639 \u0623\u062d\u0645\u0631"),
        ("😀", r"\U0001f600"),
        ("Bäume, cafe\u0301", "Baume, cafe"),
        ("“it’s” – ok", "“it’s” - ok"),
        ("a\tb\nc\x07", r"a b c\x07"),
        ("half \ud83d", r"half \ud83d"),
    ],
)
def test_texts_that_the_font_lacks_are_escaped(text, drawn):
    assert make_drawable(text, pictures.load_font()) == drawn


def test_no_picture_of_prompts_has_boxes():
    """The picture of a text is that of its escapes, so that nothing of it is a box."""
    images = np.zeros((1, 2, 64, 64, 3), np.uint8)
    pages = [
        pictures.draw_samples(images, [prompt], [[{name: 0.5}] * 2], title).pixels
        for prompt, name, title in (
            ("红 круг", "награда", "étape 1"),
            (r"\u7ea2 \u043a\u0440\u0443\u0433", r"\u043d\u0430\u0433\u0440\u0430\u0434\u0430",
             "etape 1"),
        )
    ]  # fmt: skip
    np.testing.assert_array_equal(*pages)
    sheets = [
        shapes.ShapesReport({}, images[0], [prompt] * 2, [True, False], [{}, {}]).draw().pixels
        for prompt in ("红", r"\u7ea2")
    ]
    np.testing.assert_array_equal(*sheets)


def test_fonts_without_freetype_draw_too():
    font = ImageFont.load_default_imagefont()
    drawn = make_drawable("Bäume 红", font)
    assert drawn == r"Bäume \u7ea2"
    assert isinstance(Image.new("RGB", (9, 9)), Image.Image) and font.getlength(drawn) > 0


# ---- libraries that speak for themselves

QUIET = """
import sys
sys.modules["torch"] = None  # as where PyTorch is not installed
from corl_jax.devices.startup import prepare_devices
prepare_devices()
import jax
from jax.experimental.pallas import tpu  # whose lowering rules need a platform of this name
from corl_jax.console import hide_import_advice
with hide_import_advice():
    import transformers
assert not transformers.is_torch_available()
print(jax.default_backend())
"""


def test_libraries_say_nothing_about_what_is_not_there():
    """Neither libtpu about the TPU, nor transformers about PyTorch."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", QUIET], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and not done.stderr


@pytest.mark.parametrize(
    ("file", "variable", "platforms"),
    [
        (None, None, None), ("/dev/accel0", None, None), ("/dev/vfio/0", None, None),
        (None, "TPU_WORKER_HOSTNAMES", None), (None, None, "tpu"),
    ],
)  # fmt: skip
def test_a_tpu_that_may_be_there_is_left_to_jax(monkeypatch, file, variable, platforms):
    registered = []
    monkeypatch.setattr(startup, "register_backend_factory", lambda *a, **k: registered.append(a))
    monkeypatch.setattr(
        startup.glob, "glob", lambda pattern: [file] * fnmatch.fnmatch(file or "", pattern)
    )
    for name in startup.TPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "localhost")
    monkeypatch.setattr(startup, "jax", SimpleNamespace(config=SimpleNamespace(
        **{startup.PLATFORMS: platforms}
    )))  # fmt: skip
    startup.skip_missing_tpu()
    assert bool(registered) == (file is None and variable is None and platforms is None)


def test_every_import_of_transformers_hides_its_advice():
    """One import that does not would bring the line back."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        hidden = {
            id(line)
            for block in ast.walk(tree) if isinstance(block, ast.With)
            if "hide_import_advice()" in ast.unparse(block.items[0])
            for line in block.body
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                assert id(node) in hidden, path
