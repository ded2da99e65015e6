"""The layers of Llama's kin on a CPU in few, large operations: what transformers computes, in half as many.

In bf16 the products have become so fast that what surrounds them counts (256 rows of 512, one layer, a core with AMX:
products 1.9 ms, norms, rotary embedding and residuals 0.7 ms as transformers writes them, 0.3 ms here):

- queries, keys and values are one product;
- residuals are added by the product before them (oneDNN's binary post-operation);
- a rotary embedding is one complex product. The two halves of a head lie side by side for it, an order that no dot
  product of a query with a key notices, so both weights' rows are put in that order once;
- a norm is one pass for the squares, one for the division, one for the weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from e2p_ray.engine.attention import Room, Shape, Step
from e2p_ray.engine.compiled import DTYPES, LANES, has_loops
from e2p_ray.engine.compiled_layers import CompiledLayers
from e2p_ray.engine.few_rows import FewRows
from e2p_ray.engine.packed import PackedLinear, activation_of, gated_mlp
from e2p_ray.engine.panels import Behind
from e2p_ray.engine.rotations import Rotations
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.shared_prefix import PrefillStep
from e2p_ray.engine.workspace import Workspace

if TYPE_CHECKING:
    from e2p_ray.engine.torch_threads import Call

# Same modules under the same names; each is compared with transformers in tests/test_engine_architectures.py.
FUSED_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


class FusedDecoder(nn.Module):
    """The layers of a frozen model, packed; the model itself keeps its embeddings and head only."""

    def __init__(self, model: PreTrainedModel, *, keep_plain: bool = False) -> None:
        super().__init__()
        decoder: Any = model.base_model
        self._rotations = Rotations(decoder.rotary_emb)
        self._norm = Norm(decoder.norm)
        window = model.config.sliding_window if model.config.model_type == "mistral" else None
        layers, self._workspace = [], Workspace()
        for number in range(len(decoder.layers)):
            layers.append(FusedLayer(decoder.layers[number], window, self._workspace, keep_plain))
            decoder.layers[number] = nn.Identity()  # its weights are freed
        self._layers = nn.ModuleList(layers)
        has_plain = model.dtype is torch.float32 and all(layer.qkv.plain is not None for layer in layers)
        shortest = min((layer.shape.window for layer in layers if layer.shape.window is not None), default=None)
        self._few_rows = FewRows(layers, self._norm, shortest) if has_plain else None
        self._compiled = CompiledLayers.of(layers, self._norm, shortest)

    @property
    def is_compiled(self) -> bool:
        """Whether the compiled loops know all of it."""
        return self._compiled is not None

    def takes_packed(self, num_tokens: int) -> bool:
        """Whether contents of so many tokens, packed, are all layers in one call: by loops, within each window."""
        return self._compiled is not None and self._compiled.reaches(num_tokens)

    def forward(self, embeds: Tensor, position_ids: Tensor, step: Step) -> Tensor:
        """(n, q, d_model) at position_ids (n, q) to the last layer's normed states, good until the next call."""
        states, turns = embeds.flatten(0, 1), self._rotations(position_ids)
        if self._few_rows is not None and isinstance(step, RowsStep) and self._few_rows.takes(step):
            return self._few_rows(states, turns, step).view(embeds.shape)
        normed = self._workspace.tensor("after all", *states.shape, dtype=states.dtype)
        if self._compiled is not None and isinstance(step, RowsStep) and self._compiled.takes(states, step):
            self._compiled(states, turns, step, normed)
        else:
            for layer in self._layers:
                states = layer(states, turns, step, embeds.shape[0])
            normed = self._norm(states, normed)
        return normed.view(embeds.shape)


