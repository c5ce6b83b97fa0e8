"""The commit in `provenance.json`."""

from __future__ import annotations

import re
import subprocess

from corl_jax.train.provenance import find_commit


def test_the_commit_of_a_clone(tmp_path):
    package = tmp_path / "clone" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", package.parent, *identity, *words], check=True)

    assert find_commit(package) is None
    git("init", "-q")
    assert find_commit(package) is None, "a package that another project does not track"
    git("add", ".")
    git("commit", "-qm", "first")
    commit = find_commit(package)
    assert commit and re.fullmatch("[0-9a-f]{12}", commit)
    (package / "__init__.py").write_text("x = 1")
    assert find_commit(package) == f"{commit}-dirty"


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_commit(tmp_path) is None
