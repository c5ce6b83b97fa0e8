"""GenEval in process: the detectors, the colours that are asked for, and the suite on a folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from corl_jax.data.column_values import find_value_problem
from corl_jax.data.geneval_demands import CLASSES, parse_demand
from corl_jax.errors import InputError
from corl_jax.evaluate.__main__ import main
from corl_jax.evaluation.geneval import agreement, detector, scoring
from corl_jax.evaluation.geneval.detections import Detection
from corl_jax.evaluation.geneval.summary import ImageResult
from corl_jax.evaluation.units import read_units
from corl_jax.params import flatten
from corl_jax.rewards.samples import Network
from corl_jax.weights.layouts.mask2former import TABLES
from tests.support.tiny_detector import clip_dir, detector_dir, detector_params, draw_images
from tests.support.tiny_networks import MASK2FORMER


@pytest.fixture(scope="module")
def ours():
    network = Network(MASK2FORMER, detector_params(), Path("tiny"), jnp.float32)
    return detector.make_detector(network, images_at_once=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    return {"detector": detector_dir(root / "detector"), "clip": clip_dir(root / "clip")}


def assert_same(first, second, tolerance: float) -> None:
    """The same classes, scores and boxes, and masks equal but at their borders."""
    assert first.keys() == second.keys()
    for name in first:
        for a, b in zip(first[name], second[name], strict=True):
            assert a.score == pytest.approx(b.score, abs=tolerance)
            assert np.mean(a.mask == b.mask) > 0.99 and np.abs(np.subtract(a.box, b.box)).max() <= 1


# ---- detectors


def test_images_of_any_size_are_detected_as_alone(ours):
    images = [
        *draw_images(4),
        *draw_images(1, (30, 44)),
        Image.fromarray(draw_images(1, seed=9)[0]),
    ]
    found = ours.detect(images)
    assert len({name for objects in found for name in objects}) >= 3
    for image, objects in zip(images[-3:], found[-3:], strict=True):
        assert_same(objects, ours.detect([image])[0], 1e-3)
    height, width = 30, 44
    for name, boxes in found[4].items():
        assert name in CLASSES
        scores = [box.score for box in boxes]
        assert scores == sorted(scores, reverse=True) and min(scores) > 0.3
        for box in boxes:
            assert box.mask.shape == (height, width) and box.mask.dtype == bool
            rows, columns = np.nonzero(box.mask)
            edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert box.box == edges
    assert ours.name == "GenEval (JAX detector, float32)"


def test_large_images_come_in_smaller_groups():
    images = [np.zeros((*sides, 3), np.uint8) for sides in [(8, 8)] * 5 + [(2048, 1024)] * 3]
    groups = [(numbers, x.shape[1:3]) for numbers, x in detector.group_images(images, 4)]
    small, large = (8, 8), (2048, 1024)
    assert groups == [([0, 1, 2, 3], small), ([4], small), ([5, 6], large), ([7], large)]
    huge = [np.zeros((2048, 2048, 3), np.uint8)] * 2
    assert [numbers for numbers, _ in detector.group_images(huge, 2)] == [[0], [1]]


def by_part(piece) -> tuple[int, int]:
    return piece[0]


def test_transformers_detector_finds_the_same(ours, tmp_path):
    flat = flatten(detector_params())
    state: dict[str, list] = {}
    for slot in TABLES["transformers"].make_slots({path: x.shape for path, x in flat.items()}):
        leaf = flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer]
        tensor = slot.transform.to_torch(np.asarray(leaf))
        state.setdefault(slot.key, []).append((slot.part, tensor))
    save_file(
        {
            key: np.ascontiguousarray(np.concatenate([x for _, x in sorted(parts, key=by_part)]))
            for key, parts in state.items()
        },
        tmp_path / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    sizes, swin = MASK2FORMER, MASK2FORMER.backbone
    config = {
        "model_type": "mask2former", "feature_size": 32, "hidden_dim": 32,
        "mask_feature_size": sizes.mask_size, "num_queries": sizes.num_queries,
        "encoder_feedforward_dim": 24, "dim_feedforward": 24, "encoder_layers": 1,
        "decoder_layers": 4, "num_attention_heads": 4, "num_labels": 80,
        "id2label": {n: str(n) for n in range(80)}, "label2id": {str(n): n for n in range(80)},
        "backbone_config": {
            "model_type": "swin", "embed_dim": swin.width, "depths": swin.depths,
            "num_heads": swin.num_heads, "window_size": swin.window_size,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = dataclasses.replace(
        detector.load_torch_detector(tmp_path), shorter_side=40, longer_side=64
    )
    assert theirs.name == "GenEval (transformers detector)"
    images = [*draw_images(1), *draw_images(1, (30, 44))]
    for first, second in zip(ours.detect(images), theirs.detect(images), strict=True):
        assert_same(first, second, 1e-3)
    with pytest.raises(InputError, match="transformers cannot load a Mask2Former"):
        detector.load_torch_detector(tmp_path / "nowhere")


def test_other_classes_are_refused():
    network = Network(dataclasses.replace(MASK2FORMER, num_classes=20), {}, Path("x"), jnp.float32)
    with pytest.raises(InputError, match="x: knows 20 classes; expected COCO's 80"):
        detector.make_detector(network)
    assert len(set(CLASSES)) == 80 and CLASSES[64:67] == (
        "computer mouse", "tv remote", "computer keyboard"
    )  # fmt: skip


# ---- colours and verdicts


def test_only_boxes_that_decide_are_shown_to_the_classifier():
    mask = np.ones((8, 8), bool)
    boxes = [Detection((0, 0, 4 + n, 4), 0.95 - n / 10, mask=mask) for n in range(4)]

    class Fake:
        name = "fake"

        def detect(self, images):
            return [{"dog": list(boxes), "cat": [boxes[0]]} for _ in images]

    def classify(crops, names):
        asked.extend((name, crop.size) for name, crop in zip(names, crops, strict=True))
        return ["red", "blue", "red"][: len(crops)]

    asked: list = []
    demand = {
        "tag": "colors",
        "prompt": "p",
        "include": [{"class": "dog", "count": 2, "color": "red"}],
    }
    plain = {"tag": "single_object", "prompt": "q", "include": [{"class": "cat", "count": 1}]}
    images = np.zeros((2, 8, 8, 3), np.uint8)
    verdicts = scoring.score_geneval_images(images, [demand, plain], Fake(), classify)
    assert asked == [("dog", (4, 4)), ("dog", (5, 4))]
    assert [verdict.correct for verdict in verdicts] == [False, True]
    assert verdicts[0].reason == "expected red dog>=2, found 1 red; and 1 red, 1 blue"
    with pytest.raises(InputError, match="no CLIP to name colours"):
        scoring.score_geneval_images(images, [demand, plain], Fake(), None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('{"tag": "a", "prompt": "b", "include": [{"class": "mouse", "count": 1}]}',
         "class is 'mouse', which the detector does not know; did you mean house"),
        ('{"tag": "a", "prompt": "b", "include": [{"class": "dog", "count": 1, "color": "grey"}]}',
         "color is 'grey'; expected one of red, orange"),
        ('{"tag": "a", "prompt": "b"}', "demands nothing"),
        ('{"prompt": "b", "include": [{"class": "dog", "count": 0}]}', "count is 0"),
        ("[1]", "expected a line of GenEval's"),
        ("{", "which is not JSON"),
    ],
)  # fmt: skip
def test_demands_that_cannot_be_judged(value, expected):
    problem = find_value_problem("geneval", value)
    assert problem is not None
    assert expected.replace("; did you mean house", "") in problem


def test_demands_of_a_table_lose_its_nulls():
    row = {
        "tag": "a", "prompt": "b", "exclude": None,
        "include": [{"class": "dog", "count": 2.0, "color": None, "position": None}],
    }  # fmt: skip
    expected = {"tag": "a", "prompt": "b", "include": [{"class": "dog", "count": 2}]}
    assert parse_demand(row) == expected and find_value_problem("geneval", None) is None


# ---- agreement


def results(verdicts: str, tag: str = "colors", digits: int = 4) -> list[ImageResult]:
    return [
        ImageResult(f"x/{n:05}/samples/{0:0{digits}}.png", tag, str(n), letter == "1", str(n))
        for n, letter in enumerate(verdicts)
    ]


def test_kappa_by_hand():
    found = agreement.measure_agreement(results("11110000"), results("11101000", digits=5))
    # 6 of 8 are equal; by chance 0.5 x 0.5 + 0.5 x 0.5: (0.75 - 0.5) / 0.5
    assert found["colors"] == found["all"] == agreement.Agreement(8, 0.75, 0.5)
    assert agreement.measure_agreement(results("11"), results("11"))["all"].kappa is None
    assert "colors      8  75.00%  0.500" in agreement.format_agreement(found, "there")
    with pytest.raises(InputError, match="has the tag position"):
        agreement.measure_agreement(results("1"), results("1", "position"))
    with pytest.raises(InputError, match="has none of these images"):
        agreement.measure_agreement(results("1")[:1], results("11")[1:])


# ---- the suite


@pytest.fixture
def drawn(tmp_path, ours):
    """The folder of --suite geneval: three prompts, two images each."""
    images = draw_images(6)
    top = max(ours.detect(images[:1])[0].items(), key=lambda item: item[1][0].score)[0]
    demands = [
        {"tag": "single_object", "prompt": "a", "include": [{"class": top, "count": 1}]},
        {"tag": "colors", "prompt": "b", "include": [{"class": top, "count": 1, "color": "red"}]},
        {"tag": "counting", "prompt": "c", "include": [{"class": "zebra", "count": 2}],
         "exclude": [{"class": "zebra", "count": 3}]},
    ]  # fmt: skip
    for number, demand in enumerate(demands):
        folder = tmp_path / "drawn" / "images" / f"{number:05}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(demand))
        for sample in range(2):
            picture = Image.fromarray(images[2 * number + sample])
            picture.save(folder / "samples" / f"{sample:04}.png")
    return tmp_path / "drawn"


def detect(drawn, folders, out, *options) -> None:
    main([
        "--suite", "geneval-detect", "--images", str(drawn), "--detector", str(folders["detector"]),
        "--clip", str(folders["clip"]), "--out", str(out), "--batch-size", "1", *options,
    ])  # fmt: skip


def test_the_suite_writes_official_results_and_agrees_with_itself(drawn, folders, tmp_path, capsys):
    (drawn / "manifest.json").write_text('{"settings": {"seed": 20}}')
    detect(drawn, folders, tmp_path / "first")
    printed = capsys.readouterr().out
    assert printed.startswith("GenEval (JAX detector, float32)\n\nSummary")
    rows = [json.loads(x) for x in (tmp_path / "first" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and list(rows[0]) == [
        "filename", "tag", "prompt", "correct", "reason", "metadata", "details"
    ]  # fmt: skip
    assert rows[0]["correct"] and rows[0]["filename"].endswith("00000/samples/0000.png")
    assert rows[5]["reason"] == "expected zebra>=2, found 0"
    details = json.loads(rows[0]["details"])
    assert all(len(box) == 5 and box[4] > 0.3 for boxes in details.values() for box in boxes)
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert report["settings"]["judged"] == "GenEval (JAX detector, float32)"
    assert report["settings"]["seed"] == 20
    assert report["scores"]["tags"]["single_object"]["hits"] >= 1 and report["agreement"] == {}
    assert [unit.name for unit in read_units(tmp_path / "first")] == ["00000", "00001", "00002"]
    results_file = tmp_path / "first" / "results.jsonl"
    detect(drawn, folders, tmp_path / "second", "--against", str(results_file))
    assert f"Agreement with {results_file}" in capsys.readouterr().out
    report = json.loads((tmp_path / "second" / "report.json").read_text())
    assert report["agreement"]["all"] == {"images": 6, "equal": 1.0, "kappa": 1.0}


def test_all_problems_of_a_folder_are_named_before_any_device(drawn, folders, tmp_path, capsys):
    images = drawn / "images"
    (images / "00000" / "metadata.jsonl").write_text(
        '{"tag": "a", "prompt": "a", "include": [{"class": "sofa", "count": 1}]}'
    )
    picture = images / "00001" / "samples" / "0000.png"
    picture.write_bytes(picture.read_bytes()[:-30])
    for path in (images / "00002" / "samples").iterdir():
        path.unlink()
    with pytest.raises(SystemExit) as caught:
        main([
            "--suite", "geneval-detect", "--images", str(drawn), "--detector",
            str(folders["clip"]), "--out", str(tmp_path / "out"), "--batch-size", "0",
            "--against", str(tmp_path / "none.jsonl"),
        ])  # fmt: skip
    assert caught.value.code == 2
    err = capsys.readouterr().err
    for line in (
        "--batch-size: found 0", "00000/metadata.jsonl: metadata: include[0]: class is 'sofa'",
        "00001/samples/0000.png: cannot be read", "00002/samples: found no images",
        "--detector: ", "none.jsonl",
    ):  # fmt: skip
        assert line in err, line
    assert not (tmp_path / "out").exists()


def test_colours_need_a_clip(drawn, folders, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([
            "--suite", "geneval-detect", "--images", str(drawn), "--detector",
            str(folders["detector"]), "--out", str(tmp_path / "out"),
            "--backend", "transformers",
        ])  # fmt: skip
    err = capsys.readouterr().err
    assert "--clip: is missing; 2 images have demands with colours" in err
    assert "has the layout jax; expected transformers' for --backend transformers" in err
