"""Making a RayJob anew from inside a pod: what the schedule runs, through Kubernetes' own API and nothing else."""

from __future__ import annotations

import json
import re
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from e2p_ray.errors import ConfigError, E2PError

IN_CLUSTER = "https://kubernetes.default.svc"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

_ENDED = ("Complete", "Failed", "ValidationFailed")  # of a RayJob's jobDeploymentStatus
_WAIT_S, _POLL_S = 300.0, 2.0
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Api:
    """Kubernetes' API with a service account's token, read for each call because it is renewed."""

    server: str = IN_CLUSTER
    account: Path = ACCOUNT
    poll_s: float = _POLL_S

    def __post_init__(self) -> None:
        if not re.match("https?://[^/]", self.server):
            raise ConfigError(f"--server {self.server!r}: not http://HOST:PORT or https://HOST")

    def call(self, method: str, path: str, body: object = None) -> dict[str, Any] | None:
        """The answer; None where what is asked for, or deleted, is not there.

        E2PError for anything else that is not 2xx, ConfigError outside a pod.
        """
        token, tls = self._credentials()
        request = urllib.request.Request(f"{self.server}{path}", method=method)
        request.add_header("Authorization", f"Bearer {token}")
        request.add_header("Content-Type", "application/json")
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, data, _TIMEOUT_S, context=tls) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            if error.code == 404 and method != "POST":
                return None
            said = error.read(2000).decode(errors="replace")
            # What a POST makes cannot be absent: it is the kind, or the namespace, that is unknown.
            remedy = ". Is the KubeRay operator installed, with its CRDs?" if error.code == 404 else ""
            raise E2PError(f"{method} {path}: Kubernetes says {error.code}: {_message(said)}{remedy}") from error
        except ValueError as error:
            raise E2PError(f"{method} {path}: {self.server} answers as no Kubernetes does ({error})") from error
        except OSError as error:
            raise E2PError(f"{method} {path}: {self.server} does not answer: {error}") from error

    def _credentials(self) -> tuple[str, ssl.SSLContext | None]:
        """The service account's token, and whom to trust where the server speaks TLS."""
        try:
            token = (self.account / "token").read_text().strip()
            with_tls = self.server.startswith("https")
            return token, ssl.create_default_context(cafile=self.account / "ca.crt") if with_tls else None
        except OSError as error:
            raise ConfigError(
                f"{self.account} has no token and ca.crt that can be read ({error.strerror or error}). `submit` is for "
                "pods with a service account, as the schedule's; elsewhere give the manifest to `kubectl create -f`"
            ) from error


def submit(manifest: Path, api: Api) -> str:
    """Make the manifest's RayJob; what was done, in words.

    A RayJob of that name that has ended is deleted first; one that is at work is left alone.
    """
    try:
        ray_job = yaml.safe_load(manifest.read_text(encoding="utf-8"))
        name, namespace = ray_job["metadata"]["name"], ray_job["metadata"]["namespace"]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"{manifest}: not a RayJob with a name and a namespace ({error!r})") from error
    folder = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
    found = api.call("GET", f"{folder}/{name}")
    if found is not None:
        status = (found.get("status") or {}).get("jobDeploymentStatus") or "New"
        if status not in _ENDED:
            return f"{name} is still at work ({status}): nothing is started"
        api.call("DELETE", f"{folder}/{name}", {"propagationPolicy": "Foreground"})
        _wait_until_gone(api, f"{folder}/{name}")
    api.call("POST", folder, ray_job)
    return f"{name} is submitted"


def _wait_until_gone(api: Api, path: str) -> None:
    deadline_s = time.monotonic() + _WAIT_S
    while api.call("GET", path) is not None:
        if time.monotonic() > deadline_s:
            raise E2PError(f"{path} is still there {_WAIT_S:.0f} s after it was deleted")
        time.sleep(api.poll_s)


def _message(said: str) -> str:
    try:
        return str(json.loads(said)["message"])
    except (ValueError, KeyError, TypeError):
        return said[:200].strip()
