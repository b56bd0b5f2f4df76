"""Recording proxies: they relay between a learner's code and a real server, and note what passes."""
