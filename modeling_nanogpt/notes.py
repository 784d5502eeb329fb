"""A person's own words in a model card: what stands between two marks stays when the card is written anew."""

import re

NOTES = re.compile(r"(?<=<!-- your notes -->\n).*?(?=<!-- end of your notes -->)", re.S)


def notes_of(card: str) -> str:
    """What stands between the two marks of a card; nothing where one is missing."""
    found = NOTES.search(card)
    return found[0] if found else ""


def with_notes(card: str, notes: str) -> str:
    """The card with these notes between its marks."""
    return NOTES.sub(lambda _: notes, card, count=1)
