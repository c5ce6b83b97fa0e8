"""The original files of a tiny Show-o, as its code writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from corl_jax.policies.show_o.checkpoint import KIND
from corl_jax.policies.show_o.checkpoint.files import make_phi_config
from corl_jax.policies.show_o.checkpoint.sizes import write_config
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.weights.export_folder import Export, plan_tensors
from corl_jax.weights.parts import split_plans
from tests.parity import torch_show_o
from tests.support.tiny_models import CORPUS

TEXT, BITS = torch_show_o.TEXT, torch_show_o.Z_CHANNELS
CONFIG = {
    "_class_name": "Showo",
    "_diffusers_version": "0.30.1",
    "codebook_size": 2**BITS,
    "llm_model_path": "microsoft/phi-1_5",
    "llm_vocab_size": TEXT,
    "mask_token_id": TEXT + 10 + 2**BITS,
    "num_vq_tokens": 16,
    "vocab_size": TEXT + 10 + 2**BITS + 1,
    "w_clip_vit": False,
}
QUANTISER = {
    "quantize.embedding": torch.tensor(
        [[2.0 * int(bit) - 1 for bit in f"{code:0{BITS}b}"] for code in range(2**BITS)]
    ),
    "quantize.power_vals": 2 ** torch.arange(BITS - 1, -1, -1),
}


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(whole, file, metadata={"format": "pt"})


def original_folder(folder: Path, *, beside: bool = False, seed: int = 0) -> Path:
    """Writes a tiny Show-o; `beside` puts magvitv2 and phi-1_5 beside its folder."""
    others = folder.parent if beside else folder
    phi = torch_show_o.tiny_phi(seed)
    state = {f"showo.{name}": tensor for name, tensor in phi.state_dict().items()}
    save(folder / "pytorch_model.safetensors", state)
    write_json(folder / "config.json", CONFIG)
    tokenizer = torch_show_o.tiny_tokenizer(seed).state_dict()
    save(others / "magvitv2/pytorch_model.safetensors", {**tokenizer, **QUANTISER})
    names = {"_class_name": "MAGViTv2", "_diffusers_version": "0.30.1"}
    write_json(others / "magvitv2/config.json", names)
    phi_folder(others / "phi-1_5", TEXT)
    return folder


def full_size_folder(folder: Path, config: ShowOConfig) -> Path:
    """Writes the original files of a Show-o of any size; the values are holes in its files."""
    shapes = {path: shape for path, shape in KIND.shapes(config).items() if "mm_proj" not in path}
    export = Export(
        kind=KIND, layout="original", config=config, leaves=Shapes(shapes), assets=None, carried={}
    )
    for part, plans in split_plans(KIND, plan_tensors(export)):
        header, offset = {}, 0
        for plan in plans:
            end = offset + plan.nbytes
            dtype = {"float32": "F32", "int64": "I64"}[str(plan.dtype)]
            header[plan.key] = {
                "dtype": dtype, "shape": list(plan.shape), "data_offsets": [offset, end],
            }  # fmt: skip
            offset = end
        text = json.dumps(header).encode()
        file = folder / part.folder / f"{part.stem}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
            for plan in plans:
                if plan.key in QUANTISER:  # these follow from the sizes, and are compared
                    stream.seek(8 + len(text) + header[plan.key]["data_offsets"][0])
                    stream.writelines(chunk.tobytes() for chunk in plan.chunks())
    write_json(folder / "config.json", write_config("original", config, "float32", None))
    phi_folder(folder / "phi-1_5", 300)
    write_json(folder / "phi-1_5/config.json", make_phi_config(config.phi))
    return folder


class Shapes:
    """Leaves without values."""

    transposed, concurrent = True, False

    def __init__(self, shapes):
        self.shapes = shapes

    def dtype(self, path, layer):
        return np.dtype(np.float32)

    def read(self, path, layer, box=None):
        raise AssertionError("only shapes are needed")


def phi_folder(folder: Path, vocab_size: int) -> Path:
    """Writes a byte-level tokenizer of at most so many tokens, and the sizes of `tiny_phi`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    write_json(folder / "config.json", {"model_type": "phi", **torch_show_o.SIZES})
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CodeGenTokenizer"})
    return folder
