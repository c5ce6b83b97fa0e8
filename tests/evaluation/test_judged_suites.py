"""GenEval 2, DPG-Bench, WISE and T2I-CompBench from their judges' files, by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import gmean

from corl_jax.errors import InputError
from corl_jax.evaluate.__main__ import main
from corl_jax.evaluation import compbench_rules, dpg_rules, soft_tifa, wise_rules
from corl_jax.evaluation.units import read_units

# ---- GenEval 2


def make_prompts(tmp_path, *skills):
    rows = [
        {"prompt": f"prompt {n}", "atom_count": 3 + n, "vqa_list": [["q", "a"]] * len(names),
         "skills": list(names)}
        for n, names in enumerate(skills)
    ]  # fmt: skip
    path = tmp_path / "geneval2_data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(suite, *arguments):
    main(["--suite", suite, *map(str, arguments)])


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def refuse(capsys, suite, *arguments):
    with pytest.raises(SystemExit) as ended:
        run(suite, *arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_soft_tifa(tmp_path, capsys):
    data = make_prompts(tmp_path, ("object", "count"), ("object", "object", "verb"))
    results = tmp_path / "lists.json"
    results.write_text(json.dumps([[0.25, 1.0], [0.5, 0.5, 0.0]]))
    run("geneval2-score", "--results", results, "--data", data, "--out", tmp_path / "out")
    scores = report_of(tmp_path / "out")["scores"]
    means = {name: score["mean"] for name, score in scores.items()}
    assert means == pytest.approx({
        # The geometric means are 0.5 and 0, the means 0.625 and 1 / 3.
        "soft_tifa_gm": 25, "soft_tifa_am": 100 * (0.625 + 1 / 3) / 2,
        "skill/object": 100 * 1.25 / 3, "skill/count": 100, "skill/verb": 0,
        "atoms/3": 50, "atoms/4": 0,
    })  # fmt: skip
    assert (scores["soft_tifa_gm"]["low"], scores["soft_tifa_gm"]["high"]) == (0, 50)
    units = read_units(tmp_path / "out")
    assert units[1].name == "001: prompt 1" and units[1].category == "4 atoms"
    assert units[1].values["skill/object"] == 50
    printed = capsys.readouterr()
    assert "method: soft_tifa" in printed.out and "2 prompts; GenEval 2 has 800" in printed.err


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_the_geometric_mean_is_scipys(scores):
    with np.errstate(divide="ignore"):
        assert soft_tifa.geometric_mean(scores) == pytest.approx(gmean(scores))
    assert soft_tifa.geometric_mean(scores) <= soft_tifa.average_scores(scores) + 1e-12


def test_the_form_tells_the_method():
    prompts = [soft_tifa.Prompt("a", 3, ("object", "count"))]
    assert soft_tifa.guess_method([[0, 1]], prompts) == "tifa"
    assert soft_tifa.guess_method([[0.5, 1]], prompts) == "soft_tifa"
    assert soft_tifa.guess_method([[0.5]], prompts) == "vqascore"
    assert soft_tifa.summarize_lists([[0.5]], prompts, "vqascore")["vqascore"].mean == 50
    assert soft_tifa.summarize_lists([[0, 1]], prompts, "tifa")["tifa"].mean == 50


@pytest.mark.parametrize(
    ("lists", "part"),
    [([[0.5, 0.5]], "has 1 lists, the data file 2 prompts"), ([[0.5], [0.5, 0.5]], "list 1 has 2"),
     ([[0.5, "x"], [0.5]], "list 0 is"), ({}, "found dict")],
)  # fmt: skip
def test_score_lists_that_do_not_fit(lists, part, tmp_path, capsys):
    data = make_prompts(tmp_path, ("object", "count"), ("object",))
    results = tmp_path / "lists.json"
    results.write_text(json.dumps(lists))
    assert part in refuse(capsys, "geneval2-score", "--results", results, "--data", data)


# ---- DPG-Bench

CSV = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,\
question_natural_language
0,t,k,1,0,e,w,entity - whole (dog),Is there a dog?
0,t,k,2,1,a,c,"attribute - color (dog, red)","Is the dog red, or brown?"
7,t,k,1,0,e,w,entity - whole (cat),Is there a cat?
7,t,k,2,3,r,s,"relation - spatial (cat, mat)",Is the cat on the mat?
7,t,k,3,1,a,o,attribute - other (cat),Is the cat old?
part9,t,k,1,"0",g,g,global - (photo),Is it a photo?
"""


