"""`corl-jax`: commands, configs and models by name, options in any form, answers without jax."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import corl_jax
from corl_jax.assets import SHIPPED
from corl_jax.cli import COMMANDS
from corl_jax.config.shipped import (
    FOLDER,
    find_config,
    find_study,
    list_configs,
    list_studies,
)
from corl_jax.errors import InputError
from corl_jax.policies import inspect_policy
from corl_jax.train.__main__ import normalize_arguments

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_JAX = (
    "import sys\n"
    "from corl_jax.cli import main\n"
    "try:\n"
    "    main(sys.argv[1:])\n"
    "finally:\n"
    "    assert 'jax' not in sys.modules, 'jax was imported'\n"
)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main(name):
    assert callable(importlib.import_module(COMMANDS[name].module).main)


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "Usage: corl-jax"),
        (["--help"], 0, "Train a model; run again to resume."),
        (["--version"], 0, corl_jax.__version__),
        (["trian"], 2, "No such command 'trian'"),
        (["configs"], 0, "mini/unified"),
        (["train", "--help"], 0, "usage: corl-jax train CONFIG"),
        (["train"], 2, "config: missing"),
        (["train", "mini/unifed"], 2, "did you mean mini/unified?"),
        (["train", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["train", "minimal", "train.max_stps=1"], 2, "did you mean train.max_steps?"),
        (["train", "minimal", "--train.max_steps"], 2, "found no value"),
        (["train", "minimal", "--max_steps", "10"], 2,
         "error: command line: max_steps: unknown key; did you mean train.max_steps?"),
        (["train", "minimal", "--networks.offload", "--check"], 2, "error: command line: "
         "networks.offload: found no value, expected true or false, as in networks.offload=true"),
        (["train", "minimal", "--print-config"], 0, "path: nano"),
        (["generate", "--help"], 0, "usage: corl-jax generate"),
        (["evaluate", "--help"], 0, "usage: corl-jax evaluate"),
        (["compare", "--help"], 0, "usage: corl-jax compare"),
        (["compare", "nowhere", "docs", "--draws", "0"], 2, "nowhere: no such folder"),
        (["data", "--help"], 0, "usage: corl-jax data"),
        (["score", "--help"], 0, "usage: corl-jax score"),
        (["report", "--help"], 0, "usage: corl-jax report"),
        (["report", "nowhere"], 2, "nowhere: no such directory"),
        (["report", "docs", "nowhere"], 2, "docs: found neither config.yaml nor metrics.jsonl"),
        (["study", "--help"], 0, "usage: corl-jax study"),
        (["study", "studies/figure2"], 2, "no study of the package; did you mean studies/figure1?"),
        (["study", "studies/figure1", "algorithm.task=t2i"], 2, "did you mean algorithm.tasks?"),
        (["study", "studies/figure1", "--jobs", "0"], 2, "--jobs: found 0; expected at least 1"),
        (["plan", "--help"], 0, "usage: corl-jax plan"),
        (["plan", "--config", "nowhere.yaml", "--topology", "local"], 2, "nowhere.yaml"),
        (["plan", "nowhere.yaml", "--topology", "local"], 2, "nowhere.yaml"),
        (["plan", "--topology", "local"], 2, "config: missing"),
        (["quickstart", "--help"], 0, "usage: corl-jax quickstart"),
        (["convert", "--help"], 0, "usage: corl-jax convert"),
        (["merge", "--help"], 0, "usage: corl-jax merge"),
        (["merge", "--base", "nano", "--models", "nano", "--out", "x"], 2,
         "--models: found 1, expected 2 with --rule gaussian"),
        (["push", "--help"], 0, "usage: corl-jax push"),
        (["push", "nowhere", "user/model"], 2, "nowhere: no such directory"),
        (["convert", "inspect", "nowhere"], 2, "nowhere: no such directory"),
    ],
)  # fmt: skip
def test_answers_without_loading_jax(arguments, code, part):
    command = [sys.executable, "-c", WITHOUT_JAX, *arguments]
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    assert done.returncode == code and part in printed, printed
    assert "jax was imported" not in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mini/unified", "seed=1"], ["--config=mini/unified", "seed=1"]),
        (["--config", "x.yaml", "--seed", "1"], ["--config=x.yaml", "seed=1"]),
        (["--config=x.yaml", "--train.max-steps=10"], ["--config=x.yaml", "train.max_steps=10"]),
        (["seed=-1", "x.yaml", "--check"], ["seed=-1", "--config=x.yaml", "--check"]),
        (["x.yaml", "--seed", "-1"], ["--config=x.yaml", "seed=-1"]),
        (["x.yaml", "other"], ["--config=x.yaml", "other"]),
        (["x.yaml", "--networks.offload"], ["--config=x.yaml", "networks.offload"]),
        (["x.yaml", "--networks.offload", "--check"],
         ["--config=x.yaml", "networks.offload", "--check"]),
        (["x.yaml", "--print_config"], ["--config=x.yaml", "--print-config"]),
        (["--config"], ["--config"]),
    ],
)  # fmt: skip
def test_a_config_and_options_in_any_form(arguments, expected):
    assert [*normalize_arguments(arguments)] == expected


def test_configs_have_names():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    names = [file.relative_to(ROOT / "configs").with_suffix("").as_posix() for file in files]
    assert sorted(list_configs() + list_studies()) == names and FOLDER.samefile(ROOT / "configs")
    for name, file in zip(names, files, strict=True):
        find_file = find_study if name in list_studies() else find_config
        assert find_file(name).samefile(file)
        assert find_file(str(file)) == file
    with pytest.raises(InputError, match="no file and no config of the package"):
        find_config("nothing")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_have_names(name, tmp_path, monkeypatch):
    assert inspect_policy(name).folder == SHIPPED[name]
    # A directory of that name is the user's own.
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=name):
        inspect_policy(name)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what an installation reads, because a build leaves files behind."""
    folder = tmp_path / "corl_jax"
    for name in ("corl_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


class Installed:
    """A fresh environment with our package, in which commands run outside of the clone."""

    def __init__(self, folder: Path, *what: str | Path):
        self.folder = folder
        self.variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        venv.create(folder / "env", with_pip=True)
        self.run("python", "-m", "pip", "install", "--no-deps", *what)
        (self.site,) = (folder / "env" / "lib").glob("python*/site-packages")
        # The dependencies of this environment; its own corl_jax comes later on the path.
        (self.site / "zz.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")

    def run(self, program: str, *arguments: str | Path) -> str:
        command = [self.folder / "env" / "bin" / program, *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self.variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.mark.slow
def test_the_wheel_is_the_whole_product(clone, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, clone]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tools", "tests", "docs"))]
    for name in ("configs/mini/unified.yaml", "py.typed", "report/template.html"):
        assert f"corl_jax/{name}" in names
    shutil.rmtree(clone)
    made = Installed(tmp_path, wheel)
    where = made.run("python", "-c", "import corl_jax; print(corl_jax.__file__)")
    assert Path(where.strip()).is_relative_to(made.site)
    made.run(
        "corl-jax", "generate", "image", "--model", "nano", "--prompt", "a red circle", "--out", "i"
    )
    made.run("corl-jax", "evaluate", "--model", "nano", "--rows", "4")
    made.run("corl-jax", "convert", "to-jax", "nano", "converted")
    made.run("corl-jax", "data", "--out", "rows", "--rows", "40", "--seed", "0", "--world", "small")
    made.run(
        "corl-jax", "train", "minimal", "data.path=rows", "train.max_steps=2",
        "train.prompts_per_step=4", "output_dir=run", "eval.suite=none",
    )  # fmt: skip
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    made.run("corl-jax", "report", "run")
    assert (tmp_path / "report.html").read_bytes() == (tmp_path / "run/report.html").read_bytes()


@pytest.mark.slow
def test_a_clone_called_like_the_package_does_not_hide_it(clone, tmp_path):
    made = Installed(tmp_path, "--editable", clone)
    # The working directory, first on the path, holds the clone.
    where = made.run("python", "-c", "import corl_jax; print(corl_jax.__file__)")
    assert Path(where.strip()) == clone / "corl_jax" / "__init__.py"
    assert made.run("python", "-m", "corl_jax", "--version").strip() == corl_jax.__version__
