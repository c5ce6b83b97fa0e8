"""Every part of Janus against transformers' PyTorch, on tiny random float32 weights.

The promise is 1e-4 for features and pixels and 1e-3 for logits. Measured differences are some
1e-6, and a tanh GELU or another epsilon already shows at 1e-4, so the tests ask for less.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from corl_jax.models import layers
from corl_jax.params import leaf_paths
from corl_jax.policies.janus import network
from tests.parity import torch_janus
from tests.parity.torch_janus import IMAGE_TOKEN, PAD_TOKEN
from tests.support.tolerances import NETWORK

TOLERANCE = NETWORK

VARIANTS = {
    "plain": {"seed": 0},
    # Fewer key heads than heads, heads that do not add up to the width, other depths and sizes.
    "varied": {
        "seed": 1,
        "rope_theta": 500000.0,
        "llama": {"num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-5},
        "vision": {"depth": 3, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 2},
        "vq": {"channel_multiplier": [2, 1, 2, 3], "num_res_blocks": 1, "num_hidden_layers": 1},
    },
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    """One model twice: `torch` and `jax` (bound), with the jax config and params."""
    model = torch_janus.tiny_model(**VARIANTS[request.param])
    config = torch_janus.jax_config(model.config)
    params = torch_janus.params_of(model)
    return SimpleNamespace(torch=model, config=config, params=params)


def ours(pair, function, *arguments) -> np.ndarray:
    """function(bound Janus, *arguments), compiled, with exact float32 products."""
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(lambda params, *rest: function(network.bind(pair.config, params), *rest))
        return np.asarray(compiled(pair.params, *arguments))


def theirs(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def assert_close(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Largest difference at most TOLERANCE, of values that are much larger than that."""
    assert found.shape == expected.shape
    assert expected.std() > 0.1, f"{what}: values so small that any output would pass"
    error = np.abs(found - expected).max()
    print(f"parity {what}: largest difference {error:.1e} (std {expected.std():.2f})")
    assert error <= TOLERANCE, f"{what}: {error:.2e} > {TOLERANCE:.0e}"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def nhwc(x: torch.Tensor) -> np.ndarray:
    return theirs(x).transpose(0, 2, 3, 1)


def pixels(pair, rows: int) -> np.ndarray:
    size = pair.config.siglip.image_size
    return np.clip(normal(rows, size, size, 3, seed=7), -2, 2)


def prompts(pair, rows: int, length: int, padding: list[int], images: bool):
    """Ids [rows, length] and mask, left-padded; image placeholders after the third token."""
    rng = np.random.default_rng(3)
    ids = rng.integers(3, IMAGE_TOKEN, (rows, length))
    mask = np.arange(length) >= np.asarray(padding)[:, None]
    ids[~mask] = PAD_TOKEN
    if images:
        for row, pad in enumerate(padding):
            ids[row, pad + 3 : pad + 3 + pair.config.num_image_tokens] = IMAGE_TOKEN
    return ids, mask


def test_mapped_parameters_are_exactly_those_of_the_network(pair):
    found = {path: leaf.shape for path, leaf in leaf_paths(pair.params)}
    abstract = network.abstract(pair.config)
    assert found == {path: leaf.shape for path, leaf in leaf_paths(abstract)}


def test_image_tower(pair):
    images = pixels(pair, 2)
    expected = pair.torch.model.vision_model(nchw(images)).last_hidden_state
    found = ours(pair, lambda model, x: model.vision_model(x), images)
    assert_close("SigLIP features", found, theirs(expected))


def test_aligner(pair):
    features = normal(2, 5, pair.config.siglip.hidden_size)
    expected = pair.torch.model.aligner(torch.from_numpy(features))
    found = ours(pair, lambda model, x: model.aligner(x), features)
    assert_close("aligner", found, theirs(expected))


def test_image_features(pair):
    images = pixels(pair, 2)
    expected = pair.torch.model.get_image_features(nchw(images)).pooler_output
    found = ours(pair, lambda model, x: model.image_features(x), images)
    assert_close("image features", found, theirs(expected))


@pytest.mark.parametrize("padding", [[0, 0, 0], [0, 3, 9]], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("positions", ["from zero", "of kept tokens"])
def test_language_model(pair, padding, positions):
    ids, mask = prompts(pair, 3, 13, padding, images=False)
    arguments = {}
    if positions == "of kept tokens":
        counted = np.maximum(mask.cumsum(-1) - 1, 0)
        arguments["position_ids"] = torch.from_numpy(counted)
    with torch.no_grad():
        output = pair.torch.model.language_model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long(),
            use_cache=False, **arguments,
        )  # fmt: skip
        logits = pair.torch.lm_head(output.last_hidden_state)

    def forward(model, ids, mask):
        return model.language_model(model.embed_text(ids), mask)

    hidden = ours(pair, forward, ids, mask)
    found_logits = ours(pair, lambda model, *x: model.text_logits(forward(model, *x)), ids, mask)
    # What a padding position computes is nobody's business.
    assert_close("Llama hidden", hidden[mask], theirs(output.last_hidden_state)[mask])
    assert_close("text logits", found_logits[mask], theirs(logits)[mask])