@pytest.fixture
def questions_file(tmp_path):
    path = tmp_path / "dpg_bench.csv"
    path.write_text(CSV)
    return path


def detail_lines(item, side, *pictures):
    """The official detail file: a line a question, in the order of the pictures."""
    texts = {
        "0": ["Is there a dog?", "Is the dog red, or brown?"],
        "7": ["Is there a cat?", "Is the cat on the mat?", "Is the cat old?"],
        "part9": ["Is it a photo?"],
    }[item]
    corners = [(0, 0), (side, 0), (0, side), (side, side)]
    return "".join(
        f"out, a/{item}.png, {(x, y, x + side, y + side)}, {text}, {answer}\n"
        for (x, y), answers in zip(corners, pictures, strict=False)
        for text, answer in zip(texts, answers, strict=True)
    )


def test_parents_count_in_the_order_of_the_file(questions_file):
    questions = dpg_rules.read_questions(questions_file)["7"]
    assert questions[2].parents == (3,) and questions[2].category == "relation - spatial"
    scores = dpg_rules.score_questions({1: "no", 2: "yes", 3: "yes"}, questions)
    # Question 3 becomes 0 after question 2 was looked at, which therefore stays.
    assert dpg_rules.apply_parents(scores, questions) == {1: 0, 2: 1, 3: 0}
    scores = dpg_rules.score_questions({1: "yes", 2: "yes", 3: "Yes"}, questions)
    assert dpg_rules.apply_parents(scores, questions) == {1: 1, 2: 0, 3: 0}


def test_both_ways_to_compute_the_score(questions_file, tmp_path, capsys):
    results = tmp_path / "dpg_detail.txt"
    results.write_text(
        detail_lines("0", 384, *[["yes", "yes"]] * 3, ["no", "yes"])
        + detail_lines("7", 384, *[["yes", "no", "yes"]] * 2, *[["no", "yes", "yes"]] * 2)
        + detail_lines("part9", 384, *[["yes"], ["yes, it is"], ["no"], ["no"]])
    )
    run("dpg-score", "--results", results, "--csv", questions_file, "--out", tmp_path / "out")
    report = report_of(tmp_path / "out")
    seven, nine = (2 / 3 + 2 / 3 + 1 / 3 + 1 / 3) / 4, 1 / 4
    # Without its first question the second one of prompt 0 has no parent, so the prompt is lost.
    assert report["scores"]["as released"]["mean"] == pytest.approx(100 * (seven + nine) / 2)
    zero = (1 + 1 + 1 + 0) / 4
    assert report["scores"]["corrected"]["mean"] == pytest.approx(100 * (zero + seven + nine) / 3)
    released, corrected = (report["categories"][name] for name in ("as released", "corrected"))
    # Last picture alone, before parents: cat no, mat yes, old yes, photo no.
    assert released["detailed"] == {
        "attribute - other": 100, "entity - whole": 0, "global -": 0, "relation - spatial": 100,
    }  # fmt: skip
    assert released["broad"] == {"attribute": 100, "entity": 0, "global": 0, "relation": 100}
    assert corrected["detailed"] == {
        "attribute - color": 75, "attribute - other": 50, "entity - whole": 100 * 5 / 8,
        "global -": 25, "relation - spatial": 50,
    }  # fmt: skip
    assert corrected["broad"]["attribute"] == 100 * 5 / 8
    assert report["settings"]["score"] == "as released"
    assert [unit.name for unit in read_units(tmp_path / "out")] == ["7", "part9"]
    assert [unit.category for unit in read_units(tmp_path / "out")] == ["numbered", "part"]
    printed = capsys.readouterr().err
    assert "as released: prompt 0 is left out: question 2 depends on question 1" in printed
    run("dpg-score", "--results", results, "--csv", questions_file, "--no-first-row-bug",
        "--out", tmp_path / "corrected")  # fmt: skip
    assert [unit.name for unit in read_units(tmp_path / "corrected")] == ["0", "7", "part9"]


