"""The layers of Llama and its kin on a GPU: four products and at most six kernels each.

What transformers runs a layer in is some forty kernels, most of which read and write what the one before them wrote.
Rows' passes of few tokens are captured (see `graphs`): there, what is launched takes longer than what is reckoned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from e2p_ray.engine.attention import Shape, Step
from e2p_ray.engine.gpu.attend import GpuRows, block_dim_of, next_power_of_2
from e2p_ray.engine.gpu.blocks import shared_bytes, tiles_of
from e2p_ray.engine.gpu.graphs import Graphs
from e2p_ray.engine.gpu.row_kernels import gate_rows, normalise_rows, turn_heads
from e2p_ray.engine.gpu.tables import PassTables, PrefixTable, SlotTable, TokenTable, slot_numbers
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.sent import sent
from e2p_ray.engine.shared_prefix import PrefillStep

# Same modules under the same names; each is compared with transformers in tests/test_gpu_layers.py.
_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_MAX_GROUP = 16  # heads that share keys
_HEAD_BYTES = 16  # what the kernels read at once: a head begins where such a piece does
_BLOCK_GATE = 1024
_BLOCK_HEADS = 16


def fits_gpu(model: PreTrainedModel) -> bool:
    """Whether this model's layers can be run so."""
    config = model.config
    if config.model_type not in _MODEL_TYPES or config.hidden_act not in ("silu", "swish"):
        return False
    group = config.num_attention_heads // config.num_key_value_heads
    decoder: Any = model.base_model
    head_bytes = [layer.self_attn.head_dim * model.dtype.itemsize for layer in decoder.layers]
    if group > _MAX_GROUP or any(num % _HEAD_BYTES for num in head_bytes):
        return False
    return all(_tiles(layer.self_attn.head_dim, model.dtype, model.device) for layer in decoder.layers)


