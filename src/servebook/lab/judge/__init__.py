"""Judges a submission from a process of its own: the learner's session is asked, and knows nothing of what is right.

`learner` is the end in the learner's session, `__main__` the one that judges, `wire` what goes between them.
"""
