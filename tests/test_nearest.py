"""Suggestions in error messages."""

from corl_jax.nearest import nearest_divisors, nearest_multiples, suggest_name


def test_the_nearest_name_is_suggested_with_all_that_are_known():
    known = {"prompts_per_step": 1, "epochs": 2}
    text = "did you mean epochs? (known: prompts_per_step, epochs)"
    assert suggest_name("epoch", known) == text


def test_names_that_are_not_similar_are_only_listed():
    assert suggest_name("spec", ["prompt", "image"], "found") == "found: prompt, image"
    assert suggest_name("eps", ["b1", "warmup_steps"]) == "known: b1, warmup_steps"
    assert suggest_name("vq", ["eval", "model"]) == "known: eval, model"
    assert suggest_name("a", ["eval", "attention"]) == "known: eval, attention"


def test_first_letters_of_words_are_near():
    text = "did you mean learning_rate? (known: learning_rate, b1)"
    assert suggest_name("lr", ["learning_rate", "b1"]) == text


def test_divisors_on_both_sides():
    assert nearest_divisors(16, 5) == "4 or 8" and nearest_divisors(16, 3) == "2 or 4"
    assert nearest_divisors(8, 9) == "8" and nearest_divisors(7, 3) == "1 or 7"


def test_multiples_on_both_sides():
    assert nearest_multiples(8, 12) == "8 or 16" and nearest_multiples(8, 3) == "8"
