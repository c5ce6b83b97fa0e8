"""The scored examples of docs/reference/rewards.md are what the code gives."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from corl_jax.data.drawn_world import generator
from corl_jax.errors import InputError
from corl_jax.rewards import registry
from corl_jax.score import command as score
from corl_jax.score.__main__ import build_parser
from tools.reward_examples import __main__ as command
from tools.reward_examples import cases, figure, page, scoring

T2I = [one.label for one in scoring.T2I]
SHOWN = [case["shows"] for case in cases.load_cases(cases.DRAWINGS)]


@pytest.fixture(scope="module")
def found():
    """The scores. These programs run for longer than XLA takes to optimise them."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        return scoring.score_all()
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """The page and the figure as copies that a test may change."""
    monkeypatch.setattr(page, "PAGE", shutil.copy(page.PAGE, tmp_path / "rewards.md"))
    monkeypatch.setattr(page, "FIGURE", shutil.copy(page.FIGURE, tmp_path / "examples.png"))


def test_the_page_and_the_figure_are_up_to_date(found):
    assert command.compare(found) == [], "run `python -m tools.reward_examples`"


def test_what_the_text_says_of_the_scores_holds(found):
    def scored(label: str) -> dict[str, float]:
        return dict(zip(SHOWN, found.t2i[T2I.index(label)], strict=True))

    checked = scored("shapes_checker")
    assert [shown for shown, value in checked.items() if value == 1] == ["the real image", "right"]
    assert scored("t2i_qa")["smudged"] == 1
    assert scored("t2i_oc")["both yellow"] == 1
    for label in T2I:
        if "cycle_reward" in label:
            assert scored(label)["colours swapped"] > scored(label)["right"]
    pixels = {k: v for k, v in scored("t2i_pixel_mse").items() if k != "the real image"}
    assert max(pixels, key=pixels.get) == "both yellow"
    alike = scored("t2i_ti_sim")
    assert max(alike, key=alike.get) == "both yellow"
    assert min(alike, key=alike.get) == "the real image"
    assert max(alike.values()) - min(alike.values()) < 0.1
    assert set(scored("t2i_od").values()) == {0}
    assert max(scored("answer_logprob").values()) < 0.01


def test_scores_known_by_hand(found):
    real = found.t2i[:, SHOWN.index("the real image")]
    assert real[T2I.index("t2i_pixel_mse")] == pytest.approx(1, abs=1e-6)
    assert real[T2I.index("shapes_checker")] == 1
    # Word overlap of "a purple triangle" and "triangle": one word of three.
    assert found.mm2t[-1, 3] == pytest.approx(1 / 3)
    assert found.boxes == pytest.approx(
        {
            "the true box": 1, "three quarters of it": 0.75, "a third of it": 0,
            "the true box and one beside it": 2 / 3,
        }
    )  # fmt: skip


def test_check_exits_1_where_a_number_differs(found, documents, monkeypatch, capsys):
    monkeypatch.setattr(command, "score_all", lambda: found)
    with pytest.raises(SystemExit) as ended:
        command.main(["--check"])
    assert ended.value.code == 0
    text = page.PAGE.read_text()
    number = page._format_number(found.t2i[T2I.index("t2i_ti_sim"), 0])
    for changed, code in ((0.004, 0), (0.007, 1)):
        page.PAGE.write_text(text.replace(number, f"{float(number) + changed:.3f}", 1))
        with pytest.raises(SystemExit) as ended:
            command.main(["--check"])
        assert ended.value.code == code
    assert "t2i_ti_sim" in capsys.readouterr().out


def test_writing_brings_page_and_figure_up_to_date(found, documents):
    moved = dataclasses.replace(found, t2i=found.t2i + np.float32(0.01))
    assert len(command.compare(moved)) == len(T2I) + 1  # every row, and the figure
    around = re.split("|".join(map(re.escape, (page.BEGIN, page.END))), page.PAGE.read_text())
    command.write(moved)
    assert command.compare(moved) == []
    assert figure.read_scores(page.FIGURE) == pytest.approx(moved.t2i, abs=1e-4)
    after = re.split("|".join(map(re.escape, (page.BEGIN, page.END))), page.PAGE.read_text())
    assert (after[0], after[2]) == (around[0], around[2])


def test_differences_of_words_and_lines_count():
    assert page.list_differences("a 0.100 b", "a 0.104 b") == []
    assert len(page.list_differences("a 0.100 b", "a 0.106 b")) == 1
    assert len(page.list_differences("a 0.100 b", "a 0.100 c")) == 1
    assert len(page.list_differences("a 0.100", "a nan")) == 1
    assert len(page.list_differences("a", "a\nb")) == 1


@pytest.mark.parametrize("text", ["", page.BEGIN, f"{page.END}\n{page.BEGIN}\n\n"])
def test_a_page_without_the_marks_is_refused(text):
    with pytest.raises(InputError, match="expected one section"):
        page.find_section(text)


def test_every_reward_of_the_registry_has_an_example():
    unscored = [one for one, _ in scoring.UNSCORED]
    shown = {one.reward for one in (*scoring.T2I, *scoring.MM2T, *scoring.OWN, *unscored)}
    # A reward of the length alone has no answer to show, that of a server no score of its own, and
    # GenEval's classes are none of the drawn world.
    names = {
        name
        for name, row in registry.REGISTRY.items()
        if not row.reads_lengths | bool(row.bind) and "geneval" not in row.columns
    }
    assert shown == names
    text = page.find_section(page.PAGE.read_text())
    assert all(f"`{name}`" in text for name in names)


@pytest.mark.parametrize("example", [one for one, _ in scoring.UNSCORED], ids=lambda e: e.label)
def test_commands_for_other_weights_want_only_the_weights(example, tmp_path, monkeypatch):
    """With an empty folder as weights nothing else is wrong; `spice` may miss its parser too."""
    monkeypatch.chdir(cases.ROOT)
    words = shlex.split(page.write_command(example, folder=str(tmp_path)))
    assert words[:2] == ["corl-jax", "score"]
    with pytest.raises(InputError) as error:
        score.check_arguments(build_parser().parse_intermixed_args(words[2:]))
    known = ("networks.", f"reward: {example.reward}: option text_term: ")
    assert all(problem.startswith(known) for problem in error.value.problems)


def test_the_cases_are_small_and_the_real_image_is_the_row():
    files = [*cases.FOLDER.iterdir(), page.FIGURE]
    assert sum(file.stat().st_size for file in files) < 300_000
    with Image.open(page.FIGURE) as image:
        assert image.width <= 1200
    row = generator.make_row(cases.ROW_SEED, cases.ROW, split="test", encode=False)
    first = cases.load_cases(cases.DRAWINGS)[0]
    assert np.array_equal(np.asarray(cases.open_image(first)), row["real_image"])
    assert first["prompt"] == row["prompt"]


def test_files_that_exist_are_never_touched(tmp_path, monkeypatch):
    folder = shutil.copytree(cases.FOLDER, tmp_path / "rewards")
    monkeypatch.setattr(cases, "FOLDER", folder)
    monkeypatch.setattr(cases, "DRAWINGS", folder / "drawings.jsonl")
    monkeypatch.setattr(cases, "ANSWERS", folder / "answers.jsonl")
    cases.ANSWERS.unlink()
    cases.DRAWINGS.write_text("mine")
    cases.write_missing()
    assert cases.DRAWINGS.read_text() == "mine"
    assert len(cases.load_cases(cases.ANSWERS)) == sum(map(len, cases.ANSWER_TEXTS.values()))
