"""A fuzz target for each parser of foreign bytes: an answer, or InputError, and nothing else.

Examples are the same in every run; the slow ones are the many. Files that C code reads
(pictures, parquet, PyTorch's) are mutated in a process of their own, see `hostile`.
"""

from __future__ import annotations

import json
import math
import string
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corl_jax.config import files as config_files
from corl_jax.config.schema import Config
from corl_jax.data.column_values import find_spec_problem, find_value_problem
from corl_jax.data.drawn_world import checker
from corl_jax.errors import InputError, Problems
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.prompts import Processor
from corl_jax.policies.janus.tokens import ROLES, STRINGS
from corl_jax.rewards import answers, text
from corl_jax.rewards.image_rewards import _measure_fraction_correct
from corl_jax.weights import storage
from corl_jax.weights.checkpoint import load_config
from corl_jax.weights.layouts import KINDS
from corl_jax.weights.own_config import build_config, make_own_config
from tests.faults.hostile import SOUND, header
from tests.faults.test_untrusted import hostile
from tests.support.tiny_models import tiny_tokenizer_dir
from tests.support.weight_files import hf_config_dict, original_config_dict

EFFORT = [
    pytest.param(60, id="few"),
    pytest.param(2_000, id="many", marks=pytest.mark.slow),
]
SECONDS = 60.0  # of processor, for what takes milliseconds: a reader that does not end takes more


