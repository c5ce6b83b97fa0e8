"""Suggestions in error messages."""

from corl_jax.nearest import nearest_divisors, nearest_multiples, suggest_name


def test_the_nearest_name_is_suggested_with_all_that_are_known():
    known = {"prompts_per_step": 1, "epochs": 2}
    text = "did you mean epochs? (known: prompts_per_step, epochs)"
    assert suggest_name("epoch", known) == text
    assert suggest_name("x", known).startswith("did you mean ")


def test_a_cutoff_leaves_out_names_that_are_not_similar():
    assert suggest_name("spec", ["prompt", "image"], "found", 0.6) == "found: prompt, image"
    text = "did you mean prompt? (found: prompt, image)"
    assert suggest_name("promt", ["prompt", "image"], "found", 0.6) == text


def test_divisors_on_both_sides():
    assert nearest_divisors(16, 5) == "4 or 8" and nearest_divisors(16, 3) == "2 or 4"
    assert nearest_divisors(8, 9) == "8" and nearest_divisors(7, 3) == "1 or 7"


def test_multiples_on_both_sides():
    assert nearest_multiples(8, 12) == "8 or 16" and nearest_multiples(8, 3) == "8"
