"""What an instructor hands out and takes in: blanks, the student bundle, a learner's copy, grading with nbgrader."""

from pathlib import Path

ROOT = Path(__file__).parents[4]
"""The repository, or the student bundle."""
