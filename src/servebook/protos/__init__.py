"""Generated from `protos/` by `make protos`: one folder for each package."""
