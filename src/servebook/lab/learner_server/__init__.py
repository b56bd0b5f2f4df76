"""A server that a learner wrote: run as a process of its own, and judged over its socket."""
