"""The job one would write with Ray Data and vLLM, run by the python of vLLM's own environment (and ray[data], polars).

    job_vllm.py '{"inputs": {...}, "output": ..., "model": ..., "mode": "embeds" | "ids", ...}'

Users, contents and candidates from Parquet, joined, sorted by content so that vLLM's prefix cache serves, written by
actors that hold vLLM each, texts as Parquet. The user's soft token is a linear map of the user embedding; mode `ids`
takes one stand-in id for it. No checks, no consent, no resume, no table that changes at once: the least that gives
texts. Imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

STAND_IN_ID = 5


class Writer:
    """An actor: vLLM, loaded once; a batch of pairs to their texts."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        from safetensors.torch import load_file
        from transformers import AutoTokenizer
        from vllm import LLM, SamplingParams

        self.options = options
        self.llm = LLM(
            options["model"],
            dtype="float32",
            enable_prefix_caching=True,
            enable_prompt_embeds=options["mode"] == "embeds",
            **options["engine"],
        )
        self.tokenizer = AutoTokenizer.from_pretrained(options["model"])
        self.embedding = load_file(Path(options["model"], "model.safetensors"))["model.embed_tokens.weight"]
        self.sampling = SamplingParams(temperature=0.0, max_tokens=options["new_tokens"])
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(options["embedding_dim"], self.embedding.shape[1], generator=generator) * 0.01

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        import torch

        lefts: dict[str, Any] = {}
        for content, body in zip(batch["content_id"], batch["body"], strict=True):
            if content not in lefts:
                text = body + self.options["cue"]
                ids = [self.options["bos"], *self.tokenizer.encode(text, add_special_tokens=False)]
                lefts[content] = ids if self.options["mode"] == "ids" else self.embedding[torch.tensor(ids)]
        prompts: list[Any]
        if self.options["mode"] == "ids":
            prompts = [{"prompt_token_ids": [*lefts[content], STAND_IN_ID]} for content in batch["content_id"]]
        else:
            soft = torch.from_numpy(np.stack(list(batch["embedding"])).astype(np.float32)) @ self.weight
            pairs = zip(batch["content_id"], soft[:, None], strict=True)
            prompts = [{"prompt_embeds": torch.cat([lefts[content], row])} for content, row in pairs]
        outputs = self.llm.generate(prompts, self.sampling, use_tqdm=False)
        texts = [output.outputs[0].text for output in outputs]
        return {"user_id": batch["user_id"], "content_id": batch["content_id"], "text": texts}


def main() -> None:
    options = json.loads(sys.argv[1])
    import polars as pl
    import ray
    import ray.data

    start = time.perf_counter()
    tables = {name: pl.read_parquet(uri) for name, uri in options["inputs"].items()}
    pairs = (
        tables["candidates_uri"]
        .select("user_id", "content_id")
        .join(tables["users_uri"].select("user_id", pl.col("embedding").arr.to_list()), on="user_id")
        .join(tables["contents_uri"].select("content_id", "body"), on="content_id")
        .sort("content_id", "user_id")
    )
    ray.init(log_to_driver=bool(os.environ.get("E2P_DEBUG")))
    ray.data.DataContext.get_current().enable_progress_bars = False
    size = options["batch_size"]
    blocks = [pairs.slice(at, size).to_arrow() for at in range(0, len(pairs), size)]
    rows = ray.data.from_arrow(blocks).map_batches(
        Writer,
        fn_constructor_args=(options,),
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=options["num_actors"]),
        num_cpus=1,
        runtime_env={"env_vars": options["environment"]},
    )
    rows.write_parquet(options["output"])
    seconds = time.perf_counter() - start
    num_rows = pl.scan_parquet(f"{options['output']}/*.parquet").select(pl.len()).collect().item()
    print(json.dumps({"num_rows": num_rows, "seconds": seconds}))


if __name__ == "__main__":
    main()
