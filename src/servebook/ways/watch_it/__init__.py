"""Chapter 12: what to watch, when to be woken, and where a request's time went."""
