"""The main job over real news and real click histories, on a real S3 server, read back with Polars."""

from __future__ import annotations

import polars as pl
import pytest

from e2p_ray.storage import Storage
from jobs.whole_run import generate_run
from tests.real import mind
from tests.real.data import needs_real_data
from tests.s3 import S3Server

NUM_USERS = 60


@needs_real_data
@pytest.mark.real
@pytest.mark.usefixtures("ray_cluster")
def test_published_table_holds_every_logged_pair_once(s3_server: S3Server) -> None:
    storage = Storage(s3_server.config)
    bucket = s3_server.new_bucket()
    world = mind.read_mind(NUM_USERS)
    mind.write_tables(world, storage, f"{bucket}/inputs")
    mind.train(world, storage, f"{bucket}/inputs/projector", num_steps=5)
    config = mind.job_config(f"{bucket}/inputs", f"{bucket}/out", s3_server.config)
    report = generate_run(config)
    published = pl.scan_delta(config.output.table_uri, storage_options=storage.delta_options()).collect()
    keys = published.select("user_id", "content_id")
    expected = world.candidates.select("user_id", "content_id").unique()
    assert len(expected) > 200
    assert len(keys) == len(expected)
    assert keys.join(expected, on=["user_id", "content_id"], how="anti").is_empty()
    assert expected.join(keys, on=["user_id", "content_id"], how="anti").is_empty()
    assert set(published["status"]) <= {"ok", "fallback"}
    assert (published["status"] == "ok").sum() > len(expected) // 10, "most texts of a weak model fail, not all"
    assert (published["text"].str.strip_chars().str.len_chars() > 0).all()
    contents = world.contents.filter(pl.col("body").str.strip_chars() == "")["content_id"]
    empty = published.filter(pl.col("content_id").is_in(contents.implode()))
    assert set(empty["reason"]) <= {"empty_body"}
    assert storage.exists(f"{config.output.uri}/runs/{report.run_id}/report.html")
