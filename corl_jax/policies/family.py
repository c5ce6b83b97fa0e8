"""`Family`: all functions and values that the program needs of one kind of unified model.

The rest of the program reaches a model only through its family. It never imports the family's
modules and never compares its name. docs/how_to/add_a_policy.md builds a small family step by step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax import params as params_lib
from corl_jax.algorithms.flow.steps import Sde
from corl_jax.algorithms.flow.windows import Window
from corl_jax.devices.mesh import Rules
from corl_jax.models import modules
from corl_jax.models.attention import AttentionKernel, DecodeKernel
from corl_jax.models.layers import Remat
from corl_jax.tasks import Task, TurnKinds
from corl_jax.types import Array, EncodedPrompts, Params, Segment, Sizes
from corl_jax.weights.kinds import NetworkKind


@dataclasses.dataclass(frozen=True)
class Unmasking:
    """How codes that a family draws in any order are drawn and scored.

    The log-probs of an image depend on which codes are hidden while others are scored:
    one_shot: some codes at random are hidden, and scored in one pass; complement: the other ones
    too, in a second pass; trajectory: the codes of some steps of the sampler, a pass for each step,
    under the codes that it knew then; none: the sampler records nothing, and nothing is scored.
    """

    steps: int | None = None  # of the sampler; None: as usual for the number of codes
    logprobs: Literal["one_shot", "complement", "trajectory", "none"] = "one_shot"
    scored_steps: int = 0  # of a trajectory, chosen at random for each image; 0: all
    # In-painting: the steps are spread over the codes that are drawn, and not over all codes.
    count_unknown: bool = False


@dataclasses.dataclass(frozen=True)
class Denoising:
    """How a family whose images are made by denoising draws and scores them: `algorithms.flow`."""

    steps: int = 30
    schedule: str = "uniform"
    shift: float | None = None  # None: the schedule's own
    # The noise of the steps; the ODE has none, and nothing to score.
    sde: Sde = dataclasses.field(default_factory=lambda: Sde("ode"))
    # The steps that have noise, and are scored.
    window: Window = dataclasses.field(default_factory=Window)
    same_noise: bool = False  # all images of a prompt begin with the first one's noise
    kl: str = "gaussian"  # divergence from the reference
    num_tokens: int | None = None  # latent tokens of an image, which the schedule `dynamic` reads

    @property
    def is_greedy(self) -> bool:
        """True if an image is a function of its first noise."""
        return self.sde.dynamics == "ode"


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Options of sampling; hashable, because jit takes them as static arguments.

    A segment ignores options of other kinds of segments.
    """

    special: Any  # ids of the processor's special tokens
    temperature: float = 1.0
    greedy: bool = False  # take the most likely choice
    greedy_last: bool = False  # the same for the last completion of each prompt alone
    top_k: int = 0  # text; 0 keeps the whole vocabulary
    top_p: float = 1.0  # text
    max_new_tokens: int = 512  # text
    cfg_scale: float = 5.0  # images; 1 is no guidance
    image_window: int = 1  # codes of an image that a pass reads; changes images by rounding only
    # Distribution of the recorded log-probs; images are always sampled from the guided one (Q27).
    image_logprobs: Literal["conditional", "guided"] = "conditional"
    dtype: Any = jnp.bfloat16  # compute dtype
    attention: Literal["auto"] | DecodeKernel = "auto"  # kernel of a decode step
    image: Any = None  # the processor's, for turns that read the policy's own images
    unmasking: Unmasking = Unmasking(logprobs="none")  # codes in any order
    denoising: Denoising = Denoising()  # latents


PIXELS = "pixels"
"""Key of `Segment.replay`: given images as the image encoder reads them, [N, S, S, 3] float32."""
NOISE_KEYS = "noise_keys"
"""Key of `Segment.replay`: the bits [N, 2] of a random key for each image.

`StraightThrough` and scoring of codes in any order draw from it what they repeat in every pass.
"""


@dataclasses.dataclass(frozen=True)
class StraightThrough:
    """How the gradient of an answer flows into the image that it is about."""

    redraw: bool = False  # a fresh image from the same logits, instead of the sampled one
    temperature: float = 1.0  # tau, of the relaxed choice of a code


