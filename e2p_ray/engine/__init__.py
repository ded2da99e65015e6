"""From groups of requests to raw texts; import the module that you need."""
