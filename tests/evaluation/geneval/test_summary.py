"""GenEval's summary by hand, and the command from files of detections or results to a folder."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from transformers import CLIPTokenizerFast

from corl_jax.compare import __main__ as compare
from corl_jax.data.drawn_world import checker, generator
from corl_jax.errors import InputError
from corl_jax.evaluate.__main__ import main
from corl_jax.evaluation.geneval import colors, summary
from corl_jax.evaluation.geneval.detections import Detection, parse_detections, read_rows
from corl_jax.evaluation.geneval.summary import ImageResult
from corl_jax.evaluation.scores import Score
from corl_jax.models.clip import Clip
from corl_jax.params import flatten
from corl_jax.rewards.samples import Network
from corl_jax.weights.kinds import NETWORK_TYPE
from corl_jax.weights.own_config import FORMAT_VERSION
from tests.evaluation.geneval.test_rules import as_demand, as_detections
from tests.rewards.test_clip_scores import MERGES, TINY, VOCAB, drawn, features


def result(folder, tag, correct, prompt=None):
    prompt = prompt or f"p{folder}"
    return ImageResult(f"out/{folder}/samples/0.png", tag, prompt, correct, json.dumps([prompt]))


RESULTS = [
    result("00000", "colors", True), result("00000", "colors", False),
    result("00001", "colors", False), result("00001", "colors", False),
    result("00002", "position", True), result("00002", "position", True),
]  # fmt: skip


def test_the_official_text():
    text = summary.format_official(summary.summarize_results(RESULTS))
    assert text == (
        "Summary\n=======\nTotal images: 6\nTotal prompts: 3\n% correct images: 50.00%\n"
        "% correct prompts: 66.67%\n\nTask breakdown\n==============\n"
        "colors           = 25.00% (1 / 4)\nposition         = 100.00% (2 / 2)\n\n"
        "Overall score (avg. over tasks): 0.62500"
    )


def test_intervals_are_over_prompts_within_tags():
    scores = summary.summarize_results(RESULTS)
    # Two prompts with means 0.5 and 0: the mean of two draws is 0, 0.25 or 0.5.
    assert scores.tags["colors"].score == Score(0.25, 0, 0.5)
    assert scores.tags["position"].score == Score(1, 1, 1)
    assert scores.overall == Score(0.625, 0.5, 0.75)
    # Images, not prompts, are averaged, as in the official script.
    more = [*RESULTS, result("00000", "colors", True)]
    assert summary.summarize_results(more).tags["colors"].score.mean == 0.4


def test_what_makes_it_another_score_is_said():
    warnings = summary.find_incomplete([*RESULTS, result("00000", "colours", True)])
    text = "\n".join(warnings)
    assert "no images of single_object, two_object, counting, color_attr" in text
    assert "colours: no tag of GenEval" in text and "4 prompts; GenEval has 553" in text
    assert "between 1 and 2 images" in text
    complete = [
        result(f"{tag}{n}", tag, True)
        for tag, count in summary.PROMPTS.items()
        for n in range(count)
    ]
    complete = [dataclasses.replace(x, filename="x.png") for x in complete]
    assert not summary.find_incomplete(complete)


def test_the_demand_tells_prompts_apart():
    """As in the official summary, which groups images by their metadata."""
    images = [
        result("00000", "colors", True), result("00000", "colors", False, "x"),
        result("00000", "colors", False),
    ]  # fmt: skip
    units = {unit.name: unit.values["correct"] for unit in summary.make_units(images)}
    assert units == {"00000": 0.5, "00000 (1)": 0.0}
    assert sorted(map(tuple, summary.count_hits(images)["colors"])) == [(0, 1), (1, 2)]
    assert summary.summarize_results(images).prompts == 2


# ---- the command


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def line(number, tag, include, *found, prompt="a prompt"):
    return {
        "filename": f"{number:05}/samples/0000.png",
        "metadata": {"tag": tag, "prompt": prompt, "include": include},
        "detections": [dict(zip(("class", "score", "box", "color"), item)) for item in found],
    }


LINES = (
    line(0, "colors", [{"class": "dog", "count": 1, "color": "red"}],
         ("dog", 0.9, [0, 0, 4, 4], "red"), ("dog", 0.95, [2, 2, 8, 8], "blue")),
    line(1, "two_object", [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}],
         ("cat", 0.4, [0, 0, 4, 4]), ("dog", 0.31, [0, 0, 5, 5])),
)  # fmt: skip


def score(*arguments):
    main(["--suite", "geneval-score", *map(str, arguments)])


def test_detections_are_judged_and_the_results_summarised_again(tmp_path, capsys):
    path = write_lines(tmp_path / "d.jsonl", *LINES)
    score("--results", path, "--out", tmp_path / "out")
    printed = capsys.readouterr()
    assert "Overall score (avg. over tasks): 0.50000" in printed.out
    assert "2 prompts; GenEval has 553" in printed.err
    rows = [row for _, row in read_rows(tmp_path / "out" / "results.jsonl")]
    assert list(rows[0]) == [
        "filename", "tag", "prompt", "correct", "reason", "metadata", "details"
    ]  # fmt: skip
    assert rows[0]["reason"] == "expected red dog>=1, found 0 red; and 1 blue"
    assert json.loads(rows[0]["details"]) == {"dog": [[2, 2, 8, 8, 0.95], [0, 0, 4, 4, 0.9]]}
    assert json.loads(rows[1]["metadata"]) == LINES[1]["metadata"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["judged"] == "rules" and report["scores"]["overall"]["mean"] == 0.5
    units = [row for _, row in read_rows(tmp_path / "out" / "scores.jsonl")]
    assert units[1] == {"unit": "00001", "category": "two_object", "values": {"correct": 1.0}}
    score("--results", tmp_path / "out" / "results.jsonl", "--out", tmp_path / "again")
    assert capsys.readouterr().out == printed.out
    scores = [(tmp_path / name / "scores.jsonl").read_text() for name in ("out", "again")]
    assert scores[0] == scores[1]


def test_the_drawn_world_through_the_command(tmp_path, capsys):
    """Right and wrong images of each category: the command's verdicts are the exact checker's."""
    rows = [generator.make_row(11, number, encode=False) for number in range(200)]
    lines, expected = [], []
    for number, row in enumerate(rows):
        spec = json.loads(row["spec"])
        # Every second image is that of another row with the same category, if there is one.
        same = [other for other in rows if other["category"] == row["category"]]
        image = (same[0] if number % 2 else row)["real_image"]
        lines.append({
            "filename": f"{number:05}/samples/0000.png",
            "metadata": as_demand(spec) | {"prompt": row["prompt"]},
            "detections": [
                {"class": name, "score": box.score, "box": list(box.box), "color": box.color}
                for name, boxes in as_detections(image).items()
                for box in boxes
            ],
        })  # fmt: skip
        expected.append(checker.check(image, spec, strict=False))
    score("--results", write_lines(tmp_path / "d.jsonl", *lines), "--out", tmp_path / "out")
    results = [row for _, row in read_rows(tmp_path / "out" / "results.jsonl")]
    assert [row["correct"] for row in results] == expected
    assert 100 <= sum(expected) < 180
    assert "no images of" not in capsys.readouterr().err


def test_the_report_has_the_settings_of_the_drawn_images(tmp_path, capsys):
    path = write_lines(tmp_path / "d.jsonl", *LINES)
    for seed in (20, 21):
        drawn = tmp_path / f"drawn{seed}"
        drawn.mkdir()
        manifest = {"settings": {"suite": "geneval", "model": "m", "seed": seed}}
        (drawn / "manifest.json").write_text(json.dumps(manifest))
        score("--results", path, "--drawn", drawn, "--out", tmp_path / f"out{seed}")
        settings = json.loads((tmp_path / f"out{seed}" / "report.json").read_text())["settings"]
        assert settings["suite"] == "geneval-score" and settings["seed"] == seed
    capsys.readouterr()
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "out20"), str(tmp_path / "out21")])
    assert "setting seed: A has 20, B has 21" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        score("--results", path, "--drawn", tmp_path)
    assert "manifest.json: cannot be read" in capsys.readouterr().err


def test_options_without_effect_are_said(tmp_path, capsys):
    path = write_lines(tmp_path / "r.jsonl", dataclasses.asdict(RESULTS[0]))
    score("--results", path, "--max-overlap", 0.5)
    assert "warning: --max-overlap: has no effect" in capsys.readouterr().err
    path = write_lines(tmp_path / "d.jsonl", *LINES)
    score("--results", path, "--dtype", "float32", "--max-overlap", 0.5)
    printed = capsys.readouterr().err
    assert "warning: --dtype: has no effect; only --clip reads it" in printed
    assert "--max-overlap" not in printed


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([LINES[0] | {"detections": [{"class": "dog", "score": 0.9, "box": [0, 0, 4, 4]}]}],
         ["00000/samples/0000.png: a colour of dog is demanded", "masks and a CLIP"]),
        ([line(0, "colors", [], ("dog", "high", [0, 0, 4])), line(1, "colors", [{"class": 3}])],
         ["d.jsonl:1: detections[0]: box is [0, 0, 4]", "score is 'high'", "d.jsonl:2: metadata"]),
        ([line(0, "colors", [], ("dog", 0.5, [9, 0, 4, 4]))], ["x0 <= x1"]),
        ([LINES[0], LINES[0]], ["00000/samples/0000.png stands twice"]),
        ([{"filename": "a", "tag": "b", "prompt": "c", "metadata": "d", "correct": 1}],
         ["correct is 1; expected true or false"]),
        ([[1]], ["d.jsonl:1: found list; expected an object"]),
        ([], ["found no lines"]),
    ],
)  # fmt: skip
def test_files_that_are_refused(rows, parts, tmp_path, capsys):
    path = write_lines(tmp_path / "d.jsonl", *rows)
    with pytest.raises(SystemExit) as ended:
        score("--results", path)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and all(part in printed for part in parts), printed


# ---- colours by CLIP

CLIP = dataclasses.replace(TINY, context_length=64)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP with a tokenizer of all bytes."""
    folder = tmp_path_factory.mktemp("clip")
    save_file(
        {name: np.asarray(x) for name, x in flatten(drawn(Clip, CLIP, 0)).items()},
        folder / "model.safetensors",
    )
    config = {
        "model_type": NETWORK_TYPE, "format_version": FORMAT_VERSION, "network": "clip",
        "sizes": dataclasses.asdict(CLIP),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    CLIPTokenizerFast(vocab=VOCAB, merges=MERGES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    return Network(CLIP, drawn(Clip, CLIP, 0), clip_folder, np.float32)


def picture(seed=0, size=(48, 40)):
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3))
    return Image.fromarray(values.astype(np.uint8))


