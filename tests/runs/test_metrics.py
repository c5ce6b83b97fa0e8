"""Metrics and pictures of a run: what is written, what a resumed run does with it."""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator as accumulator

from corl_jax.metrics import Metric
from corl_jax.runs import append_log, log, pictures
from corl_jax.runs.directory import RunDir
from corl_jax.runs.json_lines import read_lines
from corl_jax.runs.log import RunLog, reduce_metrics
from corl_jax.runs.pace import Pace, Phases
from corl_jax.runs.tensorboard import Chart


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


HEADLINE = {"loss": "nan", "reward": "none"}


def write(run, steps, resumed_at=None, offset=0.0, **options):
    stream = options.pop("stream", None) or io.StringIO()
    with RunLog(run, resumed_at, stream=stream, headline=HEADLINE, **options) as metrics:
        for step in steps:
            metrics.add_metrics(step, {"reward": step + offset, "loss": np.float32(0.5)})
    return stream.getvalue()


def test_a_line_per_step(tmp_path):
    run = RunDir(tmp_path)
    with RunLog(run, stream=io.StringIO()) as metrics:
        metrics.add_metrics(1, {"reward": np.float32(0.5), "kl": float("nan"), "x": float("inf")})
        assert lines(run) == [{"step": 1, "reward": 0.5, "kl": None, "x": None}]  # not buffered
        metrics.add_metrics(2, {"reward": 1})
    assert [line["step"] for line in lines(run)] == [1, 2]


def test_resuming_drops_what_came_after_and_the_half_line(tmp_path):
    run = RunDir(tmp_path)
    write(run, range(1, 6))
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "rew')
    write(run, range(4, 7), resumed_at=3, offset=100)
    assert [(line["step"], line["reward"]) for line in lines(run)] == [
        (1, 1), (2, 2), (3, 3), (4, 104), (5, 105), (6, 106),
    ]  # fmt: skip
    assert [record["step"] for _, record in read_lines(run.metrics)] == [1, 2, 3, 4, 5, 6]


def test_starting_anew_drops_everything(tmp_path):
    run = RunDir(tmp_path)
    write(run, range(3))
    write(run, [1])
    assert [line["step"] for line in lines(run)] == [1]


def test_resuming_where_lines_end_changes_no_byte(tmp_path):
    run = RunDir(tmp_path)
    write(run, range(1, 4))
    before = run.metrics.read_bytes()
    write(run, [], resumed_at=3)
    assert run.metrics.read_bytes() == before


def test_only_the_first_process_writes(tmp_path):
    with RunLog(RunDir(tmp_path / "run"), primary=False) as metrics:
        metrics.add_metrics(1, {"a": 1.0})
        metrics.add_image(1, "i", np.zeros((2, 2, 3), np.uint8))
        metrics.add_text(1, "t", "x")
        metrics.say("hello")
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_one_curve_of_a_resumed_run(tmp_path):
    run = RunDir(tmp_path)
    write(run, range(6))
    stream = io.StringIO()
    with RunLog(run, 3, stream=stream) as metrics:
        for step in (4, 5):
            metrics.add_metrics(step, {"reward": step + 100.0, "nothing": float("nan")})
        metrics.add_image(5, "samples/fixed", np.full((4, 6, 3), 200, np.uint8))
        metrics.add_text(5, "answers", "| a |\n| --- |\n| b |")
    assert len(list(run.tensorboard.iterdir())) == 2
    events = accumulator.EventAccumulator(str(run.tensorboard)).Reload()
    values = [(event.step, event.value) for event in events.Scalars("reward")]
    assert values == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 104), (5, 105)]
    tags = events.Tags()
    assert "nothing" not in tags["scalars"] and tags["images"] == ["samples/fixed"]
    (picture,) = events.Images("samples/fixed")
    assert (picture.width, picture.height, picture.step) == (6, 4, 5)
    assert "answers/text_summary" in tags["tensors"]


def test_tensorboard_shows_alarms_once_they_sound(tmp_path):
    """Also in a resumed run, in which the alarm has ended; the file always has them."""
    run = RunDir(tmp_path)

    def log_steps(steps, resumed_at=None):
        with RunLog(run, resumed_at, stream=io.StringIO(), quiet=("alarm/",)) as metrics:
            for step in steps:
                sounds = float(step == 2)
                metrics.add_metrics(step, {"alarm/kl": sounds, "alarm/entropy": 0.0, "loss": 0.0})

    log_steps([1, 2, 3])
    log_steps([4], resumed_at=3)
    assert [step for step, tag in events(run) if tag == "alarm/kl"] == [2, 3, 4]
    assert {tag for _, tag in events(run) if tag} == {"alarm/kl", "loss"}
    assert all({"alarm/kl", "alarm/entropy"} < line.keys() for line in lines(run))


