"""What a resumed run takes up: data, counters, devices, config (T1, T5, T6, T19b, T24)."""

from __future__ import annotations

import functools
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from corl_jax.config import files as config_files
from corl_jax.data.dataset import Loader, LoaderOptions, ParquetSource, required_columns
from corl_jax.devices.mesh import make_mesh
from corl_jax.policies.janus.prompts import Processor
from corl_jax.rewards.samples import FrozenNetwork, Network
from corl_jax.train import build, resolve
from corl_jax.train.resume import fingerprint_untrained, hash_reward_files
from tests.faults.harness import SUPERVISED, Job, outcome
from tests.support import tiny_runs
from tests.support.tiny_models import tiny_parquet, tiny_row, tiny_tokenizer_dir

GRPO = {"train": {"max_steps": 3}}


# ---- data


def test_batches_after_a_resume_whatever_prepares_them(tmp_path, figure):
    """Bad and long rows among them; rows that were counted are not counted twice."""
    listed = [tiny_row(i) for i in range(30)]
    listed[4]["real_image"]["bytes"] = b"no picture"
    listed[9]["qa_problem"] = "why " * 400
    path = tiny_parquet(tmp_path / "rows.parquet", listed)
    processor = Processor.from_dir(tiny_tokenizer_dir(tmp_path / "words"))

    def make(prefetch: int, threads: int) -> Loader:
        tasks = ("t2i", "mm2t")
        options = LoaderOptions(
            tasks=tasks, batch_size=4, seed=3, max_prompt_length=128, max_bad_fraction=0.5,
            prefetch=prefetch, threads=threads,
        )  # fmt: skip
        return Loader(ParquetSource(path, required=required_columns(tasks)), processor, options)

    whole = list(make(2, 1).iterate(0, 16))
    compared = wrong = 0
    for before in range(4):
        for after in range(4):
            first = make(before, max(before, 1))
            for _ in first.iterate(0, 7 + before):
                pass
            state = json.loads(json.dumps(first.get_state() | {"step": 7 + before}))
            second = make(after, max(after, 1))
            second.set_state(state)
            start = second.get_state()["step"]
            assert second.counts == first.counts
            for expected, found in zip(whole[start:], second.iterate(start, 16), strict=True):
                compared += 1
                wrong += not _same(expected, found)
            assert second.counts == {"bad": 1, "long": 1}
    figure(
        "T5", fault="resume with another prefetch (0 to 3)", tries=compared, losses=wrong,
        note="batches compared",
    )  # fmt: skip
    assert not wrong and compared == 4 * (9 + 8 + 7 + 6)


def _same(a, b) -> bool:
    left, right = (jax.tree.leaves((x.index, x.encoded)) for x in (a, b))
    return a.columns["prompt"] == b.columns["prompt"] and all(map(np.array_equal, left, right))


# ---- in the middle of an iteration


@pytest.mark.slow
def test_an_iteration_that_broke_off_between_its_updates_is_repeated(
    model, rows, tmp_path, one_device, monkeypatch, figure
):
    """Two updates on each rollout; a checkpoint lies between iterations only."""
    calm = Job.make(tmp_path / "calm", model, rows, **GRPO)
    assert calm.here() == 0
    job = Job.make(tmp_path / "broken", model, rows, **GRPO)
    original, calls = build.make_steps, []

    def make_steps(*args):
        train_step, *rest = original(*args)

        def dying(*args):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return train_step(*args)

        return dying, *rest

    with monkeypatch.context() as patch:
        patch.setattr(build, "make_steps", make_steps)
        with pytest.raises(KeyboardInterrupt):
            job.here()
    assert job.steps() == [1]
    assert job.here() == 0
    lost = outcome(job) != outcome(calm)
    figure("T1", fault="broken off between two updates", tries=1, losses=lost)
    assert not lost


# ---- other devices


