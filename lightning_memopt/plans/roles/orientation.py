"""Which dimension of a weight holds the outputs, where only the shapes of a whole model tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_memopt.plans.roles.names import Place, place

# What transformers' ``Conv1D``, of shape [inputs, outputs], and ``torch.nn.Linear`` are both called.
TRANSPOSED = ("c_attn", "c_fc", "c_proj")
TOKENS = (
    "wte",
    "embed_tokens",
    "tok_embeddings",
    "word_embeddings",
    "token_embedding",
    "embed_in",
    "shared",
    "tok_emb",
)
# Weights of experts in one stack: before the activation → after it.
EXPERTS = {
    **dict.fromkeys(("gate_up_proj", "up_proj", "gate_proj"), "down_proj"),
    **dict.fromkeys(("w1", "w3"), "w2"),
    "fc1": "fc2",
}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Outlook:
    """What the shapes of all weights say about one.

    Attributes:
        shapes: Name → shape.
        width: The width of the token embeddings, if there are any.
        transposed: Whether the words that transformers' ``Conv1D`` and ``torch.nn.Linear`` share are the former's.
    """

    shapes: Shapes
    width: int | None
    transposed: bool

    def output_dim(self, name: str, at: Place, shape: tuple[int, ...], sort: str) -> int:
        """Return the dimension of the outputs: ``-1`` for transposed weights, else ``-2``.

        Args:
            name: The weight's canonical name.
            at: Where it is.
            shape: Its shape.
            sort: The sort of module that holds it, if known.
        """
        if sort == "transposed":
            return -1
        if sort == "" and len(shape) == 2 and at.word in TRANSPOSED and self.transposed:
            return -1
        return -1 if len(shape) == 3 and self._inputs_first(name, at.word, shape) else -2

    def is_followed(self, name: str) -> bool:
        """Return whether the output of a layer in a sequence, such as ``head.0``, is the input of a later one."""
        before, number, after = _numbered(name)
        later = (
            shape
            for other, shape in self.shapes.items()
            if other.startswith(before) and _numbered(other)[::2] == (before, after) and _numbered(other)[1] > number
        )
        return any(len(shape) == 2 and shape[1] == self.shapes[name][0] for shape in later)

    def _inputs_first(self, name: str, word: str, shape: tuple[int, ...]) -> bool:
        """Return whether the experts in a stack are ``[inputs, outputs]``, as those of gpt-oss and Llama 4 are."""
        first = [word] if word in EXPERTS else [up for up, down in EXPERTS.items() if down == word]
        for up in first:
            before, after = self._beside(name, word, up), self._beside(name, word, EXPERTS[up])
            if before and after and before[1] == after[2] and before[2] == 2 * after[1]:
                return True
            if before and after and before[2] == after[1] and before[1] == 2 * after[2]:
                return False
        inputs = -1 if word in EXPERTS else -2
        return bool(first) and self.width in shape[1:] and shape[inputs] != self.width

    def _beside(self, name: str, word: str, other: str) -> tuple[int, ...] | None:
        """Return the shape of the weight of another word in the same module, if it has three dimensions."""
        head, _, tail = name.rpartition(word)
        shape = self.shapes.get(head + other + tail)
        return shape if shape is not None and len(shape) == 3 else None


def _numbered(name: str) -> tuple[str, int, str]:
    """Return a name before, in and after its last number; the number is -1 if there is none."""
    segments = name.split(".")
    places = [place for place, segment in enumerate(segments) if segment.isdigit()]
    if not places:
        return name, -1, ""
    return ".".join(segments[: places[-1]]), int(segments[places[-1]]), ".".join(segments[places[-1] + 1 :])


def outlook(shapes: Shapes) -> Outlook:
    """Return what the shapes of all weights, by canonical name, say."""
    matrices = [(place(name).word, shape) for name, shape in shapes.items() if len(shape) == 2]
    width = next((shape[1] for word, shape in matrices if word in TOKENS), None)
    growing = [shape for word, shape in matrices if word in ("c_attn", "c_fc") and shape[0] < shape[1]]
    transposed = any(width in (None, shape[0]) for shape in growing)
    return Outlook(shapes, width, transposed)
