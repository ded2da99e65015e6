"""Online: the batch's generator behind HTTP. `api` is plain FastAPI over a `Service`; Ray Serve only hosts it."""