@dataclasses.dataclass(frozen=True)
class LogprobOptions:
    """Options of scoring given completions; hashable, closed over by the jitted steps."""

    special: Any
    temperature: float = 1.0
    cfg_scale: float = 5.0
    image_logprobs: Literal["conditional", "guided"] = "conditional"
    unshifted: bool = False  # Q1, as the released code: logits after an image token score it
    remat: Remat = "full"
    attention: AttentionKernel = "xla"  # kernel of the update
    chunk: int = 1024  # tokens, over all rows, whose logits exist at once
    # None: no gradient flows from an answer into the policy's own image
    straight_through: StraightThrough | None = None
    image: Any = None  # the processor's, for turns that read the policy's own images
    unmasking: Unmasking = Unmasking()  # codes in any order
    denoising: Denoising = Denoising()  # latents, with the noise of the sampler
    # Completions of data instead of samples: an image code competes with all tokens that share its
    # vocabulary, as in the training of a base model.
    is_given: bool = False
    released: bool = False  # given completions: also the terms that a model's own code has
    aligned: bool = False  # given images: also how their states agree with an image encoder


Sample = Callable[[Sizes, Params, EncodedPrompts, jax.Array, SamplingOptions], tuple[Segment, ...]]
"""(sizes, params, B prompts, N keys, options) -> the segments of all turns, each of N rows."""
LatentScores = tuple[jax.Array, None, jax.Array] | tuple[jax.Array, None, jax.Array, jax.Array]
"""(log-probs [N, T], None, velocities [N, T, ...]) of latents; aligned also alignments [N, T].

The entropy of a denoising step is that of its noise, which no network changes, so there is none.
"""
Scores = tuple[jax.Array, jax.Array] | LatentScores
"""(log-probs, entropies) [N, T] of a segment; see `LatentScores` for those of latents."""
Logprobs = Callable[
    [Sizes, Params, EncodedPrompts, tuple[Segment, ...], LogprobOptions], tuple[Scores, ...]
]
"""(sizes, params, B prompts, segments, options) -> the scores of each segment."""
MeasureKl = Callable[[Segment, jax.Array, jax.Array, LogprobOptions], jax.Array]
"""(latents, velocities, the reference's velocities, options) -> KL divergences [N, T]."""
ChooseScored = Callable[
    [EncodedPrompts, tuple[Segment, ...], LogprobOptions], tuple[jax.Array, ...]
]
"""(prompts, segments, options) -> the loss masks of the log-probs of each segment.

They leave out the choices that `Logprobs` does not score, and have the shape of its results.
"""


@dataclasses.dataclass(frozen=True)
class TurnProgram:
    """The functions that sample and score the segments of the turns of a task."""

    sample: Sample
    logprobs: Logprobs
    passes_gradients: bool = False  # scoring can work with `LogprobOptions.straight_through`
    packs_answers: bool = False  # scoring can read rows of several answers: `policies.packing`
    # None: all choices are scored, and nothing else. Choices that are not scored have log-prob and
    # entropy 0, and are in no loss.
    choose_scored: ChooseScored | None = None
    # Of latents, whose divergence from the reference is known exactly; None: it is estimated from
    # log-probs.
    measure_kl: MeasureKl | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes of a model that checks, estimates and evaluations need."""

    positions: int  # most tokens of a prompt and its completion together
    image_tokens: int  # choices that make an image
    input_image_tokens: int  # prompt tokens that an image takes
    input_image_side: int  # pixels of an image in a prompt
    image_side: int  # pixels of a generated image
    vocab_size: int
    # the language model, for estimates of memory and the choice of attention kernels
    layers: int
    width: int
    inner_width: int
    heads: int
    kv_heads: int
    head_dim: int
    caches_codes: bool = True  # sampling keeps the keys and values of an image's codes
    latent_tokens: int | None = None  # tokens of an image's latents; None: it has none
    image_prompt: int | None = None  # tokens to which the prompt of an image is cut; None: never
    # steps in which an image is drawn if no option states them; None: not in any order of its codes
    unmasking_steps: int | None = None
    has_begin_token: bool = True  # a token stands between a plan and the choices of its image
    # name of a tower -> number of its heads, which the mesh axis `tensor` has to divide
    sharded_heads: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def planned_image_tokens(self) -> int:
        """The number of tokens that an image takes behind a plan."""
        return self.image_tokens + self.has_begin_token

    @property
    def images_always_fit(self) -> bool:
        """True if no prompt of an image is too long for the positions of the model."""
        prompt = self.image_prompt
        return prompt is not None and prompt + self.image_tokens <= self.positions


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The functions and names that add low-rank adapters to a family's networks."""

    paths: str  # regex of their parameters
    targets: tuple[str, ...]  # projections of each layer that can have one
    add: Callable[[Sizes, Any], Sizes]  # (sizes, models.lora.Lora) -> sizes with adapters
    remove: Callable[[Sizes], Sizes]  # sizes without adapters: those of the checkpoint
    options_of: Callable[[Sizes], Any]  # -> models.lora.Lora, or None