def test_tensorboard_reads_histograms_layout_and_options(tmp_path):
    run = RunDir(tmp_path)
    with RunLog(run, stream=io.StringIO()) as metrics:
        assert metrics.needs_layout
        counts, edges = np.histogram([1.0, 1.0, 3.0], 4)
        metrics.add_histogram(1, "rewards", counts, edges)
        metrics.add_layout(1, {"Health": {"loss": Chart("Multiline", ("^loss$",))}})
        metrics.add_hparams(1, {"seed": 3, "lora": None, "name": "grpo"}, ["reward"])
        assert not metrics.needs_layout
    shown = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (histogram,) = shown.Histograms("rewards")
    value = histogram.histogram_value
    assert (value.min, value.max, value.num) == (1, 3, 3) and value.bucket == [2, 0, 0, 1]
    assert value.bucket_limit == [1.5, 2, 2.5, 3]
    assert {"custom_scalars__config__", "_hparams_/session_start_info"} <= {
        tag for _, tag in events(run)
    }


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    pace = Pace()
    text = write(RunDir(tmp_path), [1], total_steps=4, pace=pace)
    for _ in range(2):
        pace.add_step(1.5)
    text += write(RunDir(tmp_path), [2], total_steps=2404, pace=pace)
    first, second = text.splitlines()
    assert first == "step 1/4  loss 0.5  reward 1"
    assert second == "step 2/2404  loss 0.5  reward 2  1.5 s/step  1 h 0 min left"
    assert "\r" not in text and "\x1b" not in text


def test_a_reward_that_applies_to_nothing_is_no_overflow(tmp_path):
    stream, nan = io.StringIO(), float("nan")
    with RunLog(RunDir(tmp_path), stream=stream, headline=HEADLINE) as metrics:
        metrics.add_metrics(1, {"reward": nan, "loss": nan, "kl": nan})
    assert stream.getvalue() == "step 1  loss nan  reward none\n"


def test_numbers_of_several_processes_become_one(monkeypatch):
    metrics = {
        "same": Metric(1.0), "mean": Metric(2.0, "mean"), "sum": Metric(np.float32(3), "sum"),
        "largest": Metric(4.0, "max"), "largest too": Metric(9.0, "max"),
    }  # fmt: skip
    assert reduce_metrics(metrics) == {name: float(metric) for name, metric in metrics.items()}
    # The other process has measured 1 more of each.
    monkeypatch.setattr(log.processes, "all_gather", lambda own: np.stack([own, own + 1]))
    assert reduce_metrics(metrics) == {
        "same": 1.0, "mean": 2.5, "sum": 7.0, "largest": 5.0, "largest too": 10.0
    }  # fmt: skip


def test_a_bar_on_a_terminal_with_evaluations_above_it(tmp_path):
    stream, pace = Terminal(), Pace()
    for _ in range(2):
        pace.add_step(2.0)
    with RunLog(RunDir(tmp_path), 2, 5, stream=stream, headline=HEADLINE, pace=pace) as metrics:
        metrics.add_metrics(3, {"reward": 0.25})
        time.sleep(0.12)  # tqdm draws at most ten times a second
        metrics.add_metrics(4, {"reward": 0.75})
        metrics.add_metrics(4, {"eval/accuracy": 0.5, "eval/b": float("nan")}, is_evaluation=True)
        metrics.add_metrics(4, {"reward": 0.125}, is_evaluation=True)  # a headline
        metrics.say("saved")
    text = stream.getvalue()
    assert "4/5" in text and "reward 0.75" in text and "\r" in text
    assert "step 4/5  eval/accuracy 0.5  eval/b none  2 s/step  2 s left\n" in text
    assert "step 4/5  reward 0.125  2 s/step  2 s left\n" in text
    assert "saved\n" in text


def test_phases_add_up_and_start_again():
    phases = Phases()
    for _ in range(2):
        with phases("rollout"):
            time.sleep(0.01)
    with pytest.raises(KeyError), phases("reward"):
        raise KeyError
    seconds = phases.take()
    assert list(seconds) == ["phase/rollout_seconds", "phase/reward_seconds"]
    assert seconds["phase/rollout_seconds"] >= 0.02
    assert phases.take() == {}


