"""data/wishes.py: the rule of the annotator in the real model's run, part by part and at its edges."""

from __future__ import annotations

import pytest

from data.wishes import PARTS, wish_parts, wishes


@pytest.mark.parametrize(
    ("text", "ended", "parts"),
    [
        ("Paris.", True, (1, 1, 0.5, 0)),
        ("Paris.", False, (0, 1, 0.5, 0)),  # cut by the limit, though it looks whole
        ("Paris", True, (0, 1, 0.5, 0)),  # ended amid a sentence
        ('She said "no."', True, (1, 1, 0.5, 0)),
        ("Sure, it is Paris!", True, (1, 1, 0.5, 0.5)),
        ("It takes YOUR time.", True, (1, 1, 0.5, 0.5)),
        ("It is sured.", True, (1, 1, 0.5, 0)),  # a part of another word is not friendly
        ("One.\nTwo.", True, (1, 1, 0, 0)),
        ("word " * 29 + "end.", True, (1, 1, 0.5, 0)),  # 30 words
        ("word " * 44 + "end.", True, (1, 0.5, 0.5, 0)),  # half way from 30 to 60
        ("word " * 59 + "end.", True, (1, 0, 0.5, 0)),
        ("word " * 99 + "end.", True, (1, 0, 0.5, 0)),  # no less than 0
        ("  \n ", True, (0, 0, 0, 0)),
    ],
)
def test_each_part_by_hand(text, ended, parts):
    """Words counted with their white space, an end that is only a full stop, silence that scores as brief."""
    assert wish_parts(text, ended) == pytest.approx(dict(zip(PARTS, parts, strict=True)))
    assert wishes(["?"], [text], [ended]) == [pytest.approx(sum(parts))]
