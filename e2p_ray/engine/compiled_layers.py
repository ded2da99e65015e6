"""All layers of a pass over a wave's rows, and the norm behind them, in one call of the compiled loops.

What Python takes to make a layer's ten calls one by one is 0.9 ms, because the loops leave nothing of it in the caches:
4 % of 512 rows in fp32, 8 % in bf16, half of what four rows take (2026-11-23, a Zen 5 core, layers of 512). To write
the table takes 0.4 ms of the 3.2 of a pass of four rows, so that it is kept (2026-11-29, two Zen 4 cores, bf16).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from e2p_ray.engine.layers_table import LayersTable
from e2p_ray.engine.packed import FEW_ROWS
from e2p_ray.engine.rows_step import RowsStep

if TYPE_CHECKING:
    from e2p_ray.engine.fused import FusedLayer, Norm

_Table = npt.NDArray[np.int64]


class CompiledLayers:
    """A table of calls, made of the first layer's: every other layer's are the same but for its weights and slots."""

    def __init__(self, layers: Sequence[FusedLayer], norm: Norm, window: int | None) -> None:
        from e2p_ray.engine.products import ProductCall
        from e2p_ray.engine.row_norms import NormCall

        self._layers, self._norm, self._window = layers, norm, window
        self._keeps_plain = layers[0].qkv.plain is not None
        norms = [[layer.before_attention, layer.before_mlp] for layer in layers]
        products = [[layer.qkv, layer.output, layer.mlp.gate, layer.mlp.down] for layer in layers]
        # (num_layers, number of such calls in a layer) of every field that differs between layers.
        self._own = {
            (NormCall, "weight"): _table([norm.weight.data_ptr() for norm in of_layer] for of_layer in norms),
            (NormCall, "epsilon"): _table([norm.epsilons.ctypes.data for norm in of_layer] for of_layer in norms),
            (ProductCall, "panels"): _table([_weight(linear) for linear in of_layer] for of_layer in products),
            (ProductCall, "bias"): _table([_address(linear.bias) for linear in of_layer] for of_layer in products),
            (ProductCall, "up_panels"): _table([0, 0, _weight(layer.mlp.up), 0] for layer in layers),
        }

    @classmethod
    def of(cls, layers: Sequence[FusedLayer], norm: Norm, window: int | None) -> CompiledLayers | None:
        """None where they have something that the loops do not know. `window`: the shortest of the layers'."""
        has_calls = norm.has_loop and all(layer.has_calls for layer in layers)
        return cls(layers, norm, window) if has_calls else None

    def takes(self, states: Tensor, step: RowsStep) -> bool:
        """Whether this pass is for the loops: no key is out of a window's reach, and no plain weight is faster."""
        if self._keeps_plain and len(states) <= FEW_ROWS:
            return False
        return step.is_within(self._window)

    def reaches(self, num_tokens: int) -> bool:
        """Whether every window reaches all of a content of so many tokens."""
        return self._window is None or num_tokens <= self._window

    def __call__(self, states: Tensor, turns: Tensor, step: RowsStep, normed: Tensor) -> None:
        """Packed tokens (T, d_model) and their rotations (T, 1, head_dim / 2) to the last layer's normed states."""
        states = states.contiguous()
        if step.table_before is None:
            step.table = self._table_of(states, turns, step, normed)
        else:
            step.table = step.table_before.advanced()
        step.table.run(states, turns, normed)

    def _table_of(self, states: Tensor, turns: Tensor, step: RowsStep, normed: Tensor) -> LayersTable:
        from e2p_ray.engine.calls import ROW_NUMBERS
        from e2p_ray.engine.flash import SharedCall
        from e2p_ray.engine.own_keys import OwnCall
        from e2p_ray.engine.products import ProductCall
        from e2p_ray.engine.row_norms import NormCall
        from e2p_ray.engine.torch_threads import put_calls
        from e2p_ray.engine.turns import TurnCall

        first = self._layers[0]
        calls, out = first.calls(states, turns, step), first.output_of(states)
        attention = step.compiled(first.num_heads, first.num_kv_heads)
        num_layers = len(self._layers)
        table = np.zeros((1 + num_layers * len(calls) + 1, ROW_NUMBERS), np.int64)
        by_layer = table[1:-1].reshape(num_layers, len(calls), ROW_NUMBERS)
        put_calls(by_layer[0], calls)
        by_layer[1:] = by_layer[0]
        put_calls(table[-1:], [self._norm.call(out, normed)])
        places: dict[type, list[int]] = {}
        for at, (_, _, numbers) in enumerate(calls):
            places.setdefault(type(numbers), []).append(at)

        def column(kind: Any, field: str) -> int:
            return 2 + int(kind._fields.index(field))

        def put(kind: Any, field: str, values: _Table) -> None:
            by_layer[:, places[kind], column(kind, field)] = values

        for (kind, field), values in self._own.items():
            put(kind, field, values)
        keys, values = (_table([part.data_ptr()] for part in parts) for parts in (step.slots.keys, step.slots.values))
        for kind in (TurnCall, OwnCall):
            if kind in places:
                put(kind, "keys", keys)
                put(kind, "values", values)
        if SharedCall in places:
            addresses = attention.addresses
            by_number = addresses.ctypes.data + addresses.strides[0] * np.arange(num_layers)
            put(SharedCall, "addresses", by_number[:, None])
        # Every layer but the first reads what the one before has written.
        reading = [
            (places[NormCall][0], column(NormCall, "states")),
            (places[ProductCall][1], column(ProductCall, "others")),
        ]
        for of_layer in reading:
            by_layer[1:, *of_layer] = out.data_ptr()
        first_own, num_own = (places[OwnCall][0], 1) if OwnCall in places else (0, 0)
        room = step.room(first.number)
        # Behind the last layer's keys and values nothing is asked for where these are all that is wanted.
        num_rows = 2 + (num_layers - 1) * len(calls) + places[TurnCall][0] if step.keys_only else len(table)
        return LayersTable(
            rows=table[:num_rows],
            turns=by_layer[:, places[TurnCall][0], column(TurnCall, "turns")],
            states=(by_layer[0, *reading[0], None], by_layer[0, *reading[1], None]),
            normed=table[-1, column(NormCall, "outputs"), None],
            max_own=by_layer[:, first_own : first_own + num_own, column(OwnCall, "max_keys")],
            at=attention.place,
            places=room.places,
            place_bytes=room.keys.stride(2) * room.keys.element_size(),
            held=(attention, *first.memory),
        )


def _table(rows: Any) -> _Table:
    return np.array([*rows], np.int64)


def _weight(linear: Any) -> int:
    return int(linear.panels.numbers.data_ptr())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
