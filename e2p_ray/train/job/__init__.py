"""The training job: what a configuration names, Ray Train around the workers, checkpoints, the artifact."""
