"""What an instructor hands out and takes in: blanks, the student bundle, a learner's copy, grading with nbgrader."""
