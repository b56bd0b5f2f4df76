"""The capstone, chapter 14: a whole service that a learner builds in front of the engine, judged over the wire.

It is no lab: there is one service of any shape in place of blanks in cells, and ten stages in place of exercises.
"""