def test_tensorboardx_is_imported_by_the_writer_only():
    code = "import sys, corl_jax.runs.log; sys.exit('tensorboardX' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tensorboardx_does_not_bring_torch(tmp_path):
    """Which is installed here, and can be imported behind it."""
    code = """
import pathlib, sys
from corl_jax.runs.tensorboard import EventFile
board = EventFile(pathlib.Path(sys.argv[1]), None)
board.start()
board.add_scalars(1, {"loss": 0.5})
assert "tensorboardX" in sys.modules and "torch" not in sys.modules
import torch
EventFile(pathlib.Path(sys.argv[1]), None)
assert sys.modules["torch"] is torch
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 100


def test_grid_has_every_image_where_it_belongs():
    images = np.zeros((2, 3, 64, 64, 3), np.uint8)
    images[1, 2] = (255, 0, 0)
    images[0, 1] = (0, 0, 255)
    rewards = [[{"ti_sim": 0.5, "cycle": float("nan")}] * 3] * 2
    prompts = ["a red square", "two\nblue circles " * 20]
    page = pictures.draw_samples(images, prompts, rewards, "step 5").pixels
    assert page.dtype == np.uint8 and page.shape[1] == 3 * 128 + 4 * pictures.MARGIN
    red = np.argwhere((page == (255, 0, 0)).all(-1))
    blue = np.argwhere((page == (0, 0, 255)).all(-1))
    assert len(red) == len(blue) == 128 * 128
    assert red.min(0)[1] > blue.max(0)[1] and red.min(0)[0] > blue.max(0)[0]
    assert pictures.draw_samples(images, ["a", "b"]).pixels.shape[0] < page.shape[0]  # no captions
    assert pictures.draw_samples(images, ["描いて", "b"]).pixels.shape[2] == 3


def test_grid_keeps_large_images_at_their_size():
    page = pictures.draw_samples(np.zeros((1, 2, 384, 384, 3), np.uint8), ["a"]).pixels
    assert page.shape[1] == 2 * 384 + 3 * pictures.MARGIN


@pytest.mark.parametrize("prompts,rewards", [(["a"], None), (["a", "b"], [[{}], [{}, {}]])])
def test_grid_refuses_lists_that_do_not_fit(prompts, rewards):
    with pytest.raises(ValueError, match="2 prompts"):
        pictures.draw_samples(np.zeros((2, 2, 8, 8, 3), np.uint8), prompts, rewards)


def test_reward_text_fits_below_its_image():
    (line,) = pictures.format_rewards({"t2i_bid_cycle_reward_of_a_long_name": 0.12345}, 100)
    assert line.endswith(" 0.123") and "…" in line
    assert pictures.load_font().getlength(line) <= 100
    assert pictures.format_rewards({"a": float("nan")}, 100) == ["a n/a"]


def test_a_page_says_where_its_images_are(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 2, 48, 48, 3), np.uint8)
    rewards = [[{"a": 0.5, "b": float("nan")}] * 2] * 2
    page = pictures.draw_samples(images, ["<b>&\n\ud83d", "x" * 5000], rewards, "step 5")
    path = pictures.save_png(tmp_path / "images" / "x.png", page.pixels, page.format_notes())
    assert [item.name for item in path.parent.iterdir()] == ["x.png"]
    read = pictures.read_page(path)
    np.testing.assert_array_equal(read.pixels, page.pixels)
    assert read.title == "step 5" and [tile.row for tile in read.tiles] == [0, 0, 1, 1]
    assert read.tiles[0].caption == "<b>&\n\ud83d" and len(read.tiles[2].caption) == 2000
    for tile, image in zip(read.tiles, images.reshape(4, 48, 48, 3), strict=True):
        left, top, right, bottom = tile.box
        cut = read.pixels[top : bottom : tile.scale, left : right : tile.scale]
        np.testing.assert_array_equal(cut, image)
        assert tile.rewards["a"] == 0.5 and np.isnan(tile.rewards["b"]) and tile.passed is None


TILE = {"box": [0, 0, 4, 4], "scale": 1, "row": 0, "caption": "", "passed": True, "rewards": {}}


@pytest.mark.parametrize(
    "notes",
    [
        "", "{", "[1]", '{"tiles": 3}', '{"tiles": [{}]}',
        json.dumps({"tiles": [{**TILE, "box": [0, 0, 9, 4]}]}),
        json.dumps({"tiles": [{**TILE, "scale": 0}]}),
        json.dumps({"tiles": [{**TILE, "rewards": 1}]}),
    ],
)  # fmt: skip
def test_a_page_with_damaged_notes_has_no_tiles(notes, tmp_path):
    path = pictures.save_png(tmp_path / "x.png", np.zeros((4, 5, 3), np.uint8), notes)
    assert pictures.read_page(path).tiles == []


def test_answers_table_survives_any_text():
    table = pictures.format_answers_table(
        ["how many | circles?\nTwo lines", "b"],
        ["<think>a</think> *x*", "y" * 400],
        [{"format": 1.0}, {"format": 0.0, "qa": 0.25}],
        ["2", "3"],
        width=50,
    )
    head, rule, first, second = table.splitlines()
    assert head == "| question | solution | answer | numbers |"
    assert rule == "| --- | --- | --- | --- |"
    assert first == (
        r"| how many \| circles?<br>Two lines | 2 | &lt;think&gt;a&lt;/think&gt; \*x\* | format 1 |"
    )
    assert second == f"| b | 3 | {'y' * 49}… | format 0<br>qa 0.25 |"


# ---- a disk that is full


@pytest.fixture
def disk():
    """Sets how long files may grow; None lifts it. Python gets EFBIG."""

    def limit(size: int | None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1 if size is None else size, -1))

    yield limit
    limit(None)


def events(run):
    """(step, tag) of every value in the event files, each record with sound checksums."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for path in sorted(run.tensorboard.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            event, end = data[12 : 12 + size], data[12 + size : 16 + size]
            assert struct.unpack("<I", end)[0] == masked_crc32c(event)
            event = Event.FromString(event)
            found += [(event.step, value.tag) for value in event.summary.value]
            data = data[16 + size :]
    return found


