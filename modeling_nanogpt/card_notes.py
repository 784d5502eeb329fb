"""What stays in a model card when the card is written again: a person's notes, with results of `evaluate` in them."""

import os
import re
from pathlib import Path

NOTES = re.compile(r"(?<=<!-- your notes -->\n).*?(?=<!-- end of your notes -->)", re.S)
RESULTS = re.compile(r"<!-- results of evaluate -->\n(.*?)<!-- end of results -->\n", re.S)
HEAD = "| evaluated on | measure | value |\n| --- | --- | --- |\n"


def notes_of(card: str) -> str:
    """The text between the two marks of a card, or nothing if a mark is missing."""
    found = NOTES.search(card)
    return found[0] if found else ""


def with_notes(card: str, notes: str) -> str:
    """The card with these notes between its marks."""
    return NOTES.sub(lambda _: notes, card, count=1)


def with_results(card: str, subject: str, results: dict[str, str]) -> str:
    """The card with a table of results, of which those on `subject` are new. Results on other subjects stay.

    The table stands among the notes, so the next save of a run keeps it. A card without marks gets it at its end.
    """
    cell = subject.replace("|", "\\|").replace("\n", " ")
    begins = f"| `{cell}` |"
    found = RESULTS.search(card)
    rows = found[1].removeprefix(HEAD).splitlines() if found else []
    rows = [row for row in rows if row.startswith("|") and not row.startswith(begins)]
    rows += [f"{begins} {measure} | {value} |" for measure, value in results.items()]
    table = f"<!-- results of evaluate -->\n{HEAD}" + "".join(f"{row}\n" for row in rows) + "<!-- end of results -->\n"
    if found:
        return RESULTS.sub(lambda _: table, card, count=1)
    if NOTES.search(card):
        return with_notes(card, notes_of(card) + table)
    return f"{card.rstrip()}\n\n{table}"


def write_results(path: Path, subject: str, results: dict[str, str]) -> None:
    """Write results into the card at `path`, which is whole at every moment."""
    card = with_results(path.read_text(encoding="utf-8"), subject, results)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(card, encoding="utf-8")
    os.replace(aside, path)