def _tiles(head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[int, ...]:
    """Those that its multiprocessors have room for."""
    return tiles_of(block_dim_of(head_dim), dtype, shared_bytes(device))


class GpuDecoder:
    """The layers of a frozen model, packed; the model itself keeps its embeddings and head only."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = model.base_model
        config = model.config
        self._rotary = decoder.rotary_emb
        self._norm = _Norm(decoder.norm)
        window = config.sliding_window if config.model_type == "mistral" else None
        layers = []
        for number in range(len(decoder.layers)):
            layers.append(GpuLayer(decoder.layers[number], window, self._rotary))
            decoder.layers[number] = nn.Identity()  # its weights are freed
        self._layers: list[GpuLayer] = layers
        self._window = min((layer.shape.window for layer in layers if layer.shape.window is not None), default=None)
        first = layers[0]
        tiles = _tiles(first.head_dim, model.dtype, first.device)
        self._tables = PassTables(len(layers), first.num_heads // first.num_kv_heads, first.device, tiles)
        self._graphs = Graphs(self._run, self._rows, self._tables) if first.device.type == "cuda" else None

    def __call__(self, embeds: Tensor, position_ids: Tensor, step: Step) -> Tensor:
        """(n, q, d_model) at position_ids (n, q) to the last layer's normed states; of rows good until the next pass.

        A prefill ends with the last layer's keys and values: nobody asks for what they lead to.
        """
        states = embeds.flatten(0, 1)
        if isinstance(step, RowsStep) and step.is_within(self._window):
            if self._graphs is not None and (found := self._graphs(states, step)) is not None:
                return found.view(embeds.shape)
            tables = self._tables
            rows = self._rows(tables.tokens(step), tables.prefixes(step), tables.slots(step), states.dtype)
            return self._run(states, rows).view(embeds.shape)
        if isinstance(step, PrefillStep):
            self._prefill(states, step, *embeds.shape[:2])
            return embeds
        cos, sin = self._rotary(states, position_ids)
        states = states.clone()
        for layer in self._layers:
            states = layer.by_torch(states, cos, sin, step, embeds.shape[0])
        return self._norm(states).view(embeds.shape)

    def _rows(self, tokens: TokenTable, prefixes: PrefixTable, slots: SlotTable, dtype: torch.dtype) -> GpuRows:
        first = self._layers[0]
        return GpuRows(tokens, prefixes, slots, first.num_heads, first.num_kv_heads, first.head_dim, dtype)

    def _run(self, states: Tensor, rows: GpuRows) -> Tensor:
        states = states.clone()  # every layer adds to it in place
        for number, layer in enumerate(self._layers):
            layer.attend(states, rows, number)
            layer.think(states)
        return self._norm(states)

    def _prefill(self, states: Tensor, step: PrefillStep, num_rows: int, num_tokens: int) -> None:
        first = self._layers[0]
        size = (num_rows, first.num_kv_heads, num_tokens, first.head_dim)
        keys, values = step.make(size, states.dtype, states.device)
        slots = SlotTable(sent(slot_numbers(keys, values), states.device))
        row = torch.arange(num_rows * num_tokens, dtype=torch.int32, device=states.device)
        places, slot_of = row % num_tokens, row // num_tokens
        states = states.clone()
        for number, layer in enumerate(self._layers):
            queries = layer.turned(states, slot_of, places, places, slots.addresses[number], slots.num_tokens)
            if number == len(self._layers) - 1:
                break
            attended = step.attend(
                number,
                queries.view(num_rows, num_tokens, *queries.shape[1:]).transpose(1, 2),
                keys[number],
                values[number],
                layer.shape,
            )
            layer.output(attended.transpose(1, 2).reshape(len(states), -1), states)
            layer.think(states)


class GpuLayer:
    """Attention and gated MLP with their norms and residuals."""

    def __init__(self, layer: Any, window: int | None, rotary: Any) -> None:
        attention = layer.self_attn
        self.head_dim: int = attention.head_dim
        self.shape = Shape(float(attention.scaling), getattr(attention, "sliding_window", None) or window, None)
        self.number: int = attention.layer_idx
        self._before_attention, self._before_mlp = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._qkv = _Product.of(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = _Product.of(attention.o_proj)
        self._gate_up, self._down = (
            _Product.of(layer.mlp.gate_proj, layer.mlp.up_proj),
            _Product.of(layer.mlp.down_proj),
        )
        self._query_norm = _Norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self._key_norm = _Norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        self._frequencies, self._size = rotary.inv_freq.float(), float(getattr(rotary, "attention_scaling", 1.0))
        self._num_inner: int = layer.mlp.gate_proj.out_features

    @property
    def device(self) -> torch.device:
        return self._qkv.weight.device

    def attend(self, states: Tensor, rows: GpuRows, number: int) -> None:
        """Add to packed tokens (T, d_model) what they attend to."""
        addresses = rows.slot_addresses[number]
        room = rows.queries
        queries = self.turned(
            states, rows.token_slots, rows.places, rows.positions, addresses, rows.slots.num_tokens, room
        )
        attended = rows.attend(number, queries, self.shape.scale)
        self.output(attended.flatten(1), states)

    def think(self, states: Tensor) -> None:
        """Add the gated MLP of (T, d_model) to them."""
        products = self._gate_up.plain(self._before_mlp(states))
        inner = products.new_empty(len(states), self._num_inner)
        grid = (len(states), -(-self._num_inner // _BLOCK_GATE))
        gate_rows[grid](products, inner, WIDTH=self._num_inner, BLOCK=_BLOCK_GATE, num_warps=4)
        self._down(inner, states)

    def turned(
        self,
        states: Tensor,
        token_slots: Tensor,
        places: Tensor,
        positions: Tensor,
        addresses: Tensor,
        num_slot_tokens: Tensor,
        queries: Tensor | None = None,
    ) -> Tensor:
        """Queries (T, H, D) of (T, d_model); keys and values go to their slots."""
        heads = self._qkv.plain(self._before_attention(states))
        if queries is None:
            queries = heads.new_empty(len(heads), self.num_heads, self.head_dim)
        num_all = self.num_heads + 2 * self.num_kv_heads
        norms = self._query_norm, self._key_norm
        turn_heads[len(heads), -(-num_all // _BLOCK_HEADS)](
            heads,
            queries,
            token_slots,
            places,
            positions,
            addresses,
            num_slot_tokens,
            self._frequencies,
            self._frequencies if norms[0] is None else norms[0].weight,
            self._frequencies if norms[1] is None else norms[1].weight,
            self._size,
            0.0 if norms[0] is None else norms[0].epsilon,
            NUM_HEADS=self.num_heads,
            NUM_KV_HEADS=self.num_kv_heads,
            HEAD_DIM=self.head_dim,
            BLOCK_HEADS=_BLOCK_HEADS,
            BLOCK_HALF=next_power_of_2(self.head_dim // 2),
            HAS_NORMS=norms[0] is not None,
            num_warps=4,
        )
        return queries

    def by_torch(self, states: Tensor, cos: Tensor, sin: Tensor, step: Step, num_rows: int) -> Tensor:
        """All of the layer for steps that take keys and values themselves; cos and sin (n, q, D)."""

        def by_row(heads: Tensor) -> Tensor:  # (n, heads, q, D)
            return heads.view(num_rows, -1, *heads.shape[1:]).transpose(1, 2)

        def turned(heads: Tensor) -> Tensor:
            half = self.head_dim // 2
            behind = torch.cat([-heads[..., half:], heads[..., :half]], dim=-1)
            return heads * cos[:, None] + behind * sin[:, None]

        heads = self._qkv.plain(self._before_attention(states)).view(len(states), -1, self.head_dim)
        queries, keys, values = heads.tensor_split((self.num_heads, self.num_heads + self.num_kv_heads), dim=1)
        if self._query_norm is not None and self._key_norm is not None:
            queries, keys = self._query_norm(queries.contiguous()), self._key_norm(keys.contiguous())
        queries, keys = turned(by_row(queries)), turned(by_row(keys))
        attended = step.attend(self.number, queries, *step.update(keys, by_row(values), self.number), self.shape)
        self.output(attended.transpose(1, 2).reshape(len(states), -1).to(states.dtype), states)
        self.think(states)
        return states


class _Norm:
    """Root-mean-square norm over the last dimension."""

    def __init__(self, norm: Any) -> None:
        self.weight: Tensor = norm.weight.detach()
        self.epsilon: float = norm.variance_epsilon

    def __call__(self, states: Tensor) -> Tensor:
        """Contiguous (..., d) to the same."""
        outputs, width = torch.empty_like(states), states.shape[-1]
        block = next_power_of_2(width)
        normalise_rows[(states.numel() // width,)](
            states, self.weight, outputs, self.epsilon, WIDTH=width, BLOCK=block, num_warps=max(min(block // 512, 8), 1)
        )
        return outputs


class _Product:
    """Linear layers with one input, as one product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self._bias = weight, bias
        self._transposed = weight.t()

    @classmethod
    def of(cls, *linears: nn.Linear) -> _Product:
        """Of these layers side by side: all of them have a bias, or none."""
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        assert len(biases) in (0, len(linears)), "all of them have a bias, or none"
        if len(linears) == 1:
            return cls(linears[0].weight.detach(), biases[0] if biases else None)
        return cls(torch.cat([linear.weight.detach() for linear in linears]), torch.cat(biases) if biases else None)

    def plain(self, states: Tensor) -> Tensor:
        return functional.linear(states, self.weight, self._bias)

    def __call__(self, inputs: Tensor, states: Tensor) -> None:
        """Add the product of (T, m) to states (T, d), which the product's own kernel does."""
        states.addmm_(inputs, self._transposed)
        if self._bias is not None:
            states.add_(self._bias)
