"""The way to SPICE and back, with a stand-in for java: the real one needs half a gigabyte."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from corl_jax.errors import InputError
from corl_jax.rewards import spice

# Answers `-version`; else scores the share of the reference's words that were said, last pair
# first, and keeps what it was asked for.
JAVA = """#!{python}
import json, pathlib, sys, time
arguments = sys.argv[1:]
if arguments == ["-version"]:
    sys.exit(print({version!r}, file=sys.stderr))
source = arguments[arguments.index("-jar") + 2]
items = json.load(open(source))
pathlib.Path({asked!r}).write_text(json.dumps([arguments, items]))
scores = []
for item in reversed(items):
    said, wanted = set(item["test"].split()), set(item["refs"][0].split())
    f = len(said & wanted) / len(wanted)
    scores.append({{"image_id": item["image_id"], "scores": {{"All": {{"f": f, "pr": 9}}}}}})
out = pathlib.Path(arguments[arguments.index("-out") + 1])
{behaviour}
out.write_text(json.dumps(scores))
"""
OPENJDK, ORACLE_8 = 'openjdk version "11.0.2" 2019-01-15', 'java version "1.8.0_312"'


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine on which SPICE can run: a package with its jars, and `java(..)` to change Java."""
    package = tmp_path / "site" / "pycocoevalcap"
    for name in ("__init__.py", "spice/__init__.py", "spice/spice-1.0.jar"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / "spice" / "lib").mkdir()
    for name in spice.JARS:
        (package / "spice" / "lib" / name).touch()
    for name in ("pycocoevalcap", "pycocoevalcap.spice"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    class Machine:
        lib = package / "spice" / "lib"
        jar = package / "spice" / "spice-1.0.jar"

        def java(self, behaviour: str = "", version: str = OPENJDK, place: str = "bin") -> Path:
            file = tmp_path / place / "java"
            file.parent.mkdir(parents=True, exist_ok=True)
            settings = {"version": version, "behaviour": behaviour, "python": sys.executable}
            file.write_text(JAVA.format(asked=str(tmp_path / "asked.json"), **settings))
            file.chmod(0o755)
            return file

        def asked(self) -> tuple[list[str], list[dict]]:
            return tuple(json.loads((tmp_path / "asked.json").read_text()))

    machine = Machine()
    machine.java()
    yield machine
    for name in ("pycocoevalcap", "pycocoevalcap.spice"):
        sys.modules.pop(name, None)


def test_scores_keep_the_order_of_the_rows(machine):
    predictions = ["a cat", "dog", "a red cat", "a cat"]
    targets = ["a red cat", "dog house", "a red cat", "a red cat"]
    found = spice.score_spice(predictions, targets)
    np.testing.assert_allclose(found, [2 / 3, 1 / 2, 1.0, 2 / 3], rtol=1e-6)
    assert found.dtype == np.float32
    arguments, items = machine.asked()
    assert [(item["test"], item["refs"]) for item in items] == [
        ("a cat", ["a red cat"]), ("dog", ["dog house"]), ("a red cat", ["a red cat"]),
    ]  # fmt: skip
    assert arguments[:3] == ["-Xmx8G", "-jar", str(machine.jar)]


def test_nothing_said_is_zero_and_nothing_asked_is_nan(machine):
    found = spice.score_spice(["a cat", "", None, "cat", " "], ["a cat", "cat", "cat", None, " "])
    np.testing.assert_array_equal(found, np.float32([1, 0, 0, np.nan, np.nan]))
    assert len(machine.asked()[1]) == 1


def test_java_is_not_started_for_nothing(machine):
    found = spice.score_spice(["", "cat"], ["cat", ""])
    np.testing.assert_array_equal(found, np.float32([0, np.nan]))
    assert spice.score_spice([], []).shape == (0,)
    with pytest.raises(FileNotFoundError):
        machine.asked()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("time.sleep(60)", "2 captions were not scored after 0.5 s"),
        ('sys.stderr.write("Parsing\\nOutOfMemoryError\\n\\tat x.y\\n"); sys.exit(3)',
         "code 3: Parsing | OutOfMemoryError"),
        ("sys.exit(1)", "code 1: it said nothing"),
        ("sys.exit(0)", "results cannot be read (FileNotFoundError"),
        ("scores = '['; out.write_text('['); sys.exit(0)", "cannot be read (JSONDecodeError"),
        ("scores.pop()", "cannot be read (KeyError: 0), expected a score for each of 2 captions"),
        ("scores = [{'image_id': 0}]", "cannot be read (KeyError: 'scores')"),
        ("scores = 7", "cannot be read (TypeError"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said(machine, behaviour, message):
    machine.java(behaviour)
    with pytest.raises(InputError) as raised:
        spice.score_spice(["a", "b"], ["a", "b"], timeout_s=0.5 if "sleep" in behaviour else 60)
    assert message in str(raised.value)


def test_a_java_that_cannot_be_started(machine):
    machine.java().write_text("#!/no/such/interpreter\n")
    with pytest.raises(InputError, match="Java of an unknown version"):
        spice.score_spice(["a"], ["a"])


@pytest.mark.parametrize("version", [ORACLE_8, OPENJDK, 'openjdk version "14" 2020-03-17'])
def test_java_versions_that_serve(machine, version):
    machine.java(version=version)
    assert spice.find_spice_problem() is None


@pytest.mark.parametrize(
    ("version", "found"),
    [('openjdk version "17.0.15"', "is Java 17,"), ('java version "1.7.0_80"', "is Java 7,"),
     ("hello", "is Java of an unknown version")],
)  # fmt: skip
def test_java_versions_that_do_not(machine, version, found):
    machine.java(version=version)
    problem = spice.find_spice_problem()
    assert found in problem and "expected Java 8 to 14" in problem and "JAVA_HOME" in problem
    with pytest.raises(InputError, match="expected Java 8 to 14"):
        spice.score_spice(["a"], ["a"])


def test_java_home_comes_first(machine, monkeypatch, tmp_path):
    machine.java(version='openjdk version "21.0.1"')
    machine.java(place="jdk8/bin", version=ORACLE_8)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk8"))
    assert spice.find_spice_problem() is None
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    assert "is Java 21," in spice.find_spice_problem()


def test_what_is_missing_is_said_with_its_remedy(machine, monkeypatch, tmp_path):
    (machine.lib / spice.JARS[1]).unlink()
    problem = spice.find_spice_problem()
    assert f"lacks {spice.JARS[1]};" in problem and "get_stanford_models" in problem
    (tmp_path / "bin" / "java").unlink()
    assert "found no java; install Java 8 to 14" in spice.find_spice_problem()
    monkeypatch.setattr("importlib.util.find_spec", _no_package)
    assert "pip install 'corl-jax[spice]'" in spice.find_spice_problem()


def _no_package(name: str) -> None:
    raise ModuleNotFoundError(name)
