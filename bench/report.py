"""Tables of the documents, made from the measured rows: ``python -m bench.report [--check]``.

Between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->`` stands what `render` makes of bench/results/NAME.jsonl; no number there
is typed by hand. NAME may carry a suffix after the section, as in ``single-h200``. The README gets the short form. Where a section has a
plot, it is made with the tables, as NAME.svg beside the full document, which shows it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from . import expert_tables, multi_tables, peft_tables, plots, report_tables, shared_tables, tune_tables
from .conditions import ROOT, machine, read_rows

TABLES = (report_tables, shared_tables, multi_tables, expert_tables, peft_tables, tune_tables)
COMMANDS = {name: command for each in TABLES for name, command in each.COMMANDS.items()}
RENDERERS = {name: renderer for each in TABLES for name, renderer in each.RENDERERS.items()}
PLOTS = plots.PLOTS | peft_tables.PLOTS
_MARK = re.compile(r"<!-- (/?)bench:([\w-]+) -->")


def render(stem: str, rows: list[dict], brief: bool) -> str:
    """The Markdown between a pair of markers."""
    section, _, suffix = stem.partition("-")
    if section not in RENDERERS:
        raise ValueError(f"marker bench:{stem}: wanted a section among {', '.join(RENDERERS)}, got {section!r}")
    if not rows:
        kept = f", kept as {stem}.jsonl" if suffix else ""
        return f"Not measured yet: `{COMMANDS[section]}` measures it{kept}."
    plot = plots.PLOTS.get(section)
    drawn = [f"![{plot.title}]({stem}.svg)"] if plot and not brief and plot.panels(rows) else []
    return "\n\n".join([conditions_line(rows), *drawn, RENDERERS[section](rows, brief)])


def conditions_line(rows: list[dict]) -> str:
    """Hardware, versions, commit and date of the rows; several runs are told apart by a semicolon."""
    lines = dict.fromkeys(_conditions(row) for row in rows)
    return "; ".join(lines) + "."


def _conditions(row: dict) -> str:
    parts = [machine(row)]
    parts += [f"driver {row['driver']}"] if row["gpu"] else [f"{row['threads']} threads", row["cpu_capability"]]
    parts += [f"torch {row['torch']}", *([f"triton {row['triton']}"] if row["gpu"] else []), f"Python {row['python']}"]
    changes = " with uncommitted changes" if (row["commit"] or "").endswith("-dirty") else ""
    parts += [f"commit {row['commit'][:12]}{changes}" if row["commit"] else f"code {row['code']}", row["date"][:10]]
    return ", ".join(parts)


def rewritten(text: str, results: Path, brief: bool, name: str) -> str:
    """``text`` with every marked part made anew."""
    pieces, at, open_stem, start = [], 0, None, 0
    for mark in _MARK.finditer(text):
        closing, stem = bool(mark[1]), mark[2]
        line = text.count("\n", 0, mark.start()) + 1
        if closing != (open_stem is not None) or (closing and stem != open_stem):
            wanted = f"<!-- /bench:{open_stem} -->" if open_stem is not None else "an opening marker"
            raise ValueError(f"{name}:{line}: wanted {wanted}, got {mark[0]}")
        if not closing:
            open_stem, start = stem, mark.end()
            continue
        pieces += [text[at:start], "\n", render(stem, read_rows(results / f"{stem}.jsonl"), brief), "\n"]
        at, open_stem = mark.start(), None
    if open_stem is not None:
        raise ValueError(f"{name}: wanted <!-- /bench:{open_stem} -->, got the end of the file")
    return "".join([*pieces, text[at:]])


def written(results: Path, readme: Path, docs: Path) -> dict[Path, str]:
    """What each file is to hold: the documents that are there, and the plots of what was measured."""
    texts = {}
    for path, brief in ((readme, True), (docs, False)):
        if path.exists():
            texts[path] = rewritten(path.read_text(), results, brief, path.name)
        else:
            print(f"{path}: not there")
    for stem in dict.fromkeys(mark[2] for mark in _MARK.finditer(docs.read_text() if docs.exists() else "")):
        plot, rows = PLOTS.get(stem.partition("-")[0]), read_rows(results / f"{stem}.jsonl")
        drawn = plot(rows) if plot and rows else None
        if drawn:
            texts[docs.parent / f"{stem}.svg"] = drawn
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the JSON lines")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="gets the short tables")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "measured.md", help="gets the full tables")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file would change")
    args = parser.parse_args(argv)
    changed = []
    for path, new in written(args.results, args.readme, args.docs).items():
        if not path.exists() or path.read_text() != new:
            changed.append(path)
            if not args.check:
                path.write_text(new)
    for path in changed:
        print(f"{path}: {'differs from what the results say; run python -m bench.report' if args.check else 'rewritten'}")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    raise SystemExit(main())
