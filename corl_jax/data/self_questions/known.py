"""The objects that answers can be judged for: the list of the generator and the drawn shapes."""

from __future__ import annotations

from collections.abc import Mapping

from corl_jax.data.drawn_world.language import make_plural
from corl_jax.data.drawn_world.scene import SHAPES
from corl_jax.data.self_questions.objects import PLURALS

KNOWN_OBJECTS: Mapping[str, str] = {**PLURALS, **{shape: make_plural(shape) for shape in SHAPES}}
"""Object -> its plural."""
