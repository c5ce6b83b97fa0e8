"""Files from strangers (T9, T15, T16, T16b): nothing runs, nothing escapes, memory is bounded."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from corl_jax.convert.__main__ import run as convert
from corl_jax.errors import InputError
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.runs import directory as run_directory
from corl_jax.weights import storage, torch_bin
from corl_jax.weights.checkpoint import load_params
from tests.faults.hostile import SOUND, entry, header
from tests.support.tiny_models import encode, tiny_image
from tests.support.tiny_networks import load_network, network_dir
from tests.support.weight_files import hf_shapes, random_state, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def hostile(*arguments: Any) -> dict[str, Any]:
    """What `tests.faults.hostile` reports of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.hostile", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]  # a crash of C code has no exception
    return json.loads(done.stdout)


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# ---- T9: images


def png(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A picture that says how large it is and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    start = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", start) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bombs() -> dict[str, bytes]:
    picture = tiny_image(0, (16, 16))
    gif = bytearray(encode(picture, "GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"  # the canvas
    bmp = bytearray(encode(picture, "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    return {
        "81_megapixels.png": encode(Image.new("1", (9000, 9000))),
        "square_of_2_31.png": png(2**31 - 1, 2**31 - 1),
        "nothing.png": png(0, 0),
        "line.png": encode(Image.new("1", (100_000, 1))),
        "canvas.gif": bytes(gif),
        "sides.bmp": bytes(bmp),
        "pages.tiff": encode(Image.new("1", (20_000, 2_000)), "TIFF", compression="group4"),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "text_bomb.png": png(8, 8)[:33] + zlib.compress(b"x" * 10**6),
    }


def pictures() -> dict[str, bytes]:
    """Unusual ones, which are read."""
    turned = Image.Exif()
    turned[0x0112] = 6
    flat = tiny_image(0, (16, 8))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return {
        "00_plain.png": encode(flat),
        "cmyk.jpg": encode(flat.convert("CMYK"), "JPEG"),
        "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "deep.png": encode(Image.fromarray(np.full((4, 4), 40_000, np.uint16))),
        "turned.jpg": encode(flat, "JPEG", exif=turned),
    }


def test_image_bombs_are_refused_before_they_are_decoded(figure, tmp_path):
    good, bad = pictures(), bombs()
    assert max(map(len, bad.values())) < 50_000
    report = hostile("each", 0, 0, written(tmp_path / "images", good | bad))
    assert report["names"] == sorted(good) and report["refused"] == len(bad)
    assert not report["escaped"] and report["mib"] < 100
    figure("T9", fault="image bombs", tries=len(bad), losses=0, note=f"{report['mib']} MiB")


def test_mutated_images(figure, tmp_path):
    report = hostile("images", 3000, 0, tmp_path)
    figure("T9", fault="mutated images", tries=report["tries"], losses=len(report["escaped"]),
           note=f"{report['accepted']} read, {report['mib']} MiB")  # fmt: skip
    assert not report["escaped"] and report["mib"] < 100


# ---- T15: pickles


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, how: Any, *arguments: Any):
        self.what = how, arguments

    def __reduce__(self) -> Any:
        return self.what


def torch_bytes(content: Any, new: bool = True) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


def repacked(data: bytes, change: Any, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with `change(name, content)` in place of each entry."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def with_entry(data: bytes, name: str, content: bytes) -> bytes:
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(name, content)
    return out.getvalue()


def legacy_tar(content: bytes) -> bytes:
    """As PyTorch before 0.4 wrote, with a pickle of the attacker's in each place."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def overlapping(data: bytes) -> bytes:
    """An archive whose directory names its largest entry a thousand times."""
    end = data.rfind(b"PK\x05\x06")
    start = struct.unpack("<4sHHHHIIH", data[end : end + 22])[6]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        first = archive.infolist()[0]
    record = data[start : start + 46 + len(first.filename) + len(first.extra)]
    record = record[: 46 + sum(struct.unpack("<HHH", record[28:34]))]
    listed = b"".join(
        record[:46] + first.filename.encode()[:-4] + b"%04d" % i
        + record[46 + len(first.filename) :] for i in range(1000)
    )  # fmt: skip
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1000, 1000, len(listed), start, 0)
    return data[:start] + listed + tail


def pickles(canary: Path) -> dict[str, bytes]:
    """name -> a file that would make the canary, or fill the memory."""
    import os

    import torch

    command = f"touch {canary}"
    code = f"__import__('os').system({command!r})"
    raw = b"cos\nsystem\n(S" + repr(command).encode() + b"\ntR."
    evaluated = b"c__builtin__\neval\n(S" + repr(code).encode() + b"\ntR."
    sound = torch_bytes({"a": torch.ones(1000)})
    shared = torch.zeros(1).expand(10**6, 10**6)
    stolen = torch_bytes({"a": Runs(os.system, command)})
    legacy = torch_bytes({"a": torch.zeros(7)}, new=False)
    return {
        "reduce_system.bin": stolen,
        "reduce_eval.bin": torch_bytes({"a": Runs(eval, code)}),
        "reduce_import.bin": torch_bytes({"a": Runs(__import__, "antigravity")}),
        "reduce_getattr.bin": torch_bytes({"a": Runs(getattr, torch.nn.Module, "__init__")}),
        "inside_state_dict.bin": torch_bytes({"state_dict": {"a": Runs(os.system, command)}}),
        "legacy_system.pth": torch_bytes({"a": Runs(os.system, command)}, new=False),
        "legacy_swapped.pth": torch_bin.LEGACY_START + raw,
        "raw_system.pkl": raw,
        "raw_eval.pkl": evaluated,
        "protocol_5.pkl": pickle.dumps(Runs(os.system, command), 5),
        "swapped_pickle.bin": repacked(sound, lambda n, c: raw if n.endswith("data.pkl") else c),
        "torchscript.bin": with_entry(stolen, "archive/constants.pkl", evaluated),
        "tar.pt": legacy_tar(raw),
        "tar_before_zip.pt": legacy_tar(raw) + sound,
        "zip_in_zip.bin": repacked(sound, lambda n, c: stolen if "data/0" in n else c),
        "deflated_200_mb.bin": repacked(
            sound, lambda n, c: b"\0" * 2 * 10**8 if "data/0" in n else c, zipfile.ZIP_DEFLATED
        ),
        "overlapping.bin": overlapping(sound),
        "stride_0.bin": torch_bytes({"a": shared}),
        "legacy_stride_0.pth": torch_bytes({"a": shared}, new=False),
        "legacy_claims_8_gb.pth": legacy.replace(b"K\x07", b"J\xff\xff\xff\x7f"),
        "long_pickle.bin": repacked(
            sound, lambda n, c: b"]" * (torch_bin.MAX_PICKLE_BYTES + 1) if n.endswith("pkl") else c
        ),
        "dense_pickle.bin": repacked(
            sound, lambda n, c: b"]" * (torch_bin.MAX_PICKLE_BYTES // 16) if "pkl" in n else c
        ),
    }  # fmt: skip


def test_pickles_run_nothing(figure, tmp_path):
    import torch

    canary = tmp_path / "ran"
    bad = pickles(canary)
    sound = {"00_sound.bin": torch_bytes({"a": torch.ones(3)})}
    report = hostile("each", 0, 0, written(tmp_path / "files", sound | bad))
    lost = int(canary.exists()) + len(report["escaped"])
    figure("T15", fault="malicious pickles", tries=len(bad), hits=report["refused"], losses=lost,
           note=f"{report['mib']} MiB")  # fmt: skip
    assert not canary.exists() and not report["escaped"]
    assert report["names"] == ["00_sound.bin"] and report["mib"] < 600


def test_mutated_pickles(figure, tmp_path):
    report = hostile("pickles", 3000, 0, tmp_path)
    figure("T15", fault="mutated pickles", tries=report["tries"], losses=len(report["escaped"]),
           note=f"{report['accepted']} read, {report['mib']} MiB")  # fmt: skip
    assert not report["escaped"] and report["mib"] < 300
    assert {path.name for path in tmp_path.iterdir()} == {"pytorch_model.bin"}


# ---- T16: safetensors

KEYS = {
    "parent": "../../x", "inner_parent": "a/../../x", "absolute": "/etc/x", "nul": "a\0b",
    "long": "k" * 10_000, "empty": "", "newline": "a\nerror: b", "escape": "\x1b[2J",
    "backslash": "..\\x",
}  # fmt: skip


def headers() -> dict[str, bytes]:
    one = entry()
    many = b"{" + b",".join(b'"%x":{}' % i for i in range(storage.MAX_HEADER_BYTES // 14)) + b"}"
    deep = b"[" * 200_000
    short = header({"a": one}, b"\0" * 8)
    malformed = {
        "shape_text": entry(("2",)), "shape_negative": entry((-2,)), "shape_true": entry((True, 2)),
        "shape_2_62": entry((0, 2**62)), "offsets_swapped": entry(offsets=(8, 0)),
        "offsets_three": entry(offsets=(0, 4, 8)), "dtype_unknown": entry(dtype="F12"),
        "dtype_list": entry(dtype=["F32"]), "no_dtype": {"shape": [2]}, "null": None,
        "shape_product": entry((2**31, 2**31)), "nested": {"a": one},
    }  # fmt: skip
    files = {name: header({"a": value}, b"\0" * 8) for name, value in malformed.items()}
    files |= {f"key_{name}": header({key: one}, b"\0" * 8) for name, key in KEYS.items()}
    return {
        f"{name}.safetensors": data
        for name, data in {
            **files,
            "empty": b"",
            "length_2_63": struct.pack("<Q", 2**63) + short[8:],
            "truncated": short[:-1],
            "longer": short + b"\0",
            "overlap": header({"a": one, "b": one}, b"\0" * 8),
            "hole": header({"a": entry(offsets=(4, 12))}, b"\0" * 12),
            "twice": header(b'{"a":1,"a":2}'),
            "twice_inside": header(b'{"a":{"dtype":"F32","dtype":"F32"}}'),
            "deep": header(deep),
            "largest": header(many),
            "not_utf8": header(b"\xff\xfe{}"),
            "nan_shape": header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
            "digits": header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b"]}}"),
        }.items()
    }


def test_headers_made_by_hand(figure, tmp_path):
    bad = headers()
    report = hostile("each", 0, 0, written(tmp_path / "files", {"00.safetensors": SOUND} | bad))
    figure("T16", fault="headers made by hand", tries=len(bad), hits=report["refused"],
           losses=len(report["escaped"]),
           note=f"{report['mib']} MiB, for a header of 16 MiB")  # fmt: skip
    assert report["names"] == ["00.safetensors"], report["names"]
    assert not report["escaped"] and report["mib"] < 1000


def test_mutated_headers(figure, tmp_path):
    report = hostile("headers", 20_000, 0, tmp_path)
    figure("T16", fault="mutated headers", tries=report["tries"], losses=len(report["escaped"]),
           note=f"{report['accepted']} read, {report['mib']} MiB")  # fmt: skip
    assert not report["escaped"] and report["mib"] < 50


@pytest.fixture(scope="module")
def state():
    return random_state(hf_shapes())


def checkpoint(folder: Path, state: dict[str, np.ndarray], as_bin: bool) -> Path:
    """In transformers' layout, in the one kind of file or the other."""
    write_checkpoint(folder, state, "transformers")
    if as_bin:
        (folder / "model.safetensors").unlink()
        arrays = {key: np.ascontiguousarray(value) for key, value in state.items()}
        tensors = {key: torch_bin.to_torch(value.copy()) for key, value in arrays.items()}
        (folder / "pytorch_model.bin").write_bytes(torch_bytes(tensors))
    return folder


def refused(capsys: pytest.CaptureFixture, *arguments: Any) -> list[str]:
    """The lines of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        convert([str(argument) for argument in arguments])
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("as_bin", [False, True], ids=["safetensors", "bin"])
def test_output_stays_where_it_was_asked_for(figure, tmp_path, state, capsys, as_bin):
    """A conversion writes nothing outside, whatever the tensors are called."""
    for name, key in KEYS.items():
        extra = {**state, key: np.ones(2, np.float32)}
        folder = checkpoint(tmp_path / name / "deep" / "source", extra, as_bin)
        before = tree(tmp_path)
        lines = refused(capsys, "to-jax", folder, tmp_path / name / "out")
        assert any(f"a tensor is named {key[:40]!r}" in line for line in lines), lines
        assert max(map(len, lines)) < 600 and all(line.isprintable() for line in lines)
        assert tree(tmp_path) == before
    figure("T16", fault="names that are paths, converted", tries=len(KEYS), losses=0)


@pytest.mark.parametrize("name", ["../x", "/abs", "a/../../x", "", "."])
def test_a_runs_files_stay_in_its_directory(figure, tmp_path, name):
    with pytest.raises(ValueError, match="does not stay inside"):
        run_directory.RunDir(tmp_path / "run").write_json(name, {})
    assert not tree(tmp_path)
    figure("T16", fault="names that leave the run directory", tries=1, losses=0)


def test_weights_that_are_no_numbers_are_named(figure, tmp_path, state, capsys):
    bad = {key: np.array(value) for key, value in state.items()}
    bad["lm_head.weight"][3, 5] = np.nan
    bad["model.language_model.layers.1.mlp.up_proj.weight"][0, :2] = np.inf
    folder = write_checkpoint(tmp_path / "janus", bad, "transformers")
    with pytest.raises(InputError) as error:
        load_params(folder, KIND)
    lines = sorted(error.value.problems)
    assert len(lines) == 2 and all(str(folder) in line for line in lines)
    assert "up_proj/kernel: 2 of " in lines[0] and "lm_head/kernel: 1 of " in lines[1]
    assert convert(["to-torch", str(folder), str(tmp_path / "kept"), "--format", "original"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "NaN or infinite" in line]
    assert len(notes) == 2 and all(line.startswith("note: ") for line in notes)
    assert "layers.1.mlp.up_proj.weight: 2 of " in notes[0] + notes[1]
    network = network_dir(tmp_path / "bert", "bert")
    weights = storage.open_any_store(network)
    values = {key: weights.read(key) for key in weights.infos}
    values["embeddings/layernorm/bias"][0] = -np.inf
    save_file(values, network / "model.safetensors")
    assert convert(["to-jax", str(network), str(tmp_path / "kept too")]) == 0
    assert "note: embeddings/layernorm/bias: 1 of 16 values are NaN" in capsys.readouterr().out
    for dtype in (None, np.float32, np.float16, storage.SAFETENSORS["BF16"]):
        with pytest.raises(InputError, match=r"layernorm/bias: 1 of 16 values are NaN or infinite"):
            load_network(network, "bert", dtype)
    figure("T16", fault="NaN and infinity in weights", tries=3, losses=0)


# ---- T16b: keys, shapes, types and the index

UP = "model.language_model.layers.1.mlp.up_proj.weight"
FC1 = "model.vision_model.encoder.layers.0.mlp.fc1.weight"


def test_every_wrong_tensor_is_reported_in_one_message(figure, tmp_path, state, capsys):
    bad = dict(state)
    del bad["lm_head.weight"]
    bad["extra.weight"] = np.ones(2, np.float32)
    bad[UP] = np.zeros((2, 2), np.float32)
    bad[FC1] = bad[FC1].T
    bad["model.aligner.fc1.bias"] = bad["model.aligner.fc1.bias"].astype(np.int8)
    expected = {
        "lm_head.weight is missing", "extra.weight is unknown", f"{UP} has shape [2, 2]",
        f"{FC1} has shape", "model.aligner.fc1.bias holds int8",
    }  # fmt: skip
    reported = 0
    for as_bin in (False, True):
        folder = checkpoint(tmp_path / f"bad{as_bin}", bad, as_bin)
        lines = refused(capsys, "to-jax", folder, tmp_path / "out")
        found = {part for part in expected for line in lines if part in line}
        assert found == expected and len(lines) == len(expected)
        reported += len(found)
    assert {path.name for path in tmp_path.iterdir()} == {"badFalse", "badTrue"}
    figure("T16b", fault="wrong keys, shapes and types", tries=2 * len(expected), hits=reported,
           losses=2 * len(expected) - reported)  # fmt: skip


OUTSIDE = [
    "../outside.safetensors",
    "/etc/passwd",
    "..",
    "",
    "a\0b",
    "a/b.safetensors",
    "..\\x",
    3,
    None,
]


def test_an_index_that_points_outside_is_refused(figure, tmp_path, state, capsys):
    folder = write_checkpoint(tmp_path / "in" / "source", state, "transformers")
    (folder / "model.safetensors").rename(tmp_path / "in" / "outside.safetensors")
    for name in OUTSIDE:
        index = {"weight_map": dict.fromkeys(state, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        before = tree(tmp_path)
        (line,) = refused(capsys, "to-jax", folder, tmp_path / "out")
        assert "lies outside the folder" in line or "is missing" in line
        assert tree(tmp_path) == before
    figure("T16b", fault="an index that points outside", tries=len(OUTSIDE), losses=0)
