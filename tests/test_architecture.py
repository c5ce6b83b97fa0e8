"""The shape of the code: who imports whom, what stays optional, how long things may get."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from corl_jax.algorithms.recipes import RECIPES
from corl_jax.evaluation import SUITES
from corl_jax.policies import FAMILIES
from corl_jax.rewards.networks import NETWORKS
from corl_jax.rewards.registry import REGISTRY
from corl_jax.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "corl_jax"

# A module imports from its own layer and from those below it. What is not named here must be a
# command (it has a `main`) and stands on top.
LAYERS = {
    "errors": 0, "types": 0, "metrics": 0, "tasks": 0, "params": 0, "nearest": 0, "console": 0,
    "input_files": 0, "atomic_files": 0, "assets": 0, "hub_headers": 0, "estimates": 0,
    "config": 1, "fonts": 1, "models": 1, "weights": 1, "algorithms": 1, "devices": 1,
    "policies": 2, "data": 2, "runs": 2,
    "rewards": 3, "evaluation": 3, "sampling_options": 3, "inference": 3, "report": 3,
    "train": 4, "api": 4,
    "plan": 5, "study": 5, "convert": 5, "merge": 5, "score": 5, "quickstart": 5,
    "evaluate": 5, "compare": 5, "serve": 5,
}  # fmt: skip
COMMANDS = 5
# Inside a layer only these are forbidden: (importer, imported); GenEval's rules are no suite.
FORBIDDEN = {
    ("rewards", "evaluation"), ("models", "data"), ("models", "weights"), ("algorithms", "models"),
    ("devices.mesh", "models"), ("runs", "data"),
}  # fmt: skip
ALLOWED = {("rewards.geneval", "evaluation.geneval")}

MODULE_LINES, FUNCTION_LINES, LOOP_LINES = 400, 50, 30
CLASS_LINES, LOOP_IMPORTS = 100, 20
# path (lines of the module) or path::function -> (limit, reason)
EXCEPTIONS: dict[str, tuple[int, str]] = {
    "corl_jax/config/schema.py": (600, "every option with its type, default and meaning"),
    "corl_jax/rewards/registry.py": (420, "the table of rewards, and how a batch is scored"),
}

# What computes must import without what reads configs, reads data and draws curves.
NUMERIC_MODULES = (
    "policies.janus.network", "algorithms.advantages", "algorithms.losses",
    "policies.janus.sampling", "train.step",
)  # fmt: skip
OPTIONAL = ("pydantic", "grain", "tensorboardX", "torch", "transformers", "datasets", "jinja2")


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at import time) of every import outside of `if TYPE_CHECKING`."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children = node.orelse
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(path, node)
            yield base, top
            # `from corl_jax.runs import pictures` imports a module of that package.
            yield from ((f"{base}.{alias.name}", top) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in children:
            yield from walk(child, top and not inside)

    yield from walk(parse(path), True)


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module_name(path).split(".")
    keep = len(package) - node.level + (path.name == "__init__.py")
    return ".".join([*package[:keep], *filter(None, [node.module])])


def has_main(path: Path) -> bool:
    """Whether it defines a function `main`, or imports one to run it."""
    names = {getattr(node, "name", None) for node in ast.walk(parse(path))}
    return "main" in names


def part_of(module: str) -> str:
    """The second name of corl_jax.NAME..., or the whole of a command inside a package."""
    if module.endswith("__main__"):
        return module
    return module.split(".")[1] if "." in module else ""


def layer_of(part: str) -> int:
    return LAYERS.get(part, COMMANDS)


def is_forbidden(importer: str, imported: str) -> bool:
    """Whether FORBIDDEN and not ALLOWED names both modules, or packages that they are in."""

    def belongs(module: str, name: str) -> bool:
        return f"{module}.".startswith(f"corl_jax.{name}.")

    def holds(pairs: set[tuple[str, str]]) -> bool:
        return any(belongs(importer, a) and belongs(imported, b) for a, b in pairs)

    return holds(FORBIDDEN) and not holds(ALLOWED)


@pytest.mark.parametrize("path", sources(PACKAGE), ids=relative)
def test_imports_point_downwards(path):
    part = part_of(module_name(path))
    if not part:
        return
    for module, _ in imports(path):
        if not module.startswith("corl_jax."):
            continue
        other = part_of(module)
        where = f"{relative(path)} imports {module}"
        assert layer_of(other) <= layer_of(part), f"{where}, which is a layer above it"
        assert not is_forbidden(module_name(path), module), f"{where}: never that way round"
        if layer_of(part) == layer_of(other) == COMMANDS and not part.endswith("__main__"):
            assert part == other, f"{where}: a command is nobody's library"


def test_algorithms_know_arrays_alone():
    """Not models, tasks or configs: an algorithm is given log-probs, masks and rewards."""
    for path in sources(PACKAGE / "algorithms"):
        for module, _ in imports(path):
            package, part = module.split(".")[0], part_of(module)
            if package == "corl_jax":
                assert part in ("", "algorithms"), f"{relative(path)} imports {module}"
            else:
                allowed = {"jax", "numpy", "__future__"} | (sys.stdlib_module_names - {"importlib"})
                assert package in allowed, f"{relative(path)} imports {module}"


def knows_janus(path: Path) -> bool:
    return any(f"{module}.".startswith("corl_jax.policies.janus.") for module, _ in imports(path))


def test_policies_alone_know_a_family():
    outside = [path for path in sources(PACKAGE) if PACKAGE / "policies" not in path.parents]
    found = {relative(path) for path in outside if knows_janus(path)}
    assert not found, "ask the Family instead"


# Where a row of a table is told from another by its name, beside the defaults in config/.
# Elsewhere the row says what it does, so that a new one needs a new row only.
# Table -> (names, what separates the words of a text, modules with such words).
NAMED_IN = {
    # "t2i/kl" names a task. <think> is a tag of answers, and --think an option.
    "tasks": (TASKS.keys() - {"think"}, r"\W+", {"tasks.py"}),
    "algorithms": (RECIPES.keys(), r"\W+", {"algorithms/recipes.py"}),
    # A shipped model may have the name of its family in its own, also in the quickstart's table.
    "families": (
        FAMILIES.keys(),
        r"\W+",
        {"policies/__init__.py", "assets/__init__.py", "quickstart/models.py"},
    ),
    # Both names are words of messages, and `rewards` that of a block of options as well.
    # evaluate/suites.py is the command's table, and has the default of --suite. A file format is
    # called tsv, too, and a reward geneval.
    "suites": (
        SUITES.keys() - {"rewards", "tsv", "geneval"},
        "/",
        {"evaluation/__init__.py", "evaluation/writers/__init__.py", "evaluate/suites.py"},
    ),
}


def literals(path: Path) -> set[str]:
    """Every text but docstrings."""
    nodes = list(ast.walk(parse(path)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = (node for node in nodes if isinstance(node, ast.Constant))
    return {
        node.value
        for node in constants
        if isinstance(node.value, str) and id(node) not in docstrings
    }


@pytest.mark.parametrize("table", NAMED_IN)
def test_rows_are_named_in_their_tables_alone(table):
    names, separator, places = NAMED_IN[table]
    families = (path for path in (PACKAGE / "policies").iterdir() if path.is_dir())
    inside = {PACKAGE / "config", *families}
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in sources(PACKAGE)
        if not inside & {*path.parents}
        and any(names & set(re.split(separator, text)) for text in literals(path))
    }
    assert not found - places, "read what the row does from its table"
    assert not places - found, "names no row any more: drop it from NAMED_IN"


@pytest.mark.parametrize("table", [RECIPES, TASKS, SUITES, NETWORKS, REGISTRY])
def test_every_row_is_documented(table):
    folders = (ROOT / "docs" / "reference", ROOT / "docs" / "how_to")
    text = "".join(path.read_text() for folder in folders for path in folder.glob("*.md"))
    assert not table.keys() - set(re.findall(r"`(\w+)`", text))


def test_every_equation_of_the_paper_is_named_where_it_is_computed():
    named: set[str] = set()
    for path in sources(PACKAGE / "algorithms", PACKAGE / "rewards"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef):
                sentences = (ast.get_docstring(node) or "").split(";")
                for sentence in sentences:
                    if "arXiv 2505.17534" in sentence:
                        named.update(re.findall(r"eq\. (\d)", sentence))
    assert named == set("123456")


def test_stages_are_compared_in_their_table_alone():
    for path in sources(PACKAGE):
        if path.parent == PACKAGE / "config" or path == PACKAGE / "train" / "stages.py":
            continue
        for node in ast.walk(parse(path)):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            sides += [node.subject] if isinstance(node, ast.Match) else []
            for side in sides:
                where = f"{relative(path)}:{side.lineno}"
                assert not ast.unparse(side).endswith("config.stage"), (
                    f"{where}: read what the stage does from its row in train.stages.STAGES"
                )


def test_runs_know_no_training():
    """Nothing above layer 1: they are given values and functions."""
    for path in sources(PACKAGE / "runs"):
        for module, _ in imports(path):
            other = part_of(module) if module.startswith("corl_jax.") else ""
            if other and other != "runs":
                assert layer_of(other) <= 1, f"{relative(path)} imports {module}"


def test_runs_name_no_task_and_no_reward():
    """Which metrics an alarm or the console looks at is given to them."""
    for path in sources(PACKAGE / "runs"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = set(re.split(r"\W+", node.value))
                where = f"{relative(path)}:{node.lineno}"
                assert not words & {"t2i", "mm2t", "rl", "sft", "vq", "grpo"}, where


def test_modules_are_in_the_table_or_commands():
    for path in PACKAGE.iterdir():
        if path.suffix == ".py" and path.stem not in LAYERS and path.stem != "__init__":
            assert has_main(path), f"{relative(path)}: no command, so give it a place in LAYERS"
        elif path.is_dir() and any(path.glob("*.py")):
            assert path.name in LAYERS, f"{relative(path)}: give it a place in LAYERS"


def test_tools_tests_and_torch_stay_outside_the_package():
    offenders = []
    for path in sources(PACKAGE):
        for module, at_import in imports(path):
            top = module.split(".")[0]
            reads_bin = path.parent == PACKAGE / "weights" and not at_import
            if top in ("tools", "tests") or (top == "torch" and not reads_bin):
                offenders.append(f"{relative(path)}: {module}")
    assert not offenders, "only weights/ may import torch, inside a function, to read .bin files"


def test_models_know_no_mesh():
    for path in sources(PACKAGE / "models"):
        names = {n.id for n in ast.walk(parse(path)) if isinstance(n, ast.Name)}
        names |= {module.split(".")[-1] for module, _ in imports(path)}
        assert not names & {"Mesh", "PartitionSpec", "NamedSharding"}, relative(path)


def test_nnx_only_describes_networks():
    """Transformations are jax's and the optimizer optax's, so that parameters stay a dict."""
    unwanted = {"jit", "grad", "value_and_grad", "scan", "vmap", "remat", "Optimizer", "Cache"}
    for path in sources(PACKAGE, ROOT / "tools"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "nnx":
                assert node.attr not in unwanted, f"{relative(path)}:{node.lineno} nnx.{node.attr}"


def test_no_module_is_a_drawer_for_everything():
    drawers = {"utils", "util", "common", "helpers", "misc"}
    paths = sources(PACKAGE, ROOT / "tools", ROOT / "tests")
    found = [relative(p) for p in paths if drawers & {p.stem, *p.relative_to(ROOT).parts}]
    assert not found


def lengths() -> Iterator[tuple[str, int, int]]:
    """(path or path::function, lines, limit without exceptions) of the package and the tools."""
    for path in sources(PACKAGE, ROOT / "tools"):
        yield relative(path), len(path.read_text().splitlines()), MODULE_LINES
        limit = LOOP_LINES if path == PACKAGE / "train" / "loop.py" else FUNCTION_LINES
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{relative(path)}::{node.name}", node.end_lineno - node.lineno + 1, limit


def test_modules_and_functions_fit_in_the_head():
    offenders = {
        name: f"{lines} lines, at most {limit}"
        for name, lines, default in lengths()
        if lines > (limit := EXCEPTIONS.get(name, (default,))[0])
    }
    assert not offenders


def test_every_exception_is_needed():
    too_long = {name for name, lines, limit in lengths() if lines > limit}
    assert not EXCEPTIONS.keys() - too_long, "within the limit or gone: drop the exception"


def test_the_training_loop_fits_on_one_screen():
    """Loop, not engine: no class, and the longest function of the file is the loop."""
    path = PACKAGE / "train" / "loop.py"
    assert not [n for n in ast.walk(parse(path)) if isinstance(n, ast.ClassDef)]
    name = relative(path)
    assert max(lines for key, lines, _ in lengths() if key.startswith(name + "::")) <= LOOP_LINES


def test_no_class_of_train_is_a_trainer():
    """Short ones: records of values and functions."""
    for path in sources(PACKAGE / "train"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= CLASS_LINES, f"{relative(path)}: {node.name} has {lines} lines"


def test_few_modules_lie_behind_the_loop():
    behind: set[str] = set()
    waiting = ["corl_jax.train.loop"]
    modules = {module_name(path): path for path in sources(PACKAGE)}
    while waiting:
        for module, at_import in imports(modules[waiting.pop()]):
            if at_import and module in modules and module not in behind:
                behind.add(module)
                waiting.append(module)
    assert len(behind) <= LOOP_IMPORTS, sorted(behind)


PROBE = """
import importlib, os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} must not be needed here")

