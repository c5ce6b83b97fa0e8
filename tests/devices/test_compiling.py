"""Programs with XLA options of their own."""

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.devices import compiling
from corl_jax.devices.compiling import ExactProgram


def test_an_exact_program_is_compiled_without_triton_on_nvidia_alone(monkeypatch):
    program = ExactProgram(lambda x, *, power: x**power, static_argnames=("power",))
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(program(x, power=2), x**2)
    assert (program.default._cache_size(), "without_triton" in vars(program)) == (1, False)
    monkeypatch.setattr(compiling, "is_nvidia", lambda: True)  # here the option changes nothing
    np.testing.assert_array_equal(program(x, power=3), x**3)
    assert (program.default._cache_size(), program.without_triton._cache_size()) == (1, 1)
    # As a part of another program, which takes no options.
    np.testing.assert_array_equal(jax.jit(lambda x: program(x, power=2) + 1)(x), x**2 + 1)
    assert program.without_triton._cache_size() == 1
