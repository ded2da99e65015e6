"""vLLM's side of `tests.bench.peers`, run by the python of vLLM's own virtual environment.

    peers_vllm.py REQUEST.npz '{"model": ..., "dtype": ..., "mode": "embeds" | "ids", ...}'

The request holds the left parts (flat ids, and where each content's begin), and per row its content, soft token and
number of new tokens. Mode `ids` takes one stand-in id for the soft token. Each run begins with an empty prefix
cache. Of ours it imports `worker` alone.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.worker import NUM_WARMING_ROWS, STAND_IN_ID, Prepare, Run, serve


def prompts_of(request: Any, mode: str, embedding: Any) -> list[Any]:
    """One prompt a row, the soft token (or its stand-in) last."""
    import torch

    ids, starts = request["ids"], request["starts"]
    lefts = [ids[start:stop] for start, stop in pairwise(starts)]
    if mode == "ids":
        lists = [[*left.tolist(), STAND_IN_ID] for left in lefts]
        return [{"prompt_token_ids": lists[content]} for content in request["content"]]
    embedded = [embedding[torch.from_numpy(left)] for left in lefts]
    soft = torch.from_numpy(request["soft"]).to(embedding.dtype)
    return [
        {"prompt_embeds": torch.cat([embedded[content], soft[row : row + 1]])}
        for row, content in enumerate(request["content"])
    ]


def load(request: Any, options: dict[str, Any]) -> Prepare:
    import torch
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams

    dtype = getattr(torch, options["dtype"])
    llm = LLM(
        options["model"],
        dtype=options["dtype"],
        enable_prefix_caching=True,
        enable_prompt_embeds=options["mode"] == "embeds",
        **options["engine"],
    )
    embedding = load_file(Path(options["model"], "model.safetensors"))["model.embed_tokens.weight"].to(dtype)
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=int(count), detokenize=False) for count in request["new_tokens"]
    ]

    def run(rows: slice = slice(None)) -> dict[str, Any]:
        prompts = prompts_of(request, options["mode"], embedding)[rows]
        outputs = llm.generate(prompts, sampling[rows], use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        stand_in = {"stand_in": True} if options["mode"] == "ids" else {}
        return {"tokens": tokens, "rows": list(range(len(tokens))), **stand_in}

    def prepare() -> Run:
        run(slice(0, NUM_WARMING_ROWS))
        assert llm.reset_prefix_cache(), "the prefix cache is emptied before every run"
        return run

    run(slice(0, 64))  # warm-up: kernels, allocator
    return prepare


def main() -> None:
    options = json.loads(sys.argv[2])
    request = dict(np.load(sys.argv[1]))
    serve(lambda: load(request, options), options["model_bytes"])


if __name__ == "__main__":
    main()