def test_generation_head(pair):
    hidden = normal(2, 5, pair.config.llama.hidden_size)
    expected = pair.torch.model.generation_head(torch.from_numpy(hidden))
    found = ours(pair, lambda model, x: model.image_logits(x), hidden)
    assert_close("image logits", found, theirs(expected))


def test_generation_embeddings(pair):
    tokens = np.arange(pair.config.vq.num_embeddings).reshape(2, -1)
    expected = pair.torch.prepare_embeddings_for_image_generation(torch.from_numpy(tokens))
    found = ours(pair, lambda model, x: model.embed_image_tokens(x), tokens)
    assert_close("generation embeddings", found, theirs(expected))


@pytest.mark.parametrize("padding", [[0, 0], [0, 6]], ids=["unpadded", "left-padded"])
def test_understanding_forward(pair, padding):
    """Image and text in, text logits out, through the whole of both models."""
    length = pair.config.num_image_tokens + 16
    ids, mask = prompts(pair, 2, length, padding, images=True)
    images = pixels(pair, 2)
    with torch.no_grad():
        output = pair.torch(
            input_ids=torch.from_numpy(ids), pixel_values=nchw(images),
            attention_mask=torch.from_numpy(mask).long(), use_cache=False,
        )  # fmt: skip

    def forward(model, ids, mask, images):
        embeds = model.prompt_embeds(ids, IMAGE_TOKEN, model.image_features(images))
        return model.text_logits(model.language_model(embeds, mask))

    found = ours(pair, forward, ids, mask, images)
    assert_close("understanding logits", found[mask], theirs(output.logits)[mask])


def test_understanding_forward_of_two_images(pair):
    """Two images a prompt, [B, I, S, S, 3], with text between them."""
    tokens, images = pair.config.num_image_tokens, pixels(pair, 4)
    rng, text = np.random.default_rng(4), (2, 3, 4)
    pieces = [rng.integers(3, 80, (2, count)) for count in text]
    picture = np.full((2, tokens), IMAGE_TOKEN)
    ids = np.concatenate([pieces[0], picture, pieces[1], picture, pieces[2]], axis=1)
    mask = np.ones(ids.shape, bool)
    with torch.no_grad():
        output = pair.torch(
            input_ids=torch.from_numpy(ids), pixel_values=nchw(images),
            attention_mask=torch.from_numpy(mask).long(), use_cache=False,
        )  # fmt: skip

    def forward(model, ids, mask, images):
        embeds = model.prompt_embeds(ids, IMAGE_TOKEN, model.image_features(images))
        return model.text_logits(model.language_model(embeds, mask))

    # images 0 and 1 belong to prompt 0
    found = ours(pair, forward, ids, mask, images.reshape(2, 2, *images.shape[1:]))
    assert_close("logits behind two images", found, theirs(output.logits))


def test_drawing_forward(pair):
    """A text prompt followed by drawn tokens, to the logits of the next drawn token."""
    ids, _ = prompts(pair, 2, 5, [0, 0], images=False)
    drawn = np.random.default_rng(0).integers(0, pair.config.vq.num_embeddings, (2, 9))
    with torch.no_grad():
        embeds = torch.cat(
            [
                pair.torch.get_input_embeddings()(torch.from_numpy(ids)),
                pair.torch.prepare_embeddings_for_image_generation(torch.from_numpy(drawn)),
            ],
            dim=1,
        )
        hidden = pair.torch.model.language_model(inputs_embeds=embeds).last_hidden_state
        expected = pair.torch.model.generation_head(hidden)

    def forward(model, ids, drawn):
        embeds = jnp.concatenate([model.embed_text(ids), model.embed_image_tokens(drawn)], axis=1)
        mask = jnp.ones(embeds.shape[:2], bool)
        return model.image_logits(model.language_model(embeds, mask))

    assert_close("drawing logits", ours(pair, forward, ids, drawn), theirs(expected))


def drawings(pair, rows: int) -> np.ndarray:
    """Smooth pixels in [-1, 1] that the tokenizer turns into a grid of 4 x 4 codes."""
    size = 4 * pair.config.vq.downsample
    return np.tanh(normal(rows, size, size, 3, seed=5))


def torch_latents(pair, images: np.ndarray) -> torch.Tensor:
    """transformers' latents before it quantises [N, h, w, embed_dim]."""
    vqmodel = pair.torch.model.vqmodel
    return vqmodel.quant_conv(vqmodel.encoder(nchw(images))).permute(0, 2, 3, 1)


