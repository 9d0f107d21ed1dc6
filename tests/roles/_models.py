"""All tiny models."""

from __future__ import annotations

from tests.roles import _decoders, _encoders, _experts, _modules, _speech, _vision
from tests.roles._cases import Case

CASES: list[Case] = [
    case for module in (_modules, _decoders, _experts, _encoders, _vision, _speech) for case in module.CASES
]