def test_answers_as_json_lines_give_the_same(questions_file, tmp_path):
    text = tmp_path / "detail.txt"
    text.write_text(detail_lines("7", 64, ["yes", "no", "yes"], ["no", "yes", "yes"]))
    lines = tmp_path / "answers.jsonl"
    rows = [{"1": "yes", "2": "no", "3": "yes"}, {"1": "no", "2": "yes", "3": "yes"}]
    lines.write_text("".join(json.dumps({"item_id": "7", "answers": row}) + "\n" for row in rows))
    questions = dpg_rules.read_questions(questions_file)
    answers = [dpg_rules.read_answers(path, questions) for path in (text, lines)]
    assert answers[0] == answers[1] and len(answers[0]["7"]) == 2


def test_a_question_that_stands_twice_has_one_answer(questions_file, tmp_path):
    questions_file.write_text(CSV + 'part9,t,k,2,"1",g,g,global - (film),Is it a photo?\n')
    results = tmp_path / "detail.txt"
    results.write_text(detail_lines("part9", 64, ["yes"], ["no"]))
    questions = dpg_rules.read_questions(questions_file)
    answers = dpg_rules.read_answers(results, questions)
    assert answers == {"part9": [{1: "yes", 2: "yes"}, {1: "no", 2: "no"}]}
    assert dpg_rules.score_prompts(answers, questions)[0]["part9"].mean == 0.5


def test_a_prompt_without_questions_is_refused(tmp_path, capsys):
    data = make_prompts(tmp_path, ("object",), ())
    results = tmp_path / "lists.json"
    results.write_text("[[1.0], []]")
    printed = refuse(capsys, "geneval2-score", "--results", results, "--data", data)
    assert f"{data}:2: has no questions; expected at least one" in printed


@pytest.mark.parametrize(
    ("line", "part"),
    [("a/7.png, (0, 0, 4, 4), Is it so?, yes", "no question 'Is it so?'"),
     ("nonsense", "expected PATH"),
     ("a/8.png, (0, 0, 4, 4), Is there a cat?, yes", "no question"),
     ('{"item_id": "8", "answers": {"1": "yes"}}', "1 prompts have no questions, such as 8"),
     ('{"item_id": "7", "answers": {"1": "yes"}}', "7 has no answer to question 2, 3"),
     ('{"item_id": "7"}', "KeyError 'answers'"), ("", "found no answers")],
)  # fmt: skip
def test_answers_that_are_refused(line, part, questions_file, tmp_path, capsys):
    results = tmp_path / "answers"
    results.write_text(line + "\n")
    printed = refuse(capsys, "dpg-score", "--results", results, "--csv", questions_file)
    assert part in printed, printed


# ---- WISE


@pytest.mark.parametrize(
    ("text", "score"),
    [("Score: 1", 1), ("**Score**: 0", 0), ("score 1", 1), ("Score:\n1", 1), ("Score1", 1),
     # The stars behind the colon are not allowed for, nor is the wide colon.
     ("**Score:** 1", None), ("Score：1", None), ("Score: 10", None), ("Score: 2", None),
     ("Score: 0\nScore: 1", 0), ("Good.\n 1 \n", 1), ("1\n0", None), ("It is 1.", None),
     ("**Score:** 1\n0", 0), ("", None)],
)  # fmt: skip
def test_verified_scores(text, score):
    assert wise_rules.extract_verified(text) == score


