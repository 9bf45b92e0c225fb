"""Layers that carry state from token to token, on the packed row: each sequence goes through them by itself.

Linear attention, state-space models and short convolutions cannot skip chosen on the way from the prompt to rejected,
and what transformers computes them with where there are no kernels of theirs takes no notice of where a packed row's
sequences end, whatever it is told of them. So their input is taken apart, [shared | chosen] and [shared | rejected] as
rows of their own, padded on the right, where a causal layer does not look; and what comes out is put back where it
belongs. All else of the model, above all its feed-forward layers, computes on the packed row, and what is shared once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dpo_ray.model.attention import Segments
from dpo_ray.model.segment import Segment

MIXERS = ("linear_attn", "mamba", "conv")
"""What transformers calls such a part of a decoder layer."""


class Rows(NamedTuple):
    """Sequences of similar length, apart from the packed row of T tokens."""

    take: Tensor
    """[sequences, longest] positions of the packed row; behind a sequence's end any."""
    put: Tensor
    """[n] positions of the packed row that are filled from these sequences."""
    place: Tensor
    """[n] where, in the flattened [sequences · longest], what belongs there is found."""


@lru_cache(maxsize=4)  # every layer asks for the same ones
def sequence_rows(pairs: tuple[Segment, ...], device: torch.device) -> tuple[Rows, ...]:
    """Each sequence of the pairs once, and each position of the packed row filled once.

    Sequences are grouped by the power of two that their length is below, so that padding is less than half.
    """
    groups: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
    for start, shared, chosen, rejected in pairs:
        prompt, cut = [*range(start, start + shared)], start + shared + chosen
        # A sequence, and how many of its positions another one fills already.
        sequences = [([*prompt, *range(start + shared, cut)], 0)] if chosen or not rejected else []
        if rejected:
            sequences.append(([*prompt, *range(cut, cut + rejected)], shared if sequences else 0))
        for sequence in sequences:
            groups[len(sequence[0]).bit_length()].append(sequence)
    found = []
    for sequences in groups.values():
        longest = max(len(positions) for positions, _ in sequences)
        take: list[list[int]] = []
        put: list[int] = []
        place: list[int] = []
        for number, (positions, filled) in enumerate(sequences):
            take.append(positions + [positions[-1]] * (longest - len(positions)))
            put += positions[filled:]
            place += range(number * longest + filled, number * longest + len(positions))
        found.append(Rows(*(torch.tensor(x, device=device) for x in (take, put, place))))
    return tuple(found)


def by_sequence(mixer: Callable[[Tensor], Tensor], hidden: Tensor, segments: Segments) -> Tensor:
    """mixer: [sequences, length, H] → the same. hidden: [1, T, H], the packed row. Returns [1, T, H]."""
    out = None
    for rows in sequence_rows(segments.pairs, hidden.device):
        mixed = mixer(hidden[0][rows.take]).flatten(0, 1)
        if out is None:
            out = mixed.new_zeros(hidden.shape[1], mixed.shape[-1])
        out = out.index_copy(0, rows.put, mixed[rows.place])
    assert out is not None
    return out[None]


def separated(model: nn.Module) -> set[str]:
    """Names of the parts of a model that go sequence by sequence."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, _MARK)}


_MARK = "goes_by_sequence"


class Separation:
    """Makes a model's mixers go sequence by sequence, wherever its layers are given the segments of a packed row."""

    def __init__(self, layers: Sequence[nn.Module]):
        self._current: Segments | None = None
        self._undo: list[RemovableHandle | Callable[[], None]] = []
        for layer in layers:
            mixers = [(name, child) for name, child in layer.named_children() if name in MIXERS]
            if not mixers:
                continue
            # Not every layer hands its mixer what it is given. It is noted anew where activations are computed again.
            self._undo.append(layer.register_forward_pre_hook(self._note, with_kwargs=True))
            for _, mixer in mixers:
                self._wrap(mixer)

    def end(self) -> None:
        """Leave the layers as they were."""
        for undo in self._undo:
            undo.remove() if isinstance(undo, RemovableHandle) else undo()

    def _note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current = kwargs.get("segments")

    def _wrap(self, mixer: nn.Module) -> None:
        whole = mixer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._current is None:
                return whole(*args, **kwargs)
            hidden, *rest = [kwargs.pop("hidden_states"), *args] if "hidden_states" in kwargs else args
            kwargs.pop("segments", None)
            return by_sequence(lambda rows: whole(rows, *rest, **kwargs), hidden, self._current)

        # Compiled layers call it as it is: what it does differs with every packed row.
        for name, value in (("forward", torch.compiler.disable(forward)), (_MARK, True)):
            setattr(mixer, name, value)
            self._undo.append(partial(mixer.__dict__.pop, name))
