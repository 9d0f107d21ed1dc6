"""Python functions to train on."""

from __future__ import annotations

from pathlib import Path

FUNCTION = 'def {name}(a, b):\n    """Return {name} of two numbers."""\n    {body}\n'


def write_functions(folder: Path) -> Path:
    """Write 40 files of three functions, whose answers have different lengths."""
    folder.mkdir()
    for number in range(40):
        bodies = ("return a", f"return a + {number} * b", f"if a:\n        return b\n    return {number}")
        texts = (FUNCTION.format(name=f"f{number}{'xyz'[i]}", body=body) for i, body in enumerate(bodies))
        (folder / f"{number}.py").write_text("\n\n".join(texts))
    return folder
