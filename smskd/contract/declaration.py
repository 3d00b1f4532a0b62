"""Checks of the class itself: what it says about itself, and that it says it."""

from __future__ import annotations

import re
import sys
from dataclasses import MISSING, fields, is_dataclass

from smskd.contract.assertions import require
from smskd.methods.base import KINDS, Component, Method

IDENTIFIER = re.compile(r"arXiv \d{4}\.\d{4,5}|DOI 10\.\d{4,}/\S+")
VENUE = re.compile(
    r"\b(AAAI|ACCV|ACL|BMVC|CVPR|ECCV|EMNLP|ICASSP|ICCV|ICDM|ICLR|ICML|ICPR|IJCAI|IJCV|Interspeech|"
    r"JMLR|KDD|MICCAI|NeurIPS|NIPS|TIP|TKDE|TMLR|TNNLS|TPAMI|WACV)\b"
)
YEAR = re.compile(r"\b(19|20)\d{2}\b")


def names_a_paper(text: str) -> bool:
    """Whether there is an arXiv id, a DOI, or a venue and a year."""
    return bool(IDENTIFIER.search(text) or (VENUE.search(text) and YEAR.search(text)))


def is_a_frozen_dataclass(cls: type[Component]) -> None:
    """Its settings have defaults, cannot be changed, and two of the same settings are equal."""
    require(is_dataclass(cls), "it is not a dataclass")
    require(cls.__dataclass_params__.frozen, "it is not frozen")  # type: ignore[attr-defined]
    for entry in fields(cls):  # type: ignore[arg-type]
        given = entry.default is not MISSING or entry.default_factory is not MISSING
        require(given, f"setting {entry.name!r} has no default")
    require(cls() == cls() and hash(cls()) == hash(cls()), "equal settings are not equal")


def says_what_it_is(cls: type[Component]) -> None:
    """It has a name, a version, a kind and a paper."""
    require(isinstance(getattr(cls, "name", None), str), "it has no name")
    require(isinstance(cls.version, int), "its version is not an integer")
    kind = getattr(cls, "kind", None)
    require(not issubclass(cls, Method) or kind in KINDS, f"its kind is none of {', '.join(KINDS)}")
    paper = getattr(cls, "paper", "")
    known = kind == "none" or names_a_paper(paper)
    require(known, f"paper is {paper!r}: no arXiv id, DOI, or venue and year")


def documents_its_settings(cls: type[Component]) -> None:
    """Its docstring has an entry for each setting, its module's names the paper."""
    own = cls.__doc__ or ""
    inherited = {entry.name for entry in fields(Method)}
    for entry in fields(cls):  # type: ignore[arg-type]
        if entry.name not in inherited:
            found = re.search(rf"^ +{entry.name}: ", own, re.MULTILINE)
            require(bool(found), f"setting {entry.name!r} is not in the docstring")
    text = getattr(sys.modules.get(cls.__module__), "__doc__", None) or ""
    if getattr(cls, "kind", "") != "none":
        require(names_a_paper(text), "the module names no arXiv id, DOI, or venue and year")
