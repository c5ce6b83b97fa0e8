"""Show-o from its original files in plain torch, written from the specification alone.

Nothing of corl_jax is imported: prompts, masks, the transformer of transformers, the image
tokenizer by the names of its tensors, the sampler, answers and losses are all here, one row or one
place at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

NAMES = ("soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg")
HIDDEN = -(2.0**63)
IGNORED = -100


@dataclasses.dataclass
class Tokens:
    """A tokenizer with the ids that it gets at run time."""

    tokenizer: Any
    pad: int
    end: int
    offset: int  # of the codes
    ids: dict[str, int]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]


def open_tokens(folder: Path) -> Tokens:
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "phi-1_5/tokenizer.json"), bos_token="<|endoftext|>",
        eos_token="<|endoftext|>", unk_token="<|endoftext|>",
    )  # fmt: skip
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens([f"<|{name}|>" for name in NAMES])
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in NAMES}
    return Tokens(tokenizer, tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer), ids)


# ---- sequences


def start_text(tokens: Tokens, text: str) -> list[int]:
    ids = tokens.encode(text)
    return ids if ids and ids[0] == tokens.end else [tokens.end, *ids]


def make_drawing_ids(tokens: Tokens, text: str, most: int, codes: list[int]) -> list[int]:
    """`most` is S: S + 1 places for pads, task and text, then the image."""
    ids = [tokens.ids["t2i"], *start_text(tokens, text), tokens.end]
    if len(ids) > most + 1:
        ids = [*ids[:most], tokens.end]
    pads = [tokens.pad] * (most + 1 - len(ids))
    return [*pads, *ids, tokens.ids["soi"], *codes, tokens.ids["eoi"]]


def make_question_ids(tokens: Tokens, question: str, codes: list[int]) -> list[int]:
    text = tokens.encode(f"USER: \n{question} ASSISTANT:")
    image = [tokens.ids["soi"], *(code + tokens.offset for code in codes), tokens.ids["eoi"]]
    return [tokens.ids["mmu"], *image, tokens.end, *text]


def mask_drawing(tokens: Tokens, ids: list[int]) -> torch.Tensor:
    s, pads = ids.index(tokens.ids["soi"]), ids.count(tokens.pad)
    seen = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for i in range(len(ids)):
        for j in range(len(ids)):
            if i < pads:
                seen[i, j] = j <= i
            elif i < s:
                seen[i, j] = pads <= j <= i
            else:
                seen[i, j] = j >= pads
    return seen


def mask_question(tokens: Tokens, ids: list[int]) -> torch.Tensor:
    end = ids.index(tokens.ids["eoi"])
    size = len(ids)
    return torch.tensor([[j <= i or j <= end for j in range(size)] for i in range(size)])


def mask_text(tokens: Tokens, ids: list[int]) -> torch.Tensor:
    return torch.ones(len(ids), len(ids)).tril().bool()


# ---- networks


@dataclasses.dataclass
class Reference:
    tokens: Tokens
    phi: PhiForCausalLM
    tensors: dict[str, torch.Tensor]  # of the image tokenizer
    num_tokens: int  # M
    mask_id: int

    @property
    def bits(self) -> int:
        return self.tensors["encoder.quant_conv.bias"].numel()

    def forward(self, ids: list[int], mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [L, D] behind the last norm, and logits [L, V], of a sequence."""
        added = torch.zeros(mask.shape).masked_fill(~mask, HIDDEN)
        with torch.no_grad():
            out = self.phi(
                torch.tensor([ids]), attention_mask=added[None, None], output_hidden_states=True
            )
        return out.hidden_states[-1][0], out.logits[0]

    def drawing_logits(self, ids: list[int]) -> torch.Tensor:
        """Logits [M, K] of the codes at the places of the image."""
        _, logits = self.forward(ids, mask_drawing(self.tokens, ids))
        first = self.tokens.offset
        return logits[-self.num_tokens - 1 : -1, first : first + 2**self.bits]

    # MAGVIT-v2, by the names of its tensors

    def conv(self, name: str, x: torch.Tensor, **options: Any) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        options = {"padding": weight.shape[-1] // 2} | options
        return functional.conv2d(x, weight, bias, **options)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return functional.group_norm(x, 32, weight, bias, eps=1e-6)

    def residual(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(f"{name}.norm1", x)
        y = self.conv(f"{name}.conv1", y * torch.sigmoid(y))
        y = self.norm(f"{name}.norm2", y)
        y = self.conv(f"{name}.conv2", y * torch.sigmoid(y))
        has_shortcut = f"{name}.nin_shortcut.weight" in self.tensors
        return y + (self.conv(f"{name}.nin_shortcut", x) if has_shortcut else x)

    def attend(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", y).flatten(2) for part in "qkv")
        weights = torch.einsum("nci,ncj->nij", q, k) * x.shape[1] ** -0.5
        attended = torch.einsum("nij,ncj->nci", weights.softmax(-1), v)
        return x + self.conv(f"{name}.proj_out", attended.reshape(x.shape))

    def middle(self, half: str, x: torch.Tensor) -> torch.Tensor:
        x = self.residual(f"{half}.mid.block_1", x)
        x = self.attend(f"{half}.mid.attn_1", x)
        return self.residual(f"{half}.mid.block_2", x)

    def level(self, name: str, x: torch.Tensor) -> torch.Tensor:
        number = 0
        while f"{name}.block.{number}.conv1.weight" in self.tensors:
            x = self.residual(f"{name}.block.{number}", x)
            number += 1
        return x

    def count_levels(self, half: str, name: str) -> int:
        numbers = {
            int(key.split(".")[2]) for key in self.tensors if key.startswith(f"{half}.{name}.")
        }
        return len(numbers)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Codes [N, M] of pixels [N, 3, H, W] in [-1, 1]."""
        x = self.conv("encoder.conv_in", pixels)
        for number in range(self.count_levels("encoder", "down")):
            x = self.level(f"encoder.down.{number}", x)
            if f"encoder.down.{number}.downsample.conv.weight" in self.tensors:
                x = functional.pad(x, (0, 1, 0, 1))
                x = self.conv(f"encoder.down.{number}.downsample.conv", x, stride=2, padding=0)
        x = self.norm("encoder.norm_out", self.middle("encoder", x))
        x = self.conv("encoder.conv_out", x * torch.sigmoid(x))
        z = self.conv("encoder.quant_conv", x)
        powers = 2 ** torch.arange(self.bits - 1, -1, -1)
        return ((z > 0) * powers[:, None, None]).sum(1).flatten(1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Images uint8 [N, H, W, 3] of codes [N, h, w]."""
        z = self.tensors["quantize.embedding"][codes].permute(0, 3, 1, 2)
        x = self.conv("decoder.conv_in", self.conv("decoder.post_quant_conv", z))
        x = self.middle("decoder", x)
        for number in reversed(range(self.count_levels("decoder", "up"))):
            x = self.level(f"decoder.up.{number}", x)
            if number:
                x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{number}.upsample.conv", x)
        x = self.norm("decoder.norm_out", x)
        y = self.conv("decoder.conv_out", x * torch.sigmoid(x))
        levels = torch.clamp((y + 1) / 2, 0, 1) * 255
        return levels.to(torch.uint8).permute(0, 2, 3, 1)


def open_reference(folder: Path) -> Reference:
    config = json.loads((folder / "config.json").read_text())
    sizes = json.loads((folder / "phi-1_5/config.json").read_text())
    sizes = {name: value for name, value in sizes.items() if name != "model_type"}
    sizes |= {"vocab_size": config["vocab_size"], "qk_layernorm": True}
    sizes |= {"attn_implementation": "eager"}
    phi = PhiForCausalLM(PhiConfig(**sizes)).eval()
    state = load_file(folder / "pytorch_model.safetensors")
    phi.load_state_dict({key.removeprefix("showo."): value for key, value in state.items()})
    return Reference(
        open_tokens(folder), phi, load_file(folder / "magvitv2/pytorch_model.safetensors"),
        config["num_vq_tokens"], config["mask_token_id"],
    )  # fmt: skip


# ---- drawing and answering


def draw(
    model: Reference, text: str, most: int, weight: float, steps: int, gumbels: np.ndarray,
    uniforms: np.ndarray, given: dict[int, int] | None = None,
) -> tuple[list[int], list[dict[int, int]]]:  # fmt: skip
    """Codes of an image, and the known codes {place: code} before each step.

    `gumbels` [T, M, K] and `uniforms` [T, M] are the noise; `given` are known codes.
    """
    tokens, num_tokens = model.tokens, model.num_tokens
    known, tau, states, codes = dict(given or {}), 1.0, [], torch.zeros(0)
    for s in range(steps):
        states.append(dict(known))
        image = [
            known[place] + tokens.offset if place in known else model.mask_id
            for place in range(num_tokens)
        ]
        z = model.drawing_logits(make_drawing_ids(tokens, text, most, image))
        if weight > 0:
            u = model.drawing_logits(make_drawing_ids(tokens, "", most, image))
            z = (1 + weight) * z - weight * u
        logp = z.log_softmax(-1)
        codes = (logp + torch.from_numpy(gumbels[s])).argmax(-1)
        for place, code in known.items():
            codes[place] = code
        unknown = num_tokens - len(known)
        ratio = torch.tensor((s + 1) / steps)
        count = math.floor(num_tokens * torch.cos(ratio * math.pi * 0.5))
        count = max(1, min(unknown - 1, count))
        tau *= 1 - (s + 1) / steps
        u = torch.from_numpy(uniforms[s])
        noise = -torch.log(torch.clamp(-torch.log(torch.clamp(u, min=1e-20)), min=1e-20))
        certain = logp.gather(1, codes[:, None])[:, 0]
        for place in known:
            certain[place] = math.log(torch.finfo(torch.float32).max)
        certain = certain + tau * noise
        cut = certain.sort().values[count]
        known = {place: int(codes[place]) for place in range(num_tokens) if certain[place] >= cut}
    return codes.tolist(), states


def answer(model: Reference, question: str, codes: list[int], most: int) -> list[int]:
    """The greedy answer, with its end token."""
    ids = make_question_ids(model.tokens, question, codes)
    begin = len(ids)
    for _ in range(most):
        _, logits = model.forward(ids, mask_question(model.tokens, ids))
        ids.append(int(logits[-1].argmax()))
        if ids[-1] == model.tokens.end:
            break
    return ids[begin:]


# ---- losses


def choose_masked(time: float, draws: np.ndarray) -> np.ndarray:
    """Masked places [M] bool of a picture, from t and M uniforms."""
    share = torch.cos(torch.tensor(time) * math.pi * 0.5)
    count = max(1, int((len(draws) * share).round()))
    return np.argsort(draws) < count


def drawing_loss(
    model: Reference, rows: list[tuple[str, list[int], np.ndarray]], most: int, *, ends: bool
) -> float:
    """Mean over masked places of rows (text, codes, masked [M]); `ends` adds soi and eoi."""
    terms = []
    for text, codes, masked in rows:
        image = [
            model.mask_id if hide else code + model.tokens.offset
            for code, hide in zip(codes, masked, strict=True)
        ]
        ids = make_drawing_ids(model.tokens, text, most, image)
        _, logits = model.forward(ids, mask_drawing(model.tokens, ids))
        labels = torch.full((len(ids),), IGNORED)
        for place, (code, hide) in enumerate(zip(codes, masked, strict=True)):
            if hide:
                labels[len(ids) - 1 - model.num_tokens + place] = code + model.tokens.offset
        if ends:
            labels[-1] = ids[-1]
            labels[-2 - model.num_tokens] = ids[-2 - model.num_tokens]
        terms.append(functional.cross_entropy(logits, labels, reduction="none")[labels >= 0])
    return float(torch.cat(terms).mean())


def shifted_loss(model: Reference, rows: list[tuple[list[int], torch.Tensor, list[bool]]]) -> float:
    """Mean of next-token losses of rows (ids, mask, places that are targets)."""
    terms = []
    for ids, mask, targets in rows:
        _, logits = model.forward(ids, mask)
        losses = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        terms.append(losses[torch.tensor(targets[1:])])
    return float(torch.cat(terms).mean())
