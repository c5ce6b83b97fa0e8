"""What each harness reads, on made-up clones of its layout and counts."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from corl_jax.errors import InputError
from corl_jax.evaluation.writers import WRITERS, read_prompt_list
from corl_jax.evaluation.writers.writer import Outcome, hash_prompts, join_in_grid
from tests.support import harness_clones

CLONES = {
    "geneval": harness_clones.make_geneval,
    "geneval2": harness_clones.make_geneval2,
    "dpg": harness_clones.make_dpg,
    "wise": harness_clones.make_wise,
    "t2i_compbench": harness_clones.make_compbench,
}
COUNTS = {"geneval": 553, "geneval2": 800, "dpg": 1065, "wise": 1000, "t2i_compbench": 2400}


@pytest.fixture(scope="module")
def clones(tmp_path_factory):
    """Suite -> (path that --prompts names, root of the clone), in full size."""
    root = tmp_path_factory.mktemp("clones")
    return {name: (make(root / name), root / name) for name, make in CLONES.items()}


def outcome(tmp_path, suite, paths):
    prompts = read_prompt_list(suite, paths)
    return Outcome(tmp_path / "out", prompts, WRITERS[suite].images_per_prompt, 384)


def paths_of(suite, prompts, samples=None):
    writer = WRITERS[suite]
    return writer.list_files(prompts.prompts, samples or writer.images_per_prompt)


@pytest.mark.parametrize("suite", COUNTS)
def test_a_whole_clone_is_read_without_a_note(clones, suite):
    path, root = clones[suite]
    prompts = read_prompt_list(suite, [path])
    assert len(prompts.prompts) == COUNTS[suite]
    assert prompts.notes == ()
    assert len({p.name for p in prompts.prompts}) == COUNTS[suite]
    # The root of the clone is as good.
    assert read_prompt_list(suite, [root]).prompts == prompts.prompts


def test_images_of_each_suite(clones):
    counts = {
        suite: (len(files := paths_of(suite, read_prompt_list(suite, [path]))),
                sum(len(file.samples) for file in files))
        for suite, (path, _) in clones.items()
    }  # fmt: skip
    assert counts == {
        "geneval": (2212, 2212), "geneval2": (800, 800), "dpg": (1065, 4260), "wise": (1000, 1000),
        "t2i_compbench": (24000, 24000),
    }  # fmt: skip


def test_geneval_folders_are_what_its_scorer_reads(clones, tmp_path):
    run = outcome(tmp_path, "geneval", [clones["geneval"][0]])
    files = paths_of("geneval", run.prompts)
    assert files[5].path == "images/00001/samples/0001.png" and files[5].samples == (1,)
    for file in files:
        _, folder, samples, name = Path(file.path).parts
        assert folder.isdigit() and samples == "samples" and re.match(r"\d+\.png", name)
    side = WRITERS["geneval"].list_side_files(run)
    lines = clones["geneval"][0].read_text().splitlines()
    assert len(side) == 553
    for number in (0, 17, 552):
        text = side[f"images/{number:05d}/metadata.jsonl"]
        assert json.loads(text) == json.loads(lines[number])  # one object, as json.load wants


def test_geneval2_maps_each_prompt_to_its_image(clones, tmp_path):
    run = outcome(tmp_path, "geneval2", [clones["geneval2"][0]])
    (text,) = WRITERS["geneval2"].list_side_files(run).values()
    paths = json.loads(text)
    assert paths.keys() == {p.text for p in run.prompts.prompts}
    assert set(paths.values()) == {str(run.out / f.path) for f in paths_of("geneval2", run.prompts)}


def test_geneval2_draws_a_prompt_that_occurs_again_once(tmp_path):
    path = harness_clones.make_geneval2(tmp_path, 3)
    path.write_text(path.read_text() * 2)
    prompts = read_prompt_list("geneval2", [path])
    assert len(prompts.prompts) == 3 and "3 prompts occur again" in prompts.notes[-1]


def test_dpg_names_end_at_the_first_dot(clones):
    prompts = read_prompt_list("dpg", [clones["dpg"][0]])
    files = paths_of("dpg", prompts)
    assert files[-1].path == "images/partiprompts1.png"
    assert files[0].path == "images/COCOval2014_000000000001.png"
    assert files[0].samples == (0, 1, 2, 3)
    assert prompts.prompts[-1].text == "a red circle, number 0"  # stripped


def test_dpg_grid_has_top_left_top_right_bottom_left_bottom_right():
    images = [np.full((2, 2, 3), value, np.uint8) for value in (1, 2, 3, 4)]
    page = join_in_grid(images)
    assert page[..., 0].tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
    assert join_in_grid(images[:1]).shape == (2, 2, 3)
    assert join_in_grid(images[:3])[2:, 2:].max() == 0


def test_wise_takes_the_verified_edition_first_and_says_what_it_leaves(clones, tmp_path):
    _, root = clones["wise"]
    verified = read_prompt_list("wise", [root])
    assert verified.prompts[0].text == "number 1_verified"
    legacy = read_prompt_list("wise", [root / "WISE_legacy"])
    assert [p.text for p in legacy.prompts[-2:]] == ["number 999", "number 1000"]
    assert "natural_science_rewrite.json" in legacy.notes[0]
    named = sorted((root / "WISE_legacy" / "data").glob("*_rewrite.json"))
    rewritten = read_prompt_list("wise", named)
    assert rewritten.prompts[640].text == "number 641_rewrite" and rewritten.notes == ()
    files = paths_of("wise", rewritten)
    assert [f.path for f in files[:2]] == ["images/1.png", "images/2.png"]
    for prompts, word in ((verified, "IMAGE_DIR=/"), (legacy, "--image_dir /")):
        assert word in WRITERS["wise"].describe_next(Outcome(tmp_path / "out", prompts, 1, 384))


def test_compbench_numbers_run_over_a_category(clones):
    prompts = read_prompt_list("t2i_compbench", [clones["t2i_compbench"][0]])
    files = paths_of("t2i_compbench", prompts)
    by_folder = Counter(Path(file.path).parts[1] for file in files)
    assert by_folder == dict.fromkeys(harness_clones.COMPBENCH, 3000)
    for file in files:
        prompt = prompts.prompts[file.prompt]
        name = Path(file.path).name
        # As the scorers read it: the prompt, and the number that sorts the images.
        assert name.split("_")[0] == prompt.text and "\r" not in name
        number = int(name.split("_")[-1].removesuffix(".png"))
        assert number % 10 == file.samples[0] and number // 10 == file.prompt % 300
    assert files[-1].path.endswith("/complex/samples/a complex circle 299._002999.png")


def test_compbench_takes_single_lists(clones):
    folder = clones["t2i_compbench"][0]
    prompts = read_prompt_list("t2i_compbench", [folder / "spatial_val.txt"])
    assert {p.category for p in prompts.prompts} == {"spatial"} and len(prompts.prompts) == 300
    assert "no prompts of the categories color" in prompts.notes[0]


@pytest.mark.parametrize("suite", COUNTS)
def test_the_next_command_has_absolute_paths(clones, suite, tmp_path):
    run = outcome(tmp_path, suite, [clones[suite][0]])
    commands = [line for line in WRITERS[suite].describe_next(run).splitlines() if line[0] != "#"]
    assert commands
    words = [word for line in commands for word in shlex.split(line)]
    assert any(str(tmp_path / "out") in word for word in words)
    assert all(Path(w.split("=")[-1]).is_absolute() for w in words if str(tmp_path) in w)


@pytest.mark.parametrize("suite", COUNTS)
@pytest.mark.parametrize("other", COUNTS)
def test_prompts_of_another_suite_are_named(clones, suite, other):
    if suite == other:
        return
    with pytest.raises(InputError, match=f"give --suite {other}, or"):
        read_prompt_list(suite, [clones[other][0]])


def test_other_counts_are_noted(tmp_path):
    path = harness_clones.make_geneval(tmp_path / "a", {"counting": 3})
    assert read_prompt_list("geneval", [path]).notes == (
        "found 3 prompts; GenEval has 553: its published numbers use all",
    )
    folder = harness_clones.make_compbench(tmp_path / "b", 2)
    assert len(read_prompt_list("t2i_compbench", [folder]).notes) == 8


def _write(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


GENEVAL_LINE = '{"tag": "t", "include": [{}], "prompt": %s}\n'
BAD = [
    ("geneval", "a.jsonl", "", "found no line with text"),
    ("geneval", "a.jsonl", "a cat\n", "line 1: is not JSON"),
    ("geneval", "a.jsonl", GENEVAL_LINE % '"a"' + "[1]\n", "line 2: found a list"),
    ("geneval", "a.jsonl", '{"prompt": "a"}\n', "has no tag and no list include"),
    ("geneval", "a.jsonl", GENEVAL_LINE % '" "', "line 1: prompt: found an empty text"),
    ("geneval", "a.jsonl", GENEVAL_LINE % "null", "line 1: prompt: found NoneType"),
    ("geneval", "a.jsonl", GENEVAL_LINE % r'"\ud83d"', "lone surrogate"),
    ("geneval2", "a.jsonl", '{"prompt": "", "vqa_list": []}\n', "prompt is ''"),
    ("dpg", "a/b.txt", " \n", "b.txt: found an empty text"),
    ("dpg", "a.txt", "a cat", "is no folder"),
    ("wise", "a.json", "{}", "found dict"),
    ("wise", "a.json", '[{"Prompt": "a", "prompt_id": "x"}]', "prompt_id is 'x'"),
    ("wise", "a.json", '[{"Prompt": "a", "prompt_id": 1}, {"Prompt": "b", "prompt_id": 1}]',
     "prompt_id 1 occurs more than once"),
    ("t2i_compbench", "color_val.txt", "a/b\n", "expected a text without / and _"),
    ("t2i_compbench", "color_val.txt", "a_b\n", "expected a text without / and _"),
    ("t2i_compbench", "color_val.txt", "a" * 300, "too many for the name of a file"),
    ("t2i_compbench", "colour.txt", "a cat\n", "is no list of a category"),
    ("preference", "a.json", '["a"]', "begins with ["),
    ("preference", "a.tsv", "text\tcategory\na\tb\n", "has the columns text, category"),
    ("preference", "a.jsonl", '{"text": "a"}\n', "prompt: found NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(("suite", "name", "text", "message"), BAD)
def test_bad_prompts_are_refused(tmp_path, suite, name, text, message):
    path = _write(tmp_path, name, text)
    with pytest.raises(InputError, match=re.escape(message)):
        read_prompt_list(suite, [path.parent if "/" in name else path])


def test_two_dpg_names_that_are_equal_up_to_the_dot_are_refused(tmp_path):
    for name in ("a.1.txt", "a.2.txt"):
        _write(tmp_path, f"p/{name}", "a cat")
    with pytest.raises(InputError, match="several files are named a up to the first dot"):
        read_prompt_list("dpg", [tmp_path / "p"])


def test_all_bad_lines_are_told_together(tmp_path):
    path = _write(tmp_path, "a.jsonl", "x\ny\n" + GENEVAL_LINE % '""')
    with pytest.raises(InputError) as caught:
        read_prompt_list("geneval", [path])
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a cat\r\n\r\na dog\r\n"),
        ("a.jsonl", '{"prompt": "a cat", "tag": "pets"}\n{"prompt": "a dog", "tag": "pets"}\n'),
        ("a.tsv", "Prompt\tCategory\na cat\tpets\na dog\tpets\n"),
    ],
)
def test_lists_of_prompts_in_three_forms(tmp_path, name, text):
    prompts = read_prompt_list("preference", [_write(tmp_path, name, text)])
    assert [p.text for p in prompts.prompts] == ["a cat", "a dog"]
    assert {p.category for p in prompts.prompts} == ({""} if name == "a.txt" else {"pets"})


def test_the_hash_of_one_file_is_that_of_sha256sum(tmp_path):
    path = _write(tmp_path, "a.txt", "abc")
    other = _write(tmp_path, "b.txt", "abd")
    assert hash_prompts([path]).startswith("ba7816bf8f01cfea")
    assert (
        len({hash_prompts([path]), hash_prompts([path, other]), hash_prompts([other, path])}) == 3
    )
