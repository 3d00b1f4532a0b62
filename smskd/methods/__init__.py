"""Distillation methods and modifiers by name, and plug-ins from other packages.

A method of another package is an entry point of the group ``smskd.methods`` whose name is the
method's name. Plug-ins are code: only those that are named are ever imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points

from smskd.errors import ConfigError, did_you_mean, unknown_name
from smskd.methods.ab import AB
from smskd.methods.at import AT
from smskd.methods.base import Method, Modifier, Needs, PairShapes, Signals
from smskd.methods.byot import BYOT
from smskd.methods.catkd import CATKD
from smskd.methods.cc import CC
from smskd.methods.cmkd import CMKD
from smskd.methods.crd import CRD
from smskd.methods.ctkd import CTKD
from smskd.methods.dist import DIST
from smskd.methods.dkd import DKD
from smskd.methods.dml import DML
from smskd.methods.dot import DOT
from smskd.methods.fitnet import FitNet
from smskd.methods.fsp import FSP
from smskd.methods.ft import FT
from smskd.methods.ickd import ICKD
from smskd.methods.info_flow import InfoFlow
from smskd.methods.kd import KD
from smskd.methods.kdsvd import KDSVD
from smskd.methods.label_smoothing import LabelSmoothing
from smskd.methods.logit_standardisation import LogitStandardisation
from smskd.methods.mgd import MGD
from smskd.methods.mlld import MLLD
from smskd.methods.mt_pkdot import MTPKDOT
from smskd.methods.nkd import NKD
from smskd.methods.nst import NST
from smskd.methods.ofa import OFA
from smskd.methods.ofd import OFD
from smskd.methods.pkdot import PKDOT
from smskd.methods.pkt import PKT
from smskd.methods.r2kd import R2KD
from smskd.methods.rdd import RDD
from smskd.methods.reskd import ResKD
from smskd.methods.reviewkd import ReviewKD
from smskd.methods.rkd import RKD
from smskd.methods.scratch import Scratch
from smskd.methods.sdd import SDD
from smskd.methods.semckd import SemCKD
from smskd.methods.simkd import SimKD
from smskd.methods.sp import SP
from smskd.methods.srrl import SRRL
from smskd.methods.ssd import SSD
from smskd.methods.tfkd_reg import TfKDReg
from smskd.methods.tfkd_self import TfKDSelf
from smskd.methods.ttm import TTM
from smskd.methods.vid import VID
from smskd.methods.wttm import WTTM

__all__ = [
    "METHODS",
    "MODIFIERS",
    "Method",
    "Modifier",
    "Needs",
    "PairShapes",
    "Signals",
    "load_plugins",
    "method_class",
    "modifier_class",
]

METHODS: dict[str, type[Method]] = {
    "scratch": Scratch,
    "kd": KD,
    "fitnet": FitNet,
    "at": AT,
    "sp": SP,
    "rkd": RKD,
    "dkd": DKD,
    "cc": CC,
    "pkt": PKT,
    "crd": CRD,
    "ickd": ICKD,
    "ssd": SSD,
    "rdd": RDD,
    "nst": NST,
    "vid": VID,
    "ab": AB,
    "ft": FT,
    "ofd": OFD,
    "fsp": FSP,
    "kdsvd": KDSVD,
    "nkd": NKD,
    "dist": DIST,
    "mlld": MLLD,
    "ttm": TTM,
    "wttm": WTTM,
    "tfkd_self": TfKDSelf,
    "tfkd_reg": TfKDReg,
    "label_smoothing": LabelSmoothing,
    "dml": DML,
    "byot": BYOT,
    "ofa": OFA,
    "reskd": ResKD,
    "srrl": SRRL,
    "semckd": SemCKD,
    "reviewkd": ReviewKD,
    "simkd": SimKD,
    "mgd": MGD,
    "catkd": CATKD,
    "cmkd": CMKD,
    "pkdot": PKDOT,
    "mt_pkdot": MTPKDOT,
    "r2kd": R2KD,
    "info_flow": InfoFlow,
}

MODIFIERS: dict[str, type[Modifier]] = {
    "logit_standardisation": LogitStandardisation,
    "ctkd": CTKD,
    "sdd": SDD,
    "dot": DOT,
}

PLUGIN_GROUP = "smskd.methods"


def method_class(name: str, extra: Mapping[str, type[Method]] | None = None) -> type[Method]:
    """Find a method by name.

    Args:
        name: As in ``METHODS``.
        extra: More methods, as :func:`load_plugins` returns them.

    Raises:
        UnknownNameError: there is no such method.
    """
    known = {**(extra or {}), **METHODS}
    if name not in known:
        raise unknown_name("method", name, known)
    return known[name]


def modifier_class(name: str) -> type[Modifier]:
    """Find a modifier by name.

    Raises:
        UnknownNameError: there is no such modifier.
    """
    if name not in MODIFIERS:
        raise unknown_name("modifier", name, MODIFIERS)
    return MODIFIERS[name]


def load_plugins(names: Sequence[str]) -> dict[str, type[Method]]:
    """Import the named methods from installed packages; others are not touched.

    Args:
        names: Names of entry points of the group ``smskd.methods``.

    Returns:
        The methods by name, for :func:`method_class`.

    Raises:
        ConfigError: a plug-in is not installed, is there twice, cannot be imported, is not a method
            of that name, or would hide a built-in method.
    """
    installed = entry_points(group=PLUGIN_GROUP)
    return {name: _load_plugin(name, [e for e in installed if e.name == name]) for name in names}


def _load_plugin(name: str, found: list[EntryPoint]) -> type[Method]:
    if name in METHODS:
        raise ConfigError(f"method plug-in {name!r} has the name of a built-in method", "rename it")
    if not found:
        raise ConfigError(
            f"no installed package offers the method plug-in {name!r}",
            "install it into this environment; "
            + did_you_mean(name, entry_points(group=PLUGIN_GROUP).names),
        )
    targets = sorted({entry.value for entry in found})
    if len(targets) > 1:
        raise ConfigError(
            f"method plug-in {name!r} is offered more than once: {', '.join(targets)}",
            "uninstall all but one of the packages",
        )
    return _as_method(name, targets[0], _import(found[0]))


def _import(entry: EntryPoint) -> object:
    try:
        loaded: object = entry.load()
    except Exception as error:  # importing foreign code can fail in any way
        raise ConfigError(
            f"method plug-in {entry.name!r} ({entry.value}) cannot be imported: "
            f"{type(error).__name__}: {error}",
            "repair or reinstall the package that offers it",
        ) from error
    return loaded


def _as_method(name: str, target: str, loaded: object) -> type[Method]:
    where = f"method plug-in {name!r} ({target})"
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise ConfigError(
            f"{where} is not a subclass of smskd.methods.Method",
            "point the entry point at the method's class",
        )
    if inspect.isabstract(loaded):
        missing = ", ".join(sorted(loaded.__abstractmethods__))
        raise ConfigError(f"{where} is unfinished", f"define {missing}")
    declared = getattr(loaded, "name", None)
    if declared != name:
        raise ConfigError(
            f"{where} calls itself {declared!r}", "give the entry point and the class the same name"
        )
    return loaded
