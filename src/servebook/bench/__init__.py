"""The benchmark: every path side by side in one run, against vLLM's own server.

`load` sends requests and times their answers, over one of the `paths`; `arms` interleaves two of them and `stats`
compares; `run` is the plan of a whole run, `results` its file, `report` its tables. `protocol` and `scripted` measure
servers without an engine, `wire` counts bytes, `tensors` sends big ones.
"""
