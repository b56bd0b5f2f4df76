#!/usr/bin/env python
"""Where there is no curl: the few of its options that the cheat sheets use, by requests."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path

import requests


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    made.add_argument("url")
    made.add_argument("-s", action="store_true")
    made.add_argument("-N", action="store_true")
    made.add_argument("-H", action="append", default=[])
    made.add_argument("-d")
    made.add_argument("-o", default="/dev/stdout")
    made.add_argument("-w", default="")
    return made


def main(words: list[str]) -> None:
    said = parser().parse_args(words)
    headers = dict(each.split(": ", 1) for each in said.H)
    data = None if said.d is None else said.d.encode()
    with requests.request("GET" if data is None else "POST", said.url, headers=headers, data=data, stream=True) as got:
        with Path(said.o).open("wb", buffering=0) as out:
            for chunk in got.iter_content(None):
                out.write(chunk)
        print(said.w.replace("\\n", "\n").replace("%{http_code}", str(got.status_code)), end="")


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main(sys.argv[1:])