flags = os.environ.get("XLA_FLAGS")
sys.meta_path.insert(0, Blocker())
for module in {modules!r}:
    importlib.import_module(module)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "an import started jax"
assert os.environ.get("XLA_FLAGS") == flags, "an import set XLA flags"
"""


def test_what_computes_imports_alone_and_starts_nothing():
    modules = [f"corl_jax.{name}" for name in NUMERIC_MODULES]
    probe = PROBE.format(blocked=set(OPTIONAL), modules=modules)
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def functions_of_the_package() -> Iterator[ast.FunctionDef]:
    for path in sources(PACKAGE):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
                yield node


def test_docstrings_say_what_a_function_does():
    """The first word of most is a verb: Returns, Computes, Reads."""
    docstrings = [ast.get_docstring(function) for function in functions_of_the_package()]
    firsts = [text.split()[0] for text in docstrings if text]
    assert sum(bool(re.fullmatch(r"[A-Z][a-z]+s", word)) for word in firsts) > 0.8 * len(firsts)


def test_few_names_are_one_word():
    names = [function.name.strip("_") for function in functions_of_the_package()]
    assert sum("_" not in name for name in names) < 0.3 * len(names)


def test_names_say_what_they_hold():
    vague = "found one each wanted listed own ways asked held kept given"
    offenders = []
    for path in sources(PACKAGE, ROOT / "tools"):
        for node in ast.walk(parse(path)):
            stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            name = node.id if stored else getattr(node, "arg", None)
            if name and name in vague.split():
                offenders.append(f"{relative(path)}:{node.lineno} {name}")
    assert not offenders, "say the noun: missing_keys, row, kept_tokens"


def test_reasons_stand_at_the_line():
    lines = [line.strip() for path in sources(PACKAGE) for line in path.read_text().splitlines()]
    assert sum(line.startswith("#") for line in lines) > 0.03 * len(lines)