@pytest.mark.slow
def test_other_devices_get_the_same_values_and_nearly_the_same_losses(
    model, rows, tmp_path, monkeypatch, figure
):
    def on(*sizes: int):
        make = functools.partial(make_mesh, *sizes, devices=jax.devices()[: int(np.prod(sizes))])
        return lambda *args, **options: make()

    changes = SUPERVISED | {"train": {"max_steps": 8, "prompts_per_step": 8}}
    losses, worst = {}, 0.0
    for sizes in ((1, 1, 1), (1, 2, 1), (2, 2, 1), (1, 4, 1), (2, 4, 1), (2, 2, 2)):
        job = Job.make(tmp_path / "x".join(map(str, sizes)), model, rows, **changes)
        monkeypatch.setattr(resolve, "make_mesh", on(2, 2, 1))
        assert job.here("train.stop_after=4") == 0
        monkeypatch.setattr(resolve, "make_mesh", on(*sizes))
        assert job.here() == 0  # verified: the fingerprints are those of the other mesh
        losses[sizes] = [line["loss"] for line in tiny_runs.metric_lines(job.output)]
        difference = np.abs(np.array(losses[sizes]) - losses[1, 1, 1]) / losses[1, 1, 1]
        assert (difference[:4] == 0).all()
        worst = max(worst, float(difference.max()))
    figure(
        "T6", fault="resume on 1 to 8 devices", tries=len(losses), losses=int(worst > 1e-3),
        note=f"largest relative difference of a loss {worst:.1e}",
    )  # fmt: skip
    assert 0 < worst < 1e-3


# ---- another config


@pytest.fixture
def begun(model, rows, tmp_path, one_device):
    job = Job.make(tmp_path, model, rows, **SUPERVISED)
    assert job.here("train.stop_after=1") == 0
    return job


@pytest.mark.slow
def test_another_config_is_refused_and_allowed_by_the_flag(begun, model, rows, tmp_path, capsys,
                                                           figure):  # fmt: skip
    other = tiny_runs.rows_file(tmp_path / "other.parquet", 12)
    copy = shutil.copytree(model, tmp_path / "copy")
    cases = {
        "seed=7": "seed: found 7, the run has 0",
        "optimizer.learning_rate=0.5": "optimizer.learning_rate: found 0.5, the run has 0.001",
        f"data.path={other}": "data.path: found",
        f"model.path={copy}": "model.path: found",
        "train.prompts_per_step=8": "train.prompts_per_step: found 8, the run has 4",
        "train.max_steps=9": "train.max_steps: found 9, the run has 6",
        "stage=vq": "stage: found 'vq', the run has 'sft'",
    }
    losses = int(begun.here(f"model.path={model}/", "train.stop_after=1") != 0)  # the same folder
    capsys.readouterr()
    for change, part in cases.items():
        more = ["train.trainable=[vqmodel/.*]"] if change == "stage=vq" else []
        code, text = begun.here(change, *more), capsys.readouterr().err
        losses += code != 2 or part not in text or "--allow-changed-config" not in text
    kept = begun.output / "config.yaml"  # the checkpoint knows it too
    kept.write_text(kept.read_text().replace("max_steps: 6", "max_steps: 9"))
    code, text = begun.here("train.max_steps=9"), capsys.readouterr().err
    losses += code != 2 or "checkpoints/2: train.max_steps: found 9, the run has 6" not in text
    figure(
        "T19b", fault="config changed between two processes", tries=len(cases) + 2, losses=losses
    )
    assert not losses
    flags = ("--allow-changed-config", "seed=7", f"data.path={other}", "train.max_steps=3")
    assert begun.here(*flags) == 0
    text = capsys.readouterr().err
    assert "warning: changed config: seed: found 7, the run has 0" in text
    assert "warning: changed config: data state: rows was 16 and is now 12" in text
    (line,) = (begun.output / "config_changes.jsonl").read_text().splitlines()
    noted = json.loads(line)
    assert noted["step"] == 2 and len(noted["changes"]) == 5
    assert begun.here(*flags[1:]) == 0  # from now on these are the run's


@pytest.mark.slow
def test_other_weights_behind_the_same_path(model, rows, tmp_path, one_device, capsys, figure):
    """Frozen parts are not in the checkpoint: they are read again at each start."""
    own = tmp_path / "model"
    shutil.copytree(model, own)
    job = Job.make(tmp_path, own, rows, **SUPERVISED)
    assert job.here("train.stop_after=1") == 0
    tensors = load_file(own / "model.safetensors")
    name = next(name for name in tensors if name.startswith("vision_model"))
    tensors[name] = tensors[name] * np.float32(1.0001)
    save_file(tensors, own / "model.safetensors")
    code = job.here()
    figure("T19b", fault="frozen weights changed", tries=1, losses=code != 2)
    assert code == 2
    assert "its weights are not those that the run began with" in capsys.readouterr().err


JUDGE = "def judge(texts, qa_problem):\n    return [float(len(text)) for text in texts]\n"