@pytest.fixture(params=EFFORT)
def hammer(request, figure):
    """Runs a check on examples of a strategy, and records how many."""

    def run(what, strategy, check, share=1.0):
        examples, tried = max(20, int(request.param * share)), 0

        def counted(example):
            nonlocal tried
            tried += 1
            check(example)

        profile = settings(
            max_examples=examples, derandomize=True, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        profile(given(strategy)(counted))()
        figure("fuzz", fault=what, tries=tried, losses=0)

    return run


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 20),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "../x", "\0", "gelu", "1e-4", "a" * 1000]),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def changed(draw, tree):
    """A tree of settings with one to four of its values replaced, removed or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 4))):
        node, parent, key = tree, None, None
        while isinstance(node, dict) and node and (parent is None or draw(st.integers(0, 3))):
            parent, key = node, draw(st.sampled_from(sorted(node)))
            node = parent[key]
        if parent is None:
            break
        what = draw(st.integers(0, 5))
        if what == 0:
            del parent[key]
        elif what == 1:
            parent[draw(st.text(max_size=8))] = draw(values)
        else:
            parent[key] = draw(values)
    return tree


# ---- the config of a run

RUN = {
    "output_dir": "run", "model": {"path": "m", "dtype": "float32"}, "data": {"path": ["a", "b"]},
    "rewards": [{"name": "format", "weight": 0.5}, {"use": "a.py:b", "options": {"x": 1}}],
    "rollout": {"group_size": 4, "top_p": 0.9}, "train": {"prompts_per_step": 8, "micro_batch": 4},
    "optimizer": {"learning_rate": 1e-4, "name": "lion"}, "mesh": {"data": -1, "fsdp": 2},
    "algorithm": {"tasks": "t2i"}, "eval": {"suite": "none"}, "compat": {"mc_as_open_ended": True},
}  # fmt: skip
yaml_pieces = st.sampled_from(
    ["&a ", "*a", "- ", ": ", "{", "}", "[", "]", "!!python/object/apply:os.system [ls]", "!!float",
     "'", '"', "|", ">", "\n", "  ", "\t", "#", "---", "<<: ", "2026-13-45", "0x", "1:2:3",
     "\ufeff", "seed", "train", "?", "%YAML 9.9", "0b2", "!!binary x", "!!int ''", "!!timestamp x",
     "\x85"]
)  # fmt: skip


def test_config(hammer, tmp_path):
    """Trees of wrong values, and texts that are hardly YAML."""
    file = tmp_path / "run.yaml"

    def check(content):
        tree = yaml.safe_dump(content) if isinstance(content, dict) else content
        file.write_text(tree, encoding="utf-8", errors="surrogatepass")
        try:
            assert isinstance(config_files.load(file), Config)
        except InputError as error:
            assert error.problems and all(str(file) in line for line in error.problems)

    hammer("config: values", changed(RUN), check)
    mixed = st.lists(yaml_pieces | st.text(max_size=4), max_size=12).map("".join)
    hammer("config: text", mixed.filter(lambda t: not t.startswith("base")), check)
    override = st.builds(
        "{}={}".format, st.sampled_from(["seed", "train.epochs", "a..b", ""]), mixed
    )
    file.write_text(yaml.safe_dump(RUN))

    def overridden(argument):
        try:
            config_files.load(file, [argument])
        except InputError as error:
            assert error.problems

    hammer("config: overrides", override, overridden, 0.5)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in
                                 zip(string.ascii_letters, string.ascii_letters[1:], strict=False)),
         "aliases written out"),
        ("a: &a [*a]", "refers to itself"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("seed: 2026-13-45", "seed: found '2026-13-45'"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("x" * (config_files.MAX_CHARACTERS + 1), "characters"),
        ("seed: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
    ids=["aliases", "cycle", "deep", "date", "digits", "long", "python"],
)  # fmt: skip
def test_configs_made_to_break_their_reader(figure, tmp_path, content, expected):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    began = time.process_time()
    with pytest.raises(InputError, match=expected):
        config_files.load(file)
    assert time.process_time() - began < SECONDS
    figure("fuzz", fault="config: made by hand", tries=1, losses=0)


# ---- the settings of a model

network = {"model_type": "x", "network": "bert", "format_version": 1}


def test_model_settings(hammer, tmp_path):
    """config.json of every layout and kind; what is accepted has sizes that a network can have."""
    file = tmp_path / "config.json"

    def janus(data):
        file.write_text(json.dumps(data))
        try:
            load_config(tmp_path, KIND)
        except InputError as error:
            assert all(str(file) in line for line in error.problems)

    hammer("config.json: transformers", changed(hf_config_dict()), janus)
    hammer("config.json: original", changed(original_config_dict()), janus)
    file.write_text(json.dumps(hf_config_dict()))
    ours = make_own_config(KIND, load_config(tmp_path, KIND), "original", {})
    hammer("config.json: ours", changed(ours), janus)
    for name, kind in KINDS.items():
        sizes = json.loads(json.dumps(_as_dict(kind.config())))

        def converted(data, kind=kind):
            problems = Problems()
            config = build_config(kind.config, data, "there: sizes", problems)
            problems.add([] if problems else kind.check(config, "there: sizes"))
            assert all(line.startswith("there: sizes") for line in problems)
            if not problems:
                assert kind.config().__class__ is config.__class__ and hash(config) is not None

        hammer(f"config.json: {name}", changed(sizes), converted)

        def foreign(data, kind=kind):
            file.write_text(json.dumps(data))
            problems = Problems()
            config = kind.parse(tmp_path, next(iter(kind.tables)), {}, problems)
            assert problems or isinstance(kind.check(config, "there"), list)

        hammer(f"foreign config.json: {name}", changed(hf_config_dict() | {"model_type": name}),
               foreign, 0.3)  # fmt: skip


def _as_dict(config):
    import dataclasses

    return dataclasses.asdict(config)


# ---- safetensors header, index.json


def test_safetensors_header(hammer, tmp_path):
    """JSON of any shape in place of a header; bytes are mutated in test_untrusted."""
    file = tmp_path / "model.safetensors"
    sound = json.loads(SOUND[8:-20])

    def check(entries):
        file.write_bytes(header(entries, SOUND[-20:]))
        try:
            infos = storage.read_header(file)
        except InputError as error:
            assert all(str(file) in line for line in error.problems)
            return
        assert sum(info.nbytes for info in infos.values()) == 20

    hammer("safetensors header", changed(sound) | values, check)


def test_index(hammer, tmp_path):
    """Whatever it says, the shards that come out lie in its folder."""
    file = tmp_path / "model.safetensors.index.json"
    (tmp_path / "a.safetensors").write_bytes(SOUND)
    names = st.sampled_from(["a.safetensors", "../a", "/etc/passwd", "", ".", "a\0", "a/../a", "A"])
    maps = st.dictionaries(st.text(max_size=6), names | values, max_size=4)

    def check(content):
        file.write_text(json.dumps(content) if not isinstance(content, str) else content)
        try:
            shards = storage.read_index(file)
        except InputError as error:
            assert all(str(tmp_path) in line for line in error.problems)
            return
        assert shards and set(shards.values()) == {tmp_path / "a.safetensors"}

    hammer("index.json", st.fixed_dictionaries({"weight_map": maps}) | values, check)
    hammer("index.json: text", st.text(max_size=40), check, 0.3)


# ---- parquet row, image


@pytest.mark.parametrize(
    "count", [pytest.param(500, id="few"), pytest.param(20_000, id="many", marks=pytest.mark.slow)]
)
def test_parquet(figure, tmp_path, count):
    report = hostile("parquet", count, 1, tmp_path)
    figure("fuzz", fault="parquet file and rows", tries=count, losses=len(report["escaped"]),
           note=f"{report['accepted']} read, {report['mib']} MiB")  # fmt: skip
    assert not report["escaped"] and report["mib"] < 300


@pytest.mark.slow
@pytest.mark.parametrize("what", ["images", "pickles"])
def test_many_binary_files(figure, tmp_path, what):
    report = hostile(what, 20_000, 1, tmp_path)
    figure("fuzz", fault=what, tries=report["tries"], losses=len(report["escaped"]),
           note=f"{report['accepted']} read, {report['mib']} MiB")  # fmt: skip
    assert not report["escaped"] and report["mib"] < 300


# ---- chat template input


def test_chat_input(hammer, tmp_path):
    """Text of a user never becomes structure, and comes back as it was."""
    processor = Processor.from_dir(tiny_tokenizer_dir(tmp_path))
    structure = [*STRINGS.values(), *ROLES["deepseek"]]
    ids = {processor.tokenizer.convert_tokens_to_ids(token) for token in structure}
    pieces = st.sampled_from(structure) | st.text(max_size=6) | st.sampled_from(
        ["<|", "|>", "\n\n", "User:", "{{ x }}", "{% for %}", "\u202e", "\0", "  "]
    )  # fmt: skip
    plain = {"t2i": processor.t2i_ids("a"), "mm2t": processor.mm2t_ids("a")}

    def check(words):
        said = "".join(words)
        for task, found in (("t2i", processor.t2i_ids(said)), ("mm2t", processor.mm2t_ids(said))):
            assert [i for i in found if i in ids] == [i for i in plain[task] if i in ids]
        answer = processor.answer_ids(said)
        assert not ids & set(answer)
        assert processor.decode(answer) == said.encode(errors="replace").decode()

    hammer("chat input", st.lists(pieces, max_size=8), check)


# ---- what rewards read in a row

DEMAND = {
    "category": "position",
    "include": [
        {"class": "circle", "count": 1, "color": "red", "position": ["left of", 1]},
        {"class": "square", "count": 2},
    ],
}
FOUND = [
    checker.Detection("circle", "red", (9.0, 5.0), (2, 2, 8, 16), 0.1, 1.0),
    checker.Detection("square", "blue", (9.0, 20.0), (16, 2, 24, 16), 0.1, 1.0),
]


def test_columns_of_rewards(hammer):
    """What is let pass can be scored; what is not is said in a line, however large it is."""

    def check(content):
        for value in (content, json.dumps(content)):
            problems = {
                name: find_value_problem(name, value)
                for name in ("spec", "od_solution", "cls_solution")
            }
            assert all(len(problem) < 700 for problem in problems.values() if problem)
            if value is not None and problems["spec"] is None:
                demand = json.loads(value) if isinstance(value, str) else value
                for strict in (True, False):
                    assert checker.satisfies(FOUND, demand, strict=strict) in (True, False)
                assert 0 <= _measure_fraction_correct(FOUND, demand) <= 1
            if problems["od_solution"] is None:
                answer = "<answer>[{'Position': [0, 0, 9, 9], 'Confidence': 1}]</answer>"
                score = text.od_answer_score(answer, value)
                assert math.isnan(score) or 0 <= score <= 1

    boxes = st.lists(st.lists(scalars | st.integers(0, 9), min_size=3, max_size=5), max_size=3)
    hammer("spec of a row", changed(DEMAND) | values, check)
    hammer("boxes of a row", boxes, check, 0.5)


@pytest.mark.parametrize(
    "spec",
    [
        "[" * 100_000,
        '{"category": "colors", "include": [{"class": "circle", "count": 1e999}]}',
        '{"category": "colors", "include": [{"class": "circle", "count": "1"}]}',
        '{"category": "colors", "include": [{"class": "circle", "count": 1, "position": ["above", 1]}]}',  # noqa: E501
        '{"category": "colors", "include": ' + "9" * 5000 + "}",
    ],
    ids=["deep", "infinite", "text", "alone", "digits"],
)
def test_specs_made_to_break_their_reader(spec):
    problem = find_spec_problem(spec)
    assert problem.startswith("found '") and "expected {category" in problem
    assert len(problem) < 700


# ---- answers


def test_answer_parsers(hammer):
    """Any text gets a score in its range, within a moment."""
    pieces = st.sampled_from(
        ["<answer>", "</answer>", "<think>", "</think>", "A.", "(B)", "not ", "option ", "Answer: ",
         "**", "'", '"', "\u201c", "\n", " ", ",", ";", "two", "million", "hundred", "and", "point",
         "[{'Position': [0, 0, 9, 9], 'Confidence': 1}]", "[", "{", "'Position'", ":", "1e999",
         "9" * 40, "-", "\\boxed{", "UNK", ".", "A"]
    )  # fmt: skip
    words = st.lists(pieces | st.text(max_size=5), max_size=30).map("".join)
    many = st.builds(lambda piece, count: piece * count, pieces, st.integers(0, 600))
    said = words | st.builds("{}{}{}".format, words, many, words)

    def check(example):
        answer, solution, problem, kind = example
        began = time.process_time()
        scores = [
            text.format_reward(answer),
            text.format_tag_reward(answer),
            text.qa_accuracy(answer, solution, kind, problem=problem),
            text.oc_accuracy(answer, solution),
            text.oc_answer_score(answer, solution, problem),
            text.qa_answer_score(answer, solution, kind, problem),
            text.od_answer_score(answer, solution),
        ]
        assert all(math.isnan(score) or 0 <= score <= 1 for score in scores)
        detections = answers.parse_detections(answer)
        assert detections is None or len(detections) <= answers.MAX_DETECTIONS
        assert time.process_time() - began < SECONDS, (len(answer), answer[:200])

    kinds = st.sampled_from(["MC", "OE", None, "multiple choice"])
    hammer("answers", st.tuples(said, said, said, kinds), check)