@pytest.mark.parametrize(
    ("text", "scores"),
    [("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", (2, 1, 0)),
     ("**Consistency** 2, **realism**: 1; AESTHETIC QUALITY 0", (2, 1, 0)),
     ("Consistency: 0\nConsistency: 2\nRealism: 9\nAesthetic Quality: 15", (2, 9, 1)),
     ("2\n1\n 0 ", (2, 1, 0)), ("2\n1\n0\n1", None), ("2\n1\n3", None),
     ("Consistency: 2\nRealism: 1", None), ("Consistency: 2\n0\n1\n2", (0, 1, 2))],
)  # fmt: skip
def test_legacy_scores(text, scores):
    found = wise_rules.extract_legacy(text)
    assert (found and tuple(found.values())) == scores


def test_samples_by_hand():
    legacy = {"consistency": 2, "realism": 1, "aesthetic_quality": 0}
    assert wise_rules.compute_sample_score("legacy", legacy) == pytest.approx(0.8)
    assert wise_rules.compute_sample_score("verified", {"score": 1}) == 1


@pytest.mark.parametrize(
    ("version", "borders"),
    [("verified", (400, 520, 640, 760, 880, 1000)), ("legacy", (400, 567, 700, 800, 900, 1000))],
)
def test_categories_of_ids(version, borders):
    find = wise_rules.VERSIONS[version].find_category
    for name, following, last in zip(
        wise_rules.CATEGORIES, [*wise_rules.CATEGORIES[1:], None], borders
    ):
        assert find(last) == name and find(last + 1) == following
    assert find(0) is None
    assert sum(wise_rules.VERSIONS[version].weights.values()) == pytest.approx(1)


def test_the_overall_score_is_weighted_and_needs_every_id():
    # All of culture right, half of time, nothing else.
    samples = {n: float(n <= 400 or (n <= 520 and n % 2)) for n in range(1, 1001)}
    scores = wise_rules.summarize_samples(samples, "verified")
    assert scores["overall"].mean == pytest.approx(0.4 + 0.12 / 2)
    assert scores["TIME"].mean == 0.5 and scores["CULTURE"].low == 1
    # Legacy: 60 of the 167 ids of time.
    assert wise_rules.summarize_samples(samples, "legacy")["overall"].mean == pytest.approx(
        0.4 + 0.167 * 60 / 167
    )
    del samples[1000]
    assert "overall" not in wise_rules.summarize_samples(samples, "verified")
    assert wise_rules.find_missing_ids(samples) == [1000]


def test_texts_and_scores_of_wise(tmp_path, capsys):
    texts = tmp_path / "full.json"
    texts.write_text(json.dumps([
        {"prompt_id": 1, "evaluation": "Score: 1"}, {"prompt_id": 2, "evaluation": "no idea"},
    ]))  # fmt: skip
    lines = tmp_path / "scores.jsonl"
    lines.write_text('{"prompt_id": 401, "Subcategory": "x", "score": 0}\n')
    run("wise-score", "--results", texts, lines, "--out", tmp_path / "out")
    printed = capsys.readouterr()
    assert "the text for id 2 states no score" in printed.err
    assert "no overall score: 998 of the 1000 ids are missing, such as 2, 3, 4" in printed.err
    assert "overall" not in printed.out and "CULTURE" in printed.out and "1.00" in printed.out
    assert {unit.name: unit.values["wiscore"] for unit in read_units(tmp_path / "out")} == {
        "1": 1, "401": 0,
    }  # fmt: skip
    printed = refuse(capsys, "wise-score", "--results", lines, "--version", "legacy")
    assert "see --version" in printed
    lines.write_text('{"prompt_id": 401, "score": 2}\n{"prompt_id": 0, "score": 1}\n' * 2)
    printed = refuse(capsys, "wise-score", "--results", lines)
    assert "score is 2; expected 0 or 1" in printed and "prompt_id is 0" in printed


# ---- T2I-CompBench


def write_answers(folder, answers):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question_id": n, "answer": answer} for n, answer in enumerate(answers)]
    (folder / "vqa_result.json").write_text(json.dumps(rows))


