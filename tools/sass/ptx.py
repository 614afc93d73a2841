"""What PTX rounds in other ways than IEEE 754, where it takes subnormals for 0, and its divisions and roots.

Instructions without a modifier such as .ftz neither read nor write 0 for a subnormal.
"""

from __future__ import annotations

import re

_ENTRY = re.compile(r"^(?:\.\w+\s+)*\.(?:entry|func)\b", re.MULTILINE)
_NAME = re.compile(r"[a-z_]+_kernel")  # in a mangled name too
_OPCODE = re.compile(r"\b[a-z]\w*(?:\.\w+)+")
_LISTED = re.compile(r"\.(?:ftz|approx|full)\b|^(?:div|rcp|sqrt|rsqrt|ex2|lg2|sin|cos|tanh)\..*f\d")


def listed(ptx: str) -> set[tuple[str, str]]:
    """(kernel, instruction) of each such instruction. Functions that were not inlined count as a kernel's."""
    head, *functions = _ENTRY.split(ptx)
    if not functions:
        raise ValueError("the text has no function of PTX")
    found = set()
    for function in functions:
        name = _NAME.search(function.partition("{")[0])
        kernel = name[0] if name else ""
        found |= {(kernel, opcode) for opcode in _OPCODE.findall(function) if _LISTED.search(opcode)}
    return found
