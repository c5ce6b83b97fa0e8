"""Greedy sampling against transformers' own, token by token, and the two logits filters."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from corl_jax.policies import decoding
from corl_jax.policies.choices import keep_top_k, keep_top_p, sample_keys
from corl_jax.policies.family import SamplingOptions
from corl_jax.policies.janus import sampling, thinking
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.types import EncodedPrompts
from tests.parity import torch_janus
from tests.parity.torch_janus import BOI_TOKEN, BOS_TOKEN, IMAGE_TOKEN, PAD_TOKEN
from tests.support import draws

PADDING = (0, 2, 5)
CFG_SCALE = 5.0
NEW_TOKENS = 24
EOI_TOKEN = 92


@pytest.fixture(scope="module")
def pair():
    # Fewer key heads than heads, and heads that do not add up to the width.
    sizes = {"num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 2}
    model = torch_janus.tiny_model(seed=2, llama=sizes)
    model.generation_config.generation_kwargs = {"boi_token_id": BOI_TOKEN}
    return SimpleNamespace(
        torch=model,
        config=torch_janus.jax_config(model.config),
        params=torch_janus.params_of(model),
    )


def special(eos: int) -> SpecialTokens:
    return SpecialTokens(
        bos=BOS_TOKEN, eos=eos, pad=PAD_TOKEN, boi=BOI_TOKEN, eoi=EOI_TOKEN, image=IMAGE_TOKEN
    )


def batches(prompts: EncodedPrompts) -> list[EncodedPrompts]:
    """The padded batch, and its most padded row alone without the padding."""
    row, pad = len(PADDING) - 1, PADDING[-1]
    alone = EncodedPrompts(
        prompts.input_ids[row:, pad:],
        prompts.attention_mask[row:, pad:],
        None if prompts.pixel_values is None else prompts.pixel_values[row:],
    )
    return [prompts, alone]


def ours(program, pair, prompts, **options):
    keys = sample_keys(0, np.arange(prompts.input_ids.shape[0]), 1)
    with jax.default_matmul_precision("highest"):
        return program(
            pair.config, pair.params, prompts, keys, greedy=True, dtype=jnp.float32, **options
        )


# ---- images


def drawing_prompts() -> EncodedPrompts:
    ids = np.random.default_rng(0).integers(3, IMAGE_TOKEN, (len(PADDING), 10)).astype(np.int32)
    mask = np.arange(ids.shape[1]) >= np.asarray(PADDING)[:, None]
    ids[~mask] = PAD_TOKEN
    ids[np.arange(len(PADDING)), np.asarray(PADDING)] = BOS_TOKEN
    ids[:, -1] = BOI_TOKEN
    return EncodedPrompts(ids, mask)


def assert_no_ties(logits: torch.Tensor) -> None:
    """Where the two best are as good as each other, rounding chooses."""
    first, second = logits.topk(2).values.unbind(-1)
    assert (first - second).min() > draws.SAFE, "choose another seed"


@torch.no_grad()
def drawn_without_cache(pair, prompts: EncodedPrompts) -> np.ndarray:
    """The plain loop over transformers' modules: every step reads everything again."""
    model = pair.torch
    ids = torch.from_numpy(prompts.input_ids).long()
    mask = torch.from_numpy(prompts.attention_mask)
    blank = torch.where((ids == BOS_TOKEN) | (ids == BOI_TOKEN), ids, PAD_TOKEN)
    embeds = model.get_input_embeddings()(torch.cat([ids, blank]))
    mask, tokens = torch.cat([mask, mask]), []
    for _ in range(pair.config.num_image_tokens):
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions,
            use_cache=False,
        ).last_hidden_state[:, -1]  # fmt: skip
        conditional, unconditional = model.model.generation_head(hidden).chunk(2)
        mixed = unconditional + CFG_SCALE * (conditional - unconditional)
        assert_no_ties(mixed)
        token = mixed.argmax(-1)
        tokens.append(token)
        read = model.prepare_embeddings_for_image_generation(token[:, None].repeat(2, 1))
        embeds = torch.cat([embeds, read], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return torch.stack(tokens, dim=1).numpy()


def drawn_by_transformers(pair, prompts: EncodedPrompts) -> np.ndarray:
    try:
        return pair.torch.generate(
            torch.from_numpy(prompts.input_ids),
            attention_mask=torch.from_numpy(prompts.attention_mask).long(),
            generation_mode="image", do_sample=False, guidance_scale=CFG_SCALE,
            pad_token_id=PAD_TOKEN, bos_token_id=BOS_TOKEN,
        ).numpy()  # fmt: skip
    except TypeError as error:
        if "prefill_chunk_size" not in str(error):
            raise
        pytest.skip("this version of transformers cannot generate images with Janus")


@pytest.fixture(scope="module")
def drawings(pair):
    """(prompts, our tokens) of the padded batch and of one prompt alone."""
    options = {"special": special(eos=2), "cfg_scale": CFG_SCALE}
    return [
        (prompts, np.asarray(ours(sampling.sample_images, pair, prompts, **options).values))
        for prompts in batches(drawing_prompts())
    ]


@pytest.mark.parametrize("reference", [drawn_without_cache, drawn_by_transformers])
def test_greedy_images(pair, drawings, reference):
    for prompts, tokens in drawings:
        np.testing.assert_array_equal(tokens, reference(pair, prompts))
    (_, together), (_, alone) = drawings
    np.testing.assert_array_equal(together[-1:], alone)
    assert len(np.unique(together)) > 10, "an image of one token would prove little"


# ---- texts


def question_prompts(pair) -> EncodedPrompts:
    rng = np.random.default_rng(1)
    side, slots = pair.config.siglip.image_size, pair.config.num_image_tokens
    ids = rng.integers(3, IMAGE_TOKEN, (len(PADDING), slots + 10)).astype(np.int32)
    mask = np.arange(ids.shape[1]) >= np.asarray(PADDING)[:, None]
    for row, pad in enumerate(PADDING):
        picture = [BOS_TOKEN, BOI_TOKEN, *[IMAGE_TOKEN] * slots, EOI_TOKEN]
        ids[row, :pad] = PAD_TOKEN
        ids[row, pad : pad + len(picture)] = picture
    pixels = rng.standard_normal((len(PADDING), side, side, 3)).astype(np.float32)
    return EncodedPrompts(ids, mask, pixels)


def answered_by_transformers(pair, prompts: EncodedPrompts, eos: int | None) -> np.ndarray:
    pair.torch.generation_config.eos_token_id = eos
    pixels = torch.from_numpy(prompts.pixel_values.transpose(0, 3, 1, 2).copy())
    output = pair.torch.generate(
        torch.from_numpy(prompts.input_ids).long(),
        attention_mask=torch.from_numpy(prompts.attention_mask).long(),
        pixel_values=pixels, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=eos,
        pad_token_id=PAD_TOKEN if eos is None else eos, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert_no_ties(torch.stack(output.logits))
    return output.sequences[:, prompts.input_ids.shape[1] :].numpy()


def test_greedy_texts(pair):
    prompts = question_prompts(pair)
    endless = answered_by_transformers(pair, prompts, None)
    # An end that one row reaches early, so that rows end at different times or not at all.
    eos = int(endless[1, 6])
    lengths = []
    for batch in batches(prompts):
        expected = answered_by_transformers(pair, batch, eos)
        options = {"special": special(eos), "max_new_tokens": NEW_TOKENS}
        found = ours(sampling.sample_text, pair, batch, **options)
        tokens, drawn = np.asarray(found.values), expected.shape[1]
        np.testing.assert_array_equal(tokens[:, :drawn], expected)
        assert (tokens[:, drawn:] == eos).all()
        lengths.append(np.asarray(found.mask).sum(-1).tolist())
    together, alone = lengths
    assert together[-1:] == alone
    assert min(together) <= 7 < max(together), together


# ---- plans and their images


def plan_prompts() -> EncodedPrompts:
    """As for images, but without BOI."""
    prompts = drawing_prompts()
    ids = prompts.input_ids.copy()
    ids[:, -1] = [7, 30, 55]
    return EncodedPrompts(ids, prompts.attention_mask)


@torch.no_grad()
def planned_by_torch(pair, ids: list[int], eos: int | None) -> tuple[list[int], list[float]]:
    """The greedy plan after an unpadded prompt, and its log-probs; every step reads all again."""
    plan, logprobs = [], []
    while len(plan) < NEW_TOKENS and (not plan or plan[-1] != eos):
        read = torch.tensor([ids + plan])
        hidden = pair.torch.model.language_model(input_ids=read, use_cache=False)
        logits = pair.torch.lm_head(hidden.last_hidden_state[:, -1])
        assert_no_ties(logits)
        plan.append(int(logits.argmax(-1)))
        logprobs.append(float(logits.log_softmax(-1).max()))
    return plan, logprobs


@torch.no_grad()
def drawn_after(pair, ids: list[int], plan: list[int]) -> tuple[list[int], list[float]]:
    """The greedy guided codes after prompt, plan and BOI, and their conditional log-probs."""
    model = pair.torch
    context = torch.tensor([ids + plan + [BOI_TOKEN]])
    blank = torch.full_like(context, PAD_TOKEN)
    blank[:, 0], blank[:, -1] = BOS_TOKEN, BOI_TOKEN
    embeds = model.get_input_embeddings()(torch.cat([context, blank]))
    codes, logprobs = [], []
    for _ in range(pair.config.num_image_tokens):
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False)
        conditional, other = model.model.generation_head(hidden.last_hidden_state[:, -1]).chunk(2)
        mixed = other + CFG_SCALE * (conditional - other)
        assert_no_ties(mixed)
        token = mixed.argmax(-1)
        codes.append(int(token))
        logprobs.append(float(conditional.log_softmax(-1)[0, token]))
        read = model.prepare_embeddings_for_image_generation(token[:, None].repeat(2, 1))
        embeds = torch.cat([embeds, read], dim=1)
    return codes, logprobs


@pytest.mark.parametrize("attention", ["shared prompts", "copied prompts"])
def test_greedy_plans_and_their_images(pair, attention, monkeypatch):
    """Prompt, plan and BOI without any padding, row by row, against the padded batch."""
    monkeypatch.setattr(decoding, "copies_prompts", lambda *_: attention == "copied prompts")
    jax.clear_caches()  # which way prompts are kept is no argument of a program
    prompts = plan_prompts()
    rows = [prompts.input_ids[row, pad:].tolist() for row, pad in enumerate(PADDING)]
    eos = planned_by_torch(pair, rows[1], None)[0][6]  # that one row reaches early
    options = SamplingOptions(
        special(eos), greedy=True, max_new_tokens=NEW_TOKENS, cfg_scale=CFG_SCALE,
        dtype=jnp.float32,
    )  # fmt: skip
    keys = sample_keys(0, np.arange(len(rows)), 1)
    with jax.default_matmul_precision("highest"):
        text, codes = thinking.sample_thinking(pair.config, pair.params, prompts, keys, options)
    lengths = []
    for row, ids in enumerate(rows):
        plan, plan_logprobs = planned_by_torch(pair, ids, eos)
        kept = np.asarray(text.mask)[row]
        np.testing.assert_array_equal(np.asarray(text.values)[row][kept], plan)
        np.testing.assert_allclose(np.asarray(text.logprobs)[row][kept], plan_logprobs, atol=1e-3)
        ended = plan[-1] == eos
        drawn, logprobs = drawn_after(pair, ids, plan[:-1] if ended else plan)
        np.testing.assert_array_equal(np.asarray(codes.values)[row], drawn)
        np.testing.assert_allclose(np.asarray(codes.logprobs)[row], logprobs, atol=1e-3)
        lengths.append(len(plan))
    assert min(lengths) <= 7 < max(lengths), lengths
    assert len(np.unique(codes.values)) > 10, "an image of one token would prove little"


# ---- filters


@pytest.mark.parametrize("k", [1, 5, 50, 200])
def test_top_k_keeps_what_transformers_keeps(k):
    logits = np.random.default_rng(k).standard_normal((4, 96)).astype(np.float32) * 2
    expected = TopKLogitsWarper(k)(None, torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(keep_top_k(jnp.asarray(logits), k), expected)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(p):
    logits = np.random.default_rng(9).standard_normal((4, 96)).astype(np.float32) * 2
    expected = TopPLogitsWarper(p)(None, torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(keep_top_p(jnp.asarray(logits), p), expected)


def test_top_k_then_top_p_is_transformers_order():
    logits = np.random.default_rng(5).standard_normal((4, 96)).astype(np.float32) * 2
    expected = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(12)(None, torch.from_numpy(logits)))
    found = keep_top_p(keep_top_k(jnp.asarray(logits), 12), 0.7)
    np.testing.assert_array_equal(found, expected.numpy())