@dataclasses.dataclass(frozen=True)
class Alignment:
    """The functions and names of a projector that only training has; see `flow.alignment`."""

    paths: str  # regex of its parameters
    add: Callable[[Sizes], Sizes]  # sizes -> with the projector; `Family.base` removes it
    init: Callable[[Sizes, jax.Array], Params]  # (sizes, random key) -> its parameters


@dataclasses.dataclass(frozen=True)
class CaptionPrompt:
    """A question prompt with a caption as its question, and the positions of its parts."""

    ids: list[int]  # unpadded
    image_places: np.ndarray  # [I] positions of the image tokens, equally many in all prompts
    is_caption: np.ndarray  # [len(ids)] bool, tokens of the caption


@dataclasses.dataclass(frozen=True)
class ChatRoles:
    """A processor with a pair of chat roles."""

    name: str  # of the pair
    template: str  # the prompt of an image, with PROMPT in the place of the user's text
    processor: Any


@dataclasses.dataclass(frozen=True)
class HiddenStates:
    """The functions that give a model's states of an image and its caption, for R_TIM."""

    # (processor, caption, fixed_spans) -> prompt; fixed_spans takes the released positions (Q7)
    caption_prompt: Callable[[Any, str, bool], CaptionPrompt]
    # (sizes, params, prompts, special, dtype) -> last hidden states [B, P, D] float32
    compute: Callable[[Sizes, Params, EncodedPrompts, Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Inpainting:
    """The functions that draw a part of a given image anew."""

    # (sizes, image, mask), both of Pillow -> normalised pixels float32 [S, S, 3], and which codes
    # [M] bool are drawn. Raises InputError for a mask that does not fit.
    cut: Callable[[Sizes, Any, Any], tuple[np.ndarray, np.ndarray]]
    # (sizes, params, pixels, codes that are drawn) -> a sampler that keeps the image's other codes
    bind: Callable[[Sizes, Params, np.ndarray, np.ndarray], Sample]


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, so that it can be hashed
class Family:
    """One kind of unified model; `policies.FAMILIES` lists all of them."""

    kind: NetworkKind  # the network, its checkpoints and its layout on a mesh
    presets: Mapping[str, Sizes]  # published sizes by name, for the command `plan`
    open_processor: Callable[[Path], Any]  # folder -> policies.processor.Processor
    # Special tokens for compiling without a tokenizer. Ids are constants of a program, no shapes.
    stand_in_tokens: Any
    prompt_bucket: int  # the processor pads prompts to a multiple of this many tokens
    # parameters
    trainable: tuple[str, ...]  # regexes of the parameters that are trained by default
    float32_parts: tuple[str, ...]  # first names of paths that compute in float32 in any dtype
    tokenizer_parts: tuple[str, ...]  # first names of paths that only the stage vq trains
    limits: Callable[[Sizes], Limits]
    # sampling and scoring
    turns: Mapping[TurnKinds, TurnProgram]  # by the kinds of the segments of each turn
    blank_prompts: Callable[[Array, Any], Array]  # (ids, special) -> ids of guidance's other rows
    # images: values are those of a segment of codes
    decode_images: Callable[..., jax.Array]  # (sizes, params, values, dtype=) -> uint8 [N, S, S, 3]
    encode_images: Callable[[Sizes, Params, jax.Array], jax.Array]  # [N, S, S, 3] in [-1, 1]
    # (ids of questions [B, P], codes of their images, special) -> ids with these codes, if the
    # family reads the codes of `encode_images`. None: it reads pixels, with a network of its own.
    place_codes: Callable[[Array, Array, Any], Array] | None = None
    reads_codes: Callable[[Sizes], bool] = lambda sizes: True  # whether these sizes do so
    prompts: tuple[str, ...] = ("generate", "question")  # kinds that the processor encodes
    denoises: bool = False  # images are made by denoising: their segments are of latents
    undecayed: tuple[str, ...] = ()  # regexes of the parameters without weight decay
    draws_windows: bool = False  # codes of images are drawn in order, and can be in windows
    # name -> regexes of the parameters that can have a learning rate of their own
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    # Sampling options of commands that neither the user nor the checkpoint states, where they are
    # not those of `sampling_options.DEFAULTS`.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Optional parts; without them the program refuses the options that need them.
    adapters: Adapters | None = None
    alignment: Alignment | None = None
    hidden_states: HiddenStates | None = None
    # (sizes, params, pixels) -> (loss, metrics): the stage that trains the image tokenizer
    tokenizer_loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None = None
    # (processor, name of a pair; None: the checkpoint's) -> the processor with these chat roles
    choose_roles: Callable[[Any, str | None], ChatRoles] | None = None
    # (processor, uint8 [N, S, S, 3] of `input_image_side`) -> pixel values as `encode` makes them,
    # on the device. Without it, rewards let `encode` make them on the host, which takes longer.
    normalise_pixels: Callable[[Any, jax.Array], jax.Array] | None = None
    inpainting: Inpainting | None = None
    # (images of Pillow, side) -> float32 [N, side, side, 3] in [-1, 1], for `encode_images`; None:
    # given images are cut by `data.images.fit_pixels`
    fit_pixels: Callable[[Sequence[Any], int], np.ndarray] | None = None
    # sizes -> how images are normalised, for compiling without a processor
    stand_in_image: Callable[[Sizes], Any] = lambda sizes: None
    # what a model of these sizes lacks for a task that others of the family can do
    find_size_lack: Callable[[Sizes, Task], str | None] = lambda sizes, task: None

    @property
    def name(self) -> str:
        """The name of the family, as in FAMILIES."""
        return self.kind.name

    @property
    def rules(self) -> Rules:
        """Layout of each parameter on a mesh, by its path."""
        return self.kind.rules

    @property
    def draws_in_any_order(self) -> bool:
        """True if the codes of an image are drawn in any order, in a number of steps."""
        return any(program.choose_scored for program in self.turns.values())

    @property
    def takes_image_steps(self) -> bool:
        """True if an image is drawn in a number of steps that can be chosen."""
        return self.draws_in_any_order or self.denoises

    def find_lack(self, task: Task, sizes: Sizes | None = None) -> str | None:
        """Returns what the task needs and the family lacks; None if the family can do the task.

        With `sizes` also what a model of these sizes lacks.
        """
        kinds = task.turn_kinds
        if kinds not in self.turns:
            # (("codes",), ("text",)) -> "of codes, then of text"
            needed = ", then ".join(f"of {' and '.join(of_turn)}" for of_turn in kinds)
            count = "one turn" if len(kinds) == 1 else f"{len(kinds)} turns"
            return f"has {count} and needs segments {needed}, which a {self.name} does not make"
        unknown = [turn.prompt for turn in task.turns if turn.prompt not in self.prompts]
        if unknown:
            return f"has prompts {' and '.join(unknown)}, which a {self.name} does not encode"
        return None if sizes is None else self.find_size_lack(sizes, task)

    def abstract(self, sizes: Sizes) -> Params:
        """Returns the shapes of all parameters as a nested dict of ShapeDtypeStruct."""
        return modules.make_abstract(self.kind.module, sizes)

    def compute_dtype(self, path: str, dtype: Any) -> Any:
        """Returns the dtype of one parameter of a model that computes in `dtype`."""
        return params_lib.compute_dtype(path, dtype, self.float32_parts)

    def cast(self, params: Params, dtype: Any) -> Params:
        """Returns a copy of the parameters for computing in `dtype`; see `float32_parts`."""
        return params_lib.cast(params, dtype, self.float32_parts)

    def base(self, sizes: Sizes) -> Sizes:
        """Returns the sizes of the checkpoint and the reference, without what training adds."""
        return self.adapters.remove(sizes) if self.adapters else sizes

    def lora_of(self, sizes: Sizes) -> Any:
        """Returns the `models.lora.Lora` of the adapters; None without adapters."""
        return self.adapters.options_of(sizes) if self.adapters else None