@pytest.mark.parametrize("room", [0, 100])
def test_what_a_full_disk_refuses_is_written_when_there_is_room(tmp_path, disk, room):
    run, stream = RunDir(tmp_path), io.StringIO()
    with RunLog(run, stream=stream) as metrics:
        metrics.add_metrics(1, {"reward": 1.0})
        disk(run.metrics.stat().st_size + room)
        for step in range(2, 40):
            metrics.add_metrics(step, {"reward": float(step), "loss": 0.5})
        metrics.add_image(39, "grid", np.zeros((4, 6, 3), np.uint8))
        assert metrics.num_lines == 39
        assert len(list(read_lines(run.metrics))) < 5  # a half line is none
        disk(None)
        metrics.add_metrics(40, {"reward": 40.0})
    assert [line["step"] for line in lines(run)] == list(range(1, 41))
    shown = events(run)
    assert [step for step, tag in shown if tag == "reward"] == list(range(1, 41))
    assert (39, "grid") in shown
    said = [line for line in stream.getvalue().splitlines() if not line.startswith("step ")]
    assert sorted(line.partition(": can")[0] for line in said) == [
        "metrics.jsonl", "tensorboard", "warning: metrics.jsonl", "warning: tensorboard",
    ]  # fmt: skip


def test_what_never_finds_room_is_counted(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(append_log, "WAITING_BYTES", 100)
    run, stream = RunDir(tmp_path), io.StringIO()
    metrics = RunLog(run, stream=stream)
    disk(0)
    for step in range(1, 6):
        metrics.add_metrics(step, {"reward": float(step)})
    assert metrics.num_lines == 3
    metrics.close()
    assert "metrics.jsonl: 5 record(s) are lost" in stream.getvalue()
    assert not lines(run)


def test_each_sink_is_closed_whatever_becomes_of_the_others(tmp_path, monkeypatch):
    def fails(self):
        raise RuntimeError("no")

    metrics = RunLog(RunDir(tmp_path), stream=io.StringIO())
    metrics.add_metrics(1, {"reward": 1.0})
    monkeypatch.setattr(metrics._events.records, "close", fails.__get__(metrics._events.records))
    ended = []
    monkeypatch.setattr(metrics._console, "close", lambda: ended.append("console"))
    with pytest.raises(RuntimeError, match="no"):
        metrics.close()
    assert ended == ["console"] and metrics._lines.records._file is None


def test_a_console_on_a_full_disk_ends_nothing(tmp_path):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    run = RunDir(tmp_path)
    write(run, [1, 2], stream=Full())
    assert [line["step"] for line in lines(run)] == [1, 2]
