"""What the image tokenizer keeps of the drawn world: the measurement and its command."""

from __future__ import annotations

import re

import numpy as np
import pytest

from corl_jax.assets import NANO_JANUS
from corl_jax.data.drawn_world import generator
from corl_jax.data.drawn_world.held_out import HELD_OUT_SEEDS
from corl_jax.evaluation.intervals import Rate
from corl_jax.policies import load_policy
from tests.support.tiny_runs import model_dir
from tools.small_models import roundtrip
from tools.small_models.__main__ import main

LINE = re.compile(r"(\S+)% \((\S+)% - (\S+)%\) of (\d+) images pass the checker")


@pytest.fixture(scope="module")
def nano():
    return load_policy(NANO_JANUS)


def pictures(rows: int) -> np.ndarray:
    drawn = (
        generator.make_row(HELD_OUT_SEEDS + 2, i, split="test", encode=False, world="small")
        for i in range(rows)
    )
    return np.stack([row["real_image"] for row in drawn])


def test_the_shipped_tokenizer_keeps_pictures_close(nano):
    before = pictures(4)
    after = roundtrip.reconstruct(nano, before)
    assert after.shape == before.shape and after.dtype == np.uint8
    errors = np.sqrt(((after.astype(float) - before) ** 2).mean((1, 2, 3))) / 255
    assert (errors > 0).all() and (errors < 0.15).all(), errors


def test_the_share_counts_each_row_once_and_ruined_pictures_as_misses(monkeypatch):
    """7 rows in chunks of 4 repeat one; every second picture comes back as another row's."""
    made = pictures(7)
    assert roundtrip.measure_roundtrip(NANO_JANUS, 7, seed=2) == Rate.of(7, 7)

    def spoil(model, batch):
        assert len(batch) == 4
        number = [int(np.flatnonzero((made == one).all((1, 2, 3)))[0]) for one in batch]
        return np.stack([x * 0 if n % 2 else x for n, x in zip(number, batch, strict=True)])

    monkeypatch.setattr(roundtrip, "BATCH", 4)
    monkeypatch.setattr(roundtrip, "reconstruct", spoil)
    assert roundtrip.measure_roundtrip(NANO_JANUS, 7, seed=2) == Rate.of(4, 7)


def test_the_command_prints_the_share_and_its_interval(capsys):
    main(["roundtrip", "--model", str(NANO_JANUS), "--rows", "7", "--seed", "2"])
    found = LINE.match(capsys.readouterr().out)
    assert found and found.groups() == ("100.00", "64.57", "100.00", "7")  # Wilson's 7 of 7


def test_wrong_numbers_and_models_are_named(tmp_path, tiny_config, capsys):
    small = model_dir(tmp_path / "model", tiny_config)
    for arguments, lines in [
        (["--rows", "0", "--seed", "-1"], ["--rows: found 0", "--seed: found -1"]),
        ([], [f"{small}: generates images of 16 pixels a side; the drawn world needs at least 32"]),
    ]:
        with pytest.raises(SystemExit, match="2"):
            main(["roundtrip", "--model", str(small), *arguments])
        found = capsys.readouterr().err.splitlines()
        assert len(found) == len(lines)
        for problem, start in zip(found, lines, strict=True):
            assert problem.startswith(f"error: {start}")


@pytest.mark.parametrize("arguments", [[], ["--out", "x", "roundtrip", "--model", "y"]])
def test_one_of_both_commands_is_asked_for(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "expected either --out DIR or roundtrip" in capsys.readouterr().err
