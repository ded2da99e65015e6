"""An update: what a new version of a published table changes, as a plan of the requests that need a new text."""

from e2p_ray.update.compare import Cause, UpdateJob
from e2p_ray.update.defer import defer_shards
from e2p_ray.update.limits import Limits, Priority
from e2p_ray.update.priorities import priorities_digest
from e2p_ray.update.survey import Changes, survey
from e2p_ray.update.update import Update, make_update, shows_already, update_id_of

__all__ = [
    "Cause",
    "Changes",
    "Limits",
    "Priority",
    "Update",
    "UpdateJob",
    "defer_shards",
    "make_update",
    "priorities_digest",
    "shows_already",
    "survey",
    "update_id_of",
]
