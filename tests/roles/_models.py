"""All tiny models."""

from __future__ import annotations

from tests.roles import _decoders, _experts
from tests.roles._cases import Case

CASES: list[Case] = [*_decoders.CASES, *_experts.CASES]