@pytest.mark.slow
def test_a_changed_file_of_a_reward_is_told(model, rows, tmp_path, one_device, capsys):
    """Mending one that failed needs no flag."""
    judge = tmp_path / "judge.py"
    judge.write_text(JUDGE)
    tasks = {"algorithm": {"tasks": "mm2t"}, "rewards": [{"use": f"{judge}:judge"}]}
    job = Job.make(tmp_path, model, rows, **GRPO | tasks)
    assert job.here("train.stop_after=1") == 0
    judge.write_text(JUDGE.replace("float", "0.1 * "))
    assert job.here("train.stop_after=1") == 0
    told = f"{judge}: the file is not the one of the last save"
    assert f"warning: changed config: {told}" in capsys.readouterr().err
    assert told in (job.output / "config_changes.jsonl").read_text()
    assert job.here("train.stop_after=1") == 0
    assert told not in capsys.readouterr().err


def test_digests_of_what_a_reward_asks(tmp_path):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    judge = tmp_path / "judge.py"
    judge.write_text(JUDGE)
    tree = tiny_runs.options("weights", "rows.parquet", tmp_path)
    tree["rewards"] += [{"use": f"{judge}:judge"}, {"use": "package.judges:judge_too"}]
    config = config_files.validate(tree, "test")

    def found(number: float) -> dict[str, str]:
        params = {"kernel": np.full((2, 3), number, np.float32)}
        blip = FrozenNetwork(Network(None, params, tmp_path, np.float32), place, offload=True)
        run = SimpleNamespace(reference=None, frozen={}, networks={"blip": blip})
        return fingerprint_untrained(run) | hash_reward_files(config)

    first, second = found(1.0), found(1.5)
    assert first.keys() == {"model.path", "networks.blip", str(judge)}
    assert [name for name in first if first[name] != second[name]] == ["networks.blip"]
    judge.write_text("")
    assert found(1.0)[str(judge)] != first[str(judge)]


@pytest.mark.slow
def test_what_no_flag_can_allow(begun, capsys):
    """An optimizer that keeps something else; the run stays what it was."""
    assert begun.here("--allow-changed-config", "optimizer.name=sgd") == 2
    assert "unknown; resume with the model, options and version" in capsys.readouterr().err
    assert begun.here() == 0


# ---- without the checkpoints


@pytest.mark.slow
def test_checkpoints_that_are_gone_are_no_new_start(begun, straight, tmp_path, capsys, figure):
    """Another directory, and an empty one; then they are moved on purpose."""
    log = (begun.output / "metrics.jsonl").read_bytes()
    moved = tmp_path / "moved"
    codes = [begun.here(f"checkpoint.directory={tmp_path / 'typo'}")]
    begun.checkpoints.rename(moved)
    codes.append(begun.here())
    text = capsys.readouterr().err
    losses = codes.count(2) != 2 or (begun.output / "metrics.jsonl").read_bytes() != log
    assert text.count("saved.json: step 1 was saved, but") == 2, text
    assert begun.here(f"checkpoint.directory={moved}") == 0
    shutil.rmtree(begun.checkpoints)
    moved.rename(begun.checkpoints)
    losses += outcome(begun) != straight
    figure("T19b", fault="checkpoints gone or elsewhere", tries=3, losses=losses)
    assert not losses


# ---- at and past the end


@pytest.mark.slow
def test_the_summary_of_a_run_that_was_extended(begun):
    def steps() -> int:
        return json.loads((begun.output / "summary.json").read_text())["steps"]

    assert begun.here("--allow-changed-config", "train.max_steps=2") == 0 and steps() == 2
    assert begun.here("--allow-changed-config", "train.max_steps=3") == 0 and steps() == 3
    assert begun.here("--allow-changed-config", "train.max_steps=2") == 0 and steps() == 3


@pytest.mark.slow
def test_resuming_at_the_last_step_and_past_it(begun, capsys, figure):
    assert begun.here() == 0
    done = outcome(begun)
    codes = [begun.here()]
    same = outcome(begun) == done
    codes.append(begun.here("--allow-changed-config", "train.max_steps=4"))
    text = capsys.readouterr().err
    losses = codes.count(0) != 2 or not same
    figure("T24", fault="resume at the last step, and past it", tries=2, losses=losses)
    assert codes == [0, 0] and same
    assert "step 6 is done already, past the 4 of the run" in text