def test_crops_are_grey_outside_of_the_mask():
    image, mask = picture(), np.zeros((40, 48), bool)
    mask[10:20, 5:9] = True
    crop = np.asarray(colors.crop_object(image, Detection((3.5, 8.4, 10.6, 22.5), 1, None, mask)))
    # Rounded to even at a half, as Pillow does: 4 .. 11 and 8 .. 22.
    assert crop.shape == (14, 7, 3)
    assert (crop[0] == 0x99).all()
    assert np.array_equal(crop[2:12, 1:5], np.asarray(image)[10:20, 5:9])
    assert (crop[2:12, 5:] == 0x99).all()
    whole = np.asarray(colors.crop_object(image, Detection((1, 2, 4, 6), 1)))
    assert np.array_equal(whole, np.asarray(image)[2:6, 1:4])
    assert colors.crop_object(image, Detection((1.2, 2, 1.3, 6), 1)).size == (1, 4)
    with pytest.raises(InputError, match="has 3 x 2 pixels, its image 48 x 40"):
        colors.crop_object(image, Detection((0, 0, 1, 1), 1, None, np.ones((2, 3), bool)))


def test_the_shorter_side_is_resized_and_the_middle_kept():
    image = picture(size=(30, 10))
    # 30 x 10 -> int(24 * 3) x 24, and its middle 24 columns.
    resized = np.asarray(image.resize((72, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(colors.resize_crop(image, 24), resized[:, 24:48])
    assert np.array_equal(
        colors.resize_crop(picture(size=(24, 24)), 24), np.asarray(picture(size=(24, 24)))
    )


def expect_color(clip, crop, name):
    """One crop, one prompt at a time."""
    pixels = colors.resize_crop(crop, CLIP.image_size) / 255
    pixels = ((pixels - CLIP.image_mean) / CLIP.image_std).astype(np.float32)[None]
    image = np.asarray(features(CLIP, "image_features", clip.params, pixels))[0]
    ids = colors.tokenize_prompts(clip, colors.make_prompts(name))
    texts = np.asarray(features(CLIP, "text_features", clip.params, ids))
    units = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    means = units.reshape(10, 3, -1).mean(1)
    cosines = means @ image / np.linalg.norm(means, axis=1)
    return colors.COLORS[int(cosines.argmax())]


def test_classified_colors(clip):
    prompts = colors.make_prompts("dog")
    assert prompts[:4] == [
        "a photo of a red dog", "a photo of a red-colored dog", "a photo of a red object",
        "a photo of a orange dog",
    ]  # fmt: skip
    assert len(prompts) == 30
    image = picture(3)
    boxes = [Detection((x, x // 2, x + 9, x + 7), 0.9) for x in range(0, 35, 7)]
    names = colors.make_color_classifier(clip)(image, "dog", boxes)
    crops = [colors.crop_object(image, box) for box in boxes]
    assert names == [expect_color(clip, crop, "dog") for crop in crops]
    assert colors.make_color_classifier(clip)(image, "dog", []) == []
    # Crops of several classes at once are classified as each alone.
    both = colors.make_crop_classifier(clip)([crops[0], crops[1]], ["dog", "cat"])
    assert both == [expect_color(clip, crops[0], "dog"), expect_color(clip, crops[1], "cat")]


def test_the_command_sees_colors_under_masks(clip, clip_folder, tmp_path, capsys):
    rows = []
    for number in range(3):
        row = line(number, "colors", [{"class": "dog", "count": 1, "color": "red"}],
                   ("dog", 0.5, [0, 0, 9, 9]), ("dog", 0.9, [4, 6, 40, 30], "red"))  # fmt: skip
        row["detections"][1]["mask"] = {"size": [40, 48], "counts": [200, 900, 820]}
        rows.append(row)
        folder = tmp_path / "images" / f"{number:05}" / "samples"
        folder.mkdir(parents=True)
        picture(number).save(folder / "0000.png")
    path = write_lines(tmp_path / "d.jsonl", *rows)
    arguments = ("--results", path, "--clip", clip_folder, "--images", tmp_path / "images")
    score(*arguments, "--out", tmp_path / "out")
    mask = (np.arange(1920) >= 200) & (np.arange(1920) < 1100)
    box = Detection((4, 6, 40, 30), 0.9, None, mask.reshape(48, 40).T)
    for number, (_, row) in enumerate(read_rows(tmp_path / "out" / "results.jsonl")):
        color = expect_color(clip, colors.crop_object(picture(number), box), "dog")
        assert row["correct"] == (color == "red")
        if color != "red":
            assert row["reason"] == f"expected red dog>=1, found 0 red; and 1 {color}"
    del rows[1]["detections"][1]["mask"]
    rows[2]["filename"] = "missing.png"
    write_lines(path, *rows)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        score(*arguments)
    printed = capsys.readouterr().err
    assert "line 2: 00001/samples/0000.png: dog: its box [4, 6, 40, 30] has no mask" in printed
    assert "missing.png: cannot be read" in printed and "--images" in printed


def test_lines_may_hold_the_demand_themselves(tmp_path):
    row = LINES[0]["metadata"] | {"filename": "x.png", "detections": []}
    images = parse_detections(tmp_path, [(1, row)])
    assert images[0].metadata == LINES[0]["metadata"]