def test_a_category_is_the_mean_of_its_answers(tmp_path, capsys):
    write_answers(tmp_path / "r" / "color" / "annotation_blip", ["0.1234", "0.5000", "1.0", "0"])
    write_answers(tmp_path / "r/spatial_val/labels/annotation_obj_detection_2d", [0.5, 0.25])
    run("compbench-score", "--results", tmp_path / "r", "--images-per-prompt", 2,
        "--out", tmp_path / "out")  # fmt: skip
    scores = report_of(tmp_path / "out")["scores"]
    assert {name: score["mean"] for name, score in scores.items()} == pytest.approx(
        {"color": 1.6234 / 4, "spatial": 0.375}
    )
    units = read_units(tmp_path / "out")
    assert [unit.name for unit in units] == ["color/000", "color/001", "spatial/000"]
    assert units[0].values["score"] == pytest.approx(0.6234 / 2)
    assert "color: 2 prompts; T2I-CompBench has 300" in capsys.readouterr().err


def test_the_product_over_chunks(tmp_path):
    asked = [np.array([True, True]), np.array([True, False])]
    answers = [np.array([0.5, 0.33335]), np.array([0.3333, 0.0])]
    # In float32 0.5 * 0.3333 is below 0.16665, and 0.33335 above itself, so that they round to
    # other sides than in float64. The second chunk of image 1 is empty.
    assert compbench_rules.multiply_chunks(answers, asked).tolist() == [0.1666, 0.3334]
    for number, (values, flags) in enumerate(zip(answers, asked, strict=True), 1):
        chunk = tmp_path / f"annotation{number}_blip"
        write_answers(chunk / "VQA" / "result", map(str, values))
        rows = [{"question": "a dog?" if flag else ""} for flag in flags]
        (chunk / "color_test.json").write_text(json.dumps(rows))
    assert compbench_rules.find_result(tmp_path, "shape").tolist() == [0.1666, 0.3334]
    write_answers(tmp_path / "annotation2_blip" / "VQA" / "result", [1])
    with pytest.raises(InputError, match="1 and 2 images"):
        compbench_rules.find_result(tmp_path, "shape")


def test_complex_is_the_mean_of_what_its_prompt_has(tmp_path, capsys):
    folder, prompts = tmp_path / "r" / "complex", tmp_path / "dataset"
    prompts.mkdir()
    (prompts / "complex_val.txt").write_bytes(b"A dog on a mat.\r\nA cat runs. Fast.\r\nBoth")
    (prompts / "complex_val_spatial.txt").write_text("a dog on a MAT\n")
    (prompts / "complex_val_action.txt").write_text("a cat runs.\na dog on a mat.\n")
    write_answers(folder / "annotation_blip", [0.1, 0.2, 0.3])
    write_answers(folder / "labels/annotation_obj_detection_2d", [0.5, 0.6, 0.6])
    write_answers(folder / "annotation_clip", [1.0, 0.8, 0.9])
    results = ("--results", tmp_path / "r", "--images-per-prompt", 1)
    assert "--prompts examples/dataset" in refuse(capsys, "compbench-score", *results)
    run("compbench-score", *results, "--prompts", prompts, "--out", tmp_path / "out")
    units = read_units(tmp_path / "out")
    # Spatial comes before action for a prompt in both lists.
    assert [unit.values["score"] for unit in units] == pytest.approx([0.3, 0.5, 0.6])
    printed = refuse(capsys, "compbench-score", "--results", tmp_path / "r", "--prompts", prompts)
    assert "attribute 3, spatial 3, action 3; expected 30, 10 for each of 3 prompts" in printed


@pytest.mark.parametrize(
    ("content", "part"),
    [("{}", "found no list"), ('[{"answer": "x"}]', "entry 0"), ("[", "not JSON"),
     ('[{"question_id": 0, "answer": 1}]', "expected a multiple of 10")],
)  # fmt: skip
def test_answers_of_compbench_that_are_refused(content, part, tmp_path, capsys):
    folder = tmp_path / "non_spatial" / "annotation_clip"
    folder.mkdir(parents=True)
    (folder / "vqa_result.json").write_text(content)
    assert part in refuse(capsys, "compbench-score", "--results", tmp_path)
    assert "found no folder of a category" in refuse(
        capsys, "compbench-score", "--results", tmp_path / "none"
    )
