"""Writes the files of a study: table, figure, and a page with both and links to its runs."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2
from markupsafe import Markup

from corl_jax.atomic_files import replace_file
from corl_jax.runs.directory import REPORT
from corl_jax.study.figure import draw_charts, draw_figure
from corl_jax.study.results import Results, read_results
from corl_jax.study.schema import Study, dump_study, load_study
from corl_jax.study.study_runs import name_run
from corl_jax.study.table import explain_table, list_heads, list_rows, make_csv, make_markdown

STUDY, PAGE = "study.yaml", "study.html"
TABLE, NUMBERS, FIGURE = "table.md", "table.csv", "figure.svg"
TEMPLATE = "template.html"


def write_results(results: Results) -> list[Path]:
    """Writes all files of the results into the study's folder; returns their paths."""
    folder = Path(results.study.output_dir)
    texts = {TABLE: make_markdown(results), NUMBERS: make_csv(results)}
    if figure := draw_figure(results):
        texts[FIGURE] = figure
    texts[PAGE] = render_study(results, folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    with replace_file(path) as file:
        file.write(text.encode("utf-8", "replace"))


def keep_study(study: Study) -> None:
    """Writes the study with its command line into its folder, for `corl-jax report`."""
    folder = Path(study.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / STUDY, dump_study(study))


def write_study_page(folder: Path, out: Path) -> None:
    """Writes the page of the study in a folder."""
    study = load_study(folder / STUDY)
    # The folder may have been moved since.
    results = read_results(study.model_copy(update={"output_dir": str(folder)}))
    write_text(out, render_study(results, out.absolute().parent))


def render_study(results: Results, place: Path) -> str:
    """Returns the page; its links are relative to the folder `place`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    study = results.study
    links = [
        [
            (name_run(variant, seed), os.path.relpath(record.root / REPORT, place))
            for seed in study.seeds
            if (record := results.records.get((variant, seed)))
        ]
        for variant in study.variants
    ]
    return environment.get_template(TEMPLATE).render(
        title=Path(study.output_dir).name,
        heads=list_heads(results),
        rows=list(list_rows(results)),
        sentences=[line.replace("`", "").strip("*") for line in explain_table(results)],
        charts=[Markup(svg) for svg in draw_charts(results)],
        links=[link for of_variant in links for link in of_variant],
        study=dump_study(study),
    )
