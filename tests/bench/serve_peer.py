"""The service one would write by hand, for `tests.bench.serve`: FastAPI, HF `generate`, one request a time.

    python -m tests.bench.serve_peer CONFIG PORT

Users and contents are read into memory once; the soft token is appended through `inputs_embeds`. A lock keeps requests
apart: one core has nothing to give to a second one (batched `generate` does as many rows a second there as single calls
do: LOG.md, decode). No checks, no consent, no limits.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import uvicorn
import yaml
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from e2p_ray.config import ServeConfig
from e2p_ray.engine.projector import Projector
from e2p_ray.storage import Storage


class Ask(BaseModel):
    """What a client sends: the same bytes as to the other service."""

    user_id: str
    content_id: str
    task: str
    stream: bool = False


class Told(BaseStreamer):  # type: ignore[misc]
    """Tokens as they come. transformers' own text streamer waits for a blank, which these texts have not."""

    def __init__(self) -> None:
        self.tokens: queue.Queue[int | None] = queue.Queue()

    def put(self, value: Tensor) -> None:
        for token in value.flatten().tolist():
            self.tokens.put(token)

    def end(self) -> None:
        self.tokens.put(None)


class Writer:
    """The model and its tables."""

    def __init__(self, config: ServeConfig) -> None:
        folder, (self._task,) = config.base_model.uri, config.tasks.values()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self._model.eval()
        self._projector = Projector.from_pretrained(Storage(), config.projector.uri)
        users, contents = pl.read_parquet(config.inputs.users_uri), pl.read_parquet(config.inputs.contents_uri)
        self._users = dict(zip(users["user_id"], users["embedding"].to_numpy(), strict=True))
        self._bodies = dict(zip(contents["content_id"], contents["body"], strict=True))
        self._lock = threading.Lock()

    @torch.inference_mode()
    def write(self, ask: Ask, told: Told | None = None) -> str:
        prompt = self._task.prompts["default"]
        text = prompt.content.format(title="", body=self._bodies[ask.content_id]) + prompt.cue_before
        ids = [self._tokenizer.bos_token_id, *self._tokenizer.encode(text, add_special_tokens=False)]
        vector = torch.from_numpy(np.array(self._users[ask.user_id], np.float32))
        with self._lock:
            soft = self._projector(vector[None])
            embeds = torch.cat([self._model.get_input_embeddings()(torch.tensor([ids])), soft], dim=1)
            tokens = self._model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                max_new_tokens=self._task.sampling.max_new_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
                streamer=told,
            )
        return self.text_of(tokens[0].tolist())

    def text_of(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def stream(self, ask: Ask) -> Iterator[str]:
        told, texts = Told(), list[str]()
        thread = threading.Thread(target=lambda: texts.append(self.write(ask, told)))
        thread.start()
        while (token := told.tokens.get()) is not None:
            yield _event("token", {"text": self.text_of([token])})
        thread.join()
        yield _event("done", {"text": texts[0], "status": "ok"})


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def make_app(writer: Writer) -> Callable[..., Any]:
    app = FastAPI()

    @app.post("/v1/generations")
    def generations(ask: Ask) -> Any:  # no coroutine, so that FastAPI calls it in a thread of its own
        if ask.stream:
            return StreamingResponse(writer.stream(ask), media_type="text/event-stream")
        return {"text": writer.write(ask), "status": "ok"}

    @app.get("/readyz")
    def readyz() -> dict[str, str]:
        return {"status": "ready"}

    return app


def main() -> None:
    config = ServeConfig.model_validate(yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.set_num_threads(config.engine.num_threads or 1)
    uvicorn.run(make_app(Writer(config)), port=int(sys.argv[2]), log_level="warning")


if __name__ == "__main__":
    main()
