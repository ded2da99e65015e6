"""What `serve deploy` and a RayService import: `e2p_ray.serve.app:build`, with the path of a serve.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from e2p_ray.config import ServeConfig, load_config
from e2p_ray.serve.replica import APP_NAME, DEPLOYMENT_NAME, application


def build(args: dict[str, str]) -> Application:
    """The application of `args["config"]`, a file on the cluster; secrets come from the environment there.

    Every other argument is an option over the file, named as on the command line ("workers.num_gpus").
    """
    words = [f"--{name}={value}" for name, value in args.items()]
    config = load_config(ServeConfig, words, prog="e2p_ray.serve.app", description="")
    return application(config)


def serve_file(config: ServeConfig, config_path: str, options: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file for `serve deploy`, or a RayService's serveConfigV2; no secret is in it.

    A new `projector_uri` in it, deployed again, swaps the projector without a restart.
    """
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.api.host, "port": config.api.port},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": f"{__name__}:build",
                "args": {"config": config_path, **(options or {})},
                "deployments": [
                    {"name": DEPLOYMENT_NAME, "user_config": {"projector_uri": config.projector.uri}},
                ],
            }
        ],
    }
