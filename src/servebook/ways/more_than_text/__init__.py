"""Chapter 13: which way carries what goes beyond text."""