class FusedLayer(nn.Module):
    """Attention and gated MLP with their norms and residuals; its output is good until the next layer's."""

    def __init__(self, layer: Any, window: int | None, workspace: Workspace, keep_plain: bool) -> None:
        super().__init__()
        self._workspace = workspace
        attention = layer.self_attn
        self.head_dim: int = attention.head_dim
        self.shape = Shape(float(attention.scaling), getattr(attention, "sliding_window", None) or window, None)
        self.number: int = attention.layer_idx
        self.before_attention, self.before_mlp = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        order = _side_by_side(self.head_dim)
        parts = [
            _reordered(attention.q_proj, order),
            _reordered(attention.k_proj, order),
            (attention.v_proj.weight, attention.v_proj.bias),
        ]
        self.num_heads, self.num_kv_heads = (len(weight) // self.head_dim for weight, _ in parts[:2])
        biases = [bias for _, bias in parts if bias is not None]
        assert len(biases) in (0, len(parts)), "all of them have a bias, or none"
        weight, bias = torch.cat([weight for weight, _ in parts]), torch.cat(biases) if biases else None
        self._num_outputs = len(weight)
        self.qkv = PackedLinear(weight, bias, keep_plain=keep_plain)
        self.output = PackedLinear(attention.o_proj.weight, attention.o_proj.bias, keep_plain=keep_plain)
        self.query_norm = Norm(attention.q_norm, order) if hasattr(attention, "q_norm") else None
        self.key_norm = Norm(attention.k_norm, order) if hasattr(attention, "k_norm") else None
        packed = gated_mlp(layer.mlp, keep_plain=keep_plain)
        assert packed is not None, "checked by fits"
        self.mlp = packed
        has_norms = self.query_norm is not None or self.key_norm is not None
        self._by_loop = not has_norms and self.head_dim % LANES == 0 and has_loops()

    def forward(self, states: Tensor, turns: Tensor, step: Step, num_rows: int) -> Tensor:
        """(n * q, d_model) to the same; `turns` (n * q, 1, head_dim / 2) are the rotations as complex numbers."""
        room = self._room("normed", states, self.qkv.input_dtype)
        normed = self.before_attention(states, room)
        if isinstance(step, RowsStep | PrefillStep) and self._by_loop:
            product = self.qkv(normed, self._heads(states))
            queries, keys, values = self._turned_into(product, turns, step, num_rows)
        else:
            queries, keys, values = self._turned_apart(self.qkv(normed), turns, step, num_rows)
        attended = step.attend(self.number, queries, keys, values, self.shape)
        attended = attended.transpose(1, 2).reshape(len(states), -1).to(self.output.input_dtype)
        states = self.output.plus(attended, states, self._room("after attention", states))
        return self.mlp.plus(self.before_mlp(states, room), states, self._workspace)

    @property
    def has_calls(self) -> bool:
        """Whether all of it is compiled loops."""
        norms = self.before_attention.has_loop and self.before_mlp.has_loop
        products = self.qkv.panels is not None and self.output.panels is not None and self.mlp.has_calls
        return self._by_loop and norms and products

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """What its calls write to and read from each other."""
        return self._workspace.memory

    def output_of(self, states: Tensor) -> Tensor:
        """Where the calls leave the layer's output."""
        return self._room("after MLP", states)

    def calls(self, states: Tensor, turns: Tensor, step: RowsStep) -> list[Call]:
        """The compiled loops that make the same of packed tokens (T, d_model), in their order, for `CompiledLayers`.

        All that they read and write is every layer's, but for its own weights and the step's keys and values.
        """
        from e2p_ray.engine.row_norms import TASK_ROWS, RoundCall, round_rows

        normed = self._room("normed", states, self.qkv.input_dtype)
        between = self._room("after attention", states)
        heads = self._heads(states)
        queries, attention = self._queries(len(states)), step.compiled(self.num_heads, self.num_kv_heads)
        attended = attention.outputs.flatten(1)
        rounding: list[Call] = []
        if self.output.input_dtype is torch.bfloat16:
            wide, attended = attended, self._workspace.tensor("attended", *attended.shape, dtype=torch.bfloat16)
            call = RoundCall(wide.data_ptr(), len(wide), wide.shape[1], attended.data_ptr())
            rounding = [(round_rows, -(-len(wide) // TASK_ROWS), call)]
        qkv, output = self.qkv.panels, self.output.panels
        assert qkv is not None
        assert output is not None
        return [
            self.before_attention.call(states, normed),
            qkv.call(normed, self.qkv.bias, Behind.NOTHING, heads),
            self._turn_call(heads, turns, step.room(self.number), queries),
            *attention.calls(self.number, queries, self.shape.scale),
            *rounding,
            output.call(attended, self.output.bias, Behind.PLUS, between, others=states),
            self.before_mlp.call(between, normed),
            *self.mlp.calls(normed, between, self._workspace),
        ]

    def _room(self, name: str, states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self._workspace.tensor(name, *states.shape, dtype=dtype or states.dtype)

    def _turned_into(
        self, product: Tensor, turns: Tensor, step: RowsStep | PrefillStep, num_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (n, H, q, D) in float32, and where keys and values now are, by the compiled loop."""
        from e2p_ray.engine import torch_threads

        num_tokens = len(product)
        if isinstance(step, RowsStep):
            room = step.room(self.number)
        else:
            each = num_tokens // num_rows
            room = step.room(self.number, num_rows, each, self.num_kv_heads, self.head_dim, product.dtype)
        queries = self._queries(num_tokens)
        torch_threads.run(*self._turn_call(product, turns, room, queries))
        return queries.view(num_rows, -1, *queries.shape[1:]).transpose(1, 2), room.keys, room.values

    def _heads(self, states: Tensor) -> Tensor:
        return self._workspace.tensor("heads", len(states), self._num_outputs, dtype=states.dtype)

    def _queries(self, num_tokens: int) -> Tensor:
        return self._workspace.tensor("queries", num_tokens, self.num_heads, self.head_dim, dtype=torch.float32)

    def _turn_call(self, product: Tensor, turns: Tensor, room: Room, queries: Tensor) -> Call:
        from e2p_ray.engine.turns import TASK_TOKENS, TurnCall, turn_heads

        num_tokens = len(product)
        call = TurnCall(
            heads=product.data_ptr(),
            turns=turns.data_ptr(),
            num_tokens=num_tokens,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            dim=self.head_dim,
            queries=queries.data_ptr(),
            keys=room.keys.data_ptr(),
            values=room.values.data_ptr(),
            places=room.places.ctypes.data,
            head_bytes=room.keys.stride(1) * room.keys.element_size(),
            from_half=int(product.dtype is torch.bfloat16),
            to_half=int(room.keys.dtype is torch.bfloat16),
        )
        return turn_heads, -(-num_tokens // TASK_TOKENS), call

    def _turned_apart(self, product: Tensor, turns: Tensor, step: Step, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same by torch's operations, and with norms of queries and keys."""
        heads = product.view(len(product), -1, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        queries, keys, values = heads.tensor_split((self.num_heads, num_rotated), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)

        def by_row(tensor: Tensor) -> Tensor:  # (n, heads, q, D)
            return tensor.view(num_rows, -1, *tensor.shape[1:]).transpose(1, 2)

        queries, keys = by_row(_turned(queries, turns)), by_row(_turned(keys, turns))
        return queries, *step.update(keys, by_row(values), self.number)


class Norm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, norm: Any, order: Tensor | None = None) -> None:
        super().__init__()
        weight = norm.weight.detach()
        self.weight = weight if order is None else weight[order]
        self.epsilon: float = norm.variance_epsilon
        self.epsilons = np.array([self.epsilon], np.float32)

    def forward(self, states: Tensor, out: Tensor | None = None) -> Tensor:
        """(..., d) to the same; `out` is memory of that size, of its dtype or float32, that it may take."""
        flat = states.reshape(-1, states.shape[-1])
        if flat.dtype == self.weight.dtype and self.has_loop:
            return self._by_loop(flat, out).view(states.shape)
        squares = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float32).square_().div_(flat.shape[-1])
        if flat.dtype is torch.float32:  # 512 rows of 512: 126 us, with a batch norm 149
            scaled: Tensor = flat * squares.add_(self.epsilon).rsqrt_()[:, None]
            return scaled.mul_(self.weight).view(states.shape)
        # A batch norm whose channels are the rows: one pass that reckons in float32, where torch's own RMS norm takes
        # five (512 rows of 512 in bf16: 80 us after the squares' 100, against 390).
        normed = functional.batch_norm(flat[None], torch.zeros_like(squares), squares, eps=self.epsilon)
        return normed.mul_(self.weight).view(states.shape)

    @property
    def has_loop(self) -> bool:
        """Whether the compiled loop knows it."""
        return len(self.weight) % LANES == 0 and self.weight.dtype in DTYPES and has_loops()

    def _by_loop(self, states: Tensor, out: Tensor | None) -> Tensor:
        from e2p_ray.engine import torch_threads

        states = states.contiguous()
        out = torch.empty_like(states) if out is None else out
        torch_threads.run(*self.call(states, out))
        return out

    def call(self, states: Tensor, out: Tensor) -> Call:
        """The same of rows (n, d) by the compiled loop, to be run while both are there."""
        from e2p_ray.engine import row_norms

        call = row_norms.NormCall(
            states=states.data_ptr(),
            num_rows=len(states),
            width=states.shape[1],
            weight=self.weight.data_ptr(),
            epsilon=self.epsilons.ctypes.data,
            outputs=out.data_ptr(),
            is_half=int(states.dtype is torch.bfloat16),
            gives_half=int(out.dtype is torch.bfloat16),
        )
        return row_norms.normalise_rows, -(-len(states) // row_norms.TASK_ROWS), call


def fits(model: PreTrainedModel) -> bool:
    """Whether this model's layers can be run so."""
    if model.config.model_type not in FUSED_MODEL_TYPES:
        return False
    decoder: Any = model.base_model
    return all(
        activation_of(layer.mlp.act_fn) is not None and layer.self_attn.head_dim % 2 == 0 for layer in decoder.layers
    )


def _turned(heads: Tensor, turns: Tensor) -> Tensor:
    """Rotary embedding of (T, H, D) whose halves lie side by side, in float32."""
    pairs = torch.view_as_complex(heads.float().view(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


def _side_by_side(head_dim: int) -> Tensor:
    """The order (D,) that puts a head's first half and second half in turns."""
    return torch.arange(head_dim).view(2, -1).t().flatten()


def _reordered(linear: Any, order: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with every head's outputs in this order."""
    head_dim = len(order)
    rows = (torch.arange(len(linear.weight)).view(-1, head_dim)[:, order]).flatten()
    return linear.weight.detach()[rows], None if linear.bias is None else linear.bias.detach()[rows]
