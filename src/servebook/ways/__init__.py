"""What is taught: the ways of serving, and what several of them share."""