@torch.no_grad()
def test_vq_encoder_latents(pair):
    images = drawings(pair, 2)

    def latents(model, x):
        return model.vqmodel.quant_conv(model.vqmodel.encoder(x))

    found = ours(pair, latents, images)
    assert_close("VQ latents", found, theirs(torch_latents(pair, images)))


@torch.no_grad()
def test_vq_codes_are_the_nearest_with_both_sides_normalised(pair):
    images = drawings(pair, 6)
    z = torch.nn.functional.normalize(torch_latents(pair, images), dim=-1)
    codebook = torch.nn.functional.normalize(
        pair.torch.model.vqmodel.quantize.embedding.weight, dim=-1
    )
    distances = torch.cdist(z.double().reshape(-1, z.shape[-1]), codebook.double())
    nearest, second = distances.topk(2, largest=False).values.unbind(-1)
    assert (second - nearest).min() > 1e-5, "a tie decides nothing: choose another seed"

    found = ours(pair, lambda model, x: model.vqmodel.encode(x), images)
    np.testing.assert_array_equal(found.reshape(-1), theirs(distances.argmin(-1)))
    # transformers' own quantiser leaves the lengths in; here that must make a difference.
    unnormalised = pair.torch.model.vqmodel.encode(nchw(images)).image_tokens
    assert (found.reshape(-1) != theirs(unnormalised)).mean() > 0.2


@torch.no_grad()
def test_vq_decoder_pixels(pair):
    codes = np.random.default_rng(2).integers(0, pair.config.vq.num_embeddings, (2, 16))
    vqmodel = pair.torch.model.vqmodel
    vqmodel.quantize.quant_state_dims = [4, 4]  # transformers ties it to the SigLIP grid
    expected = vqmodel.decode(torch.from_numpy(codes))
    found = ours(pair, lambda model, x: model.vqmodel.decode(x), codes)
    assert_close("VQ pixels", found, nhwc(expected))


@torch.no_grad()
def test_norms_add_the_same_epsilon(pair):
    """On values so small that the epsilon decides."""
    model, vqmodel = pair.torch.model, pair.torch.model.vqmodel
    bound = network.bind(pair.config, pair.params)
    last = pair.config.llama.num_layers - 1, pair.config.siglip.num_layers - 1
    block = layers.unstack(bound.language_model.layers, last[0] + 1)[last[0]]
    encoder = layers.unstack(bound.vision_model.layers, last[1] + 1)[last[1]]
    torch_block, torch_encoder = (
        model.language_model.layers[last[0]], model.vision_model.encoder.layers[last[1]],
    )  # fmt: skip
    norms = [
        (block.input_layernorm, torch_block.input_layernorm),
        (block.post_attention_layernorm, torch_block.post_attention_layernorm),
        (bound.language_model.norm, model.language_model.norm),
        (encoder.layer_norm1, torch_encoder.layer_norm1),
        (encoder.layer_norm2, torch_encoder.layer_norm2),
        (bound.vision_model.post_layernorm, model.vision_model.post_layernorm),
        (bound.vqmodel.encoder.norm_out, vqmodel.encoder.norm_out),
        (bound.vqmodel.decoder.mid.attn_1.norm, vqmodel.decoder.mid.attn_1.norm),
        (bound.vqmodel.decoder.up[0].block[0].norm1, vqmodel.decoder.up[0].block[0].norm1),
    ]
    for norm, torch_norm in norms:
        x = 1e-3 * normal(2, 4, 4, torch_norm.weight.shape[0])
        group = isinstance(torch_norm, torch.nn.GroupNorm)
        expected = nhwc(torch_norm(nchw(x))) if group else theirs(torch_norm(torch.from_numpy(x)))
        assert_close(type(torch_norm).__name__, np.asarray(norm(x)), expected)


def test_gradients_of_the_language_model(pair):
    """One text log-likelihood, differentiated by both frameworks."""
    ids, mask = prompts(pair, 2, 9, [0, 2], images=False)
    model = pair.torch
    model.zero_grad()
    logits = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long()).logits
    chosen = torch.from_numpy(ids)[:, 3:, None]
    logits[:, 2:-1].log_softmax(-1).gather(-1, chosen).mean().backward()
    expected = torch_janus.gradients_of(model)["language_model"]
    model.zero_grad()

    def loss(params):
        bound = network.bind(pair.config, params)
        logits = bound.text_logits(bound.language_model(bound.embed_text(ids), mask))
        logprobs = jax.nn.log_softmax(logits[:, 2:-1], axis=-1)
        return jnp.take_along_axis(logprobs, ids[:, 3:, None], axis=-1).mean()

    with jax.default_matmul_precision("highest"):
        found = jax.jit(jax.grad(loss))(pair.params)["language_model"]
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * scale), found, expected
    )
