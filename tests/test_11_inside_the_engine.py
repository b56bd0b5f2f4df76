"""Chapter 11: the notebook; looks at a working engine; and the reckoning, held to vLLM's own figures."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests

from servebook.engine.arguments import in_float32
from servebook.engine.model import model_path
from servebook.errors import ModelError, ServebookError
from servebook.launch import Server
from servebook.processes import free_port
from servebook.settings import Settings
from servebook.ways.inside_the_engine import sizing
from servebook.ways.inside_the_engine.looks import Look, Stretch, cache_of, look, stretches, watch
from servebook.ways.inside_the_engine.sizing import GIB, Shape, blocks, fit, kv_bytes_per_token, shape_of, weight_bytes

pytestmark = [pytest.mark.lane("one"), pytest.mark.timeout(600)]

LLAMA_70B = Shape(layers=80, kv_heads=8, head_dim=128, parameters=70_553_706_496)


def body(vllm: Server, prompt: list[int], tokens: int) -> dict[str, Any]:
    return {"model": vllm.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def fresh(tokens: int) -> list[int]:
    return [random.randrange(1000, 30_000) for _ in range(tokens)]


async def write(vllm: Server, prompt: list[int], tokens: int) -> int:
    """How many tokens were written."""
    async with aiohttp.ClientSession() as http:
        answer = await http.post(f"{vllm.url}/v1/completions", json=body(vllm, prompt, tokens))
        return int((await answer.json())["usage"]["completion_tokens"])


# What the page says.


async def test_the_looks_see_each_token_that_the_engine_computes(vllm: Server) -> None:
    written, looks = await watch(vllm.url, write(vllm, fresh(40), 12), write(vllm, fresh(20), 6))
    assert written == [12, 6]
    first, last = looks[0], looks[-1]
    # Whoever writes 12 tokens takes part in 12 steps, the first of which computes its prompt and gives a token.
    assert 12 <= last.steps - first.steps <= 18
    assert last.tokens - first.tokens == 40 + 12 + 20 + 6
    assert (last.running, last.waiting, last.usage) == (0, 0, 0)
    assert max(each.running for each in looks) <= 2
    assert [each.at for each in looks] == sorted(each.at for each in looks)
    assert (last.drafted, last.accepted) == (0, 0), "this engine does not guess"


async def test_work_that_fails_takes_the_rest_along(vllm: Server) -> None:
    ends: list[str] = []

    async def fails() -> None:
        raise ValueError("on purpose")

    async def works() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    with pytest.raises(ValueError, match="on purpose"):
        await watch(vllm.url, works(), fails())
    assert ends == ["cancelled"]


async def test_the_looks_see_who_is_in_the_batch_and_what_it_holds(vllm: Server) -> None:
    cache = cache_of(vllm.url)
    deadline = time.monotonic() + 60
    long = asyncio.create_task(write(vllm, fresh(300), 1500))
    while not (now := look(vllm.url)).running:
        await asyncio.sleep(0.01)
        assert time.monotonic() < deadline, "it never came into the batch"
    long.cancel()
    assert (now.running, now.waiting) == (1, 0)
    assert math.ceil(300 / cache.block_size) <= round(now.usage * (cache.blocks - 1)) <= cache.blocks / 2
    while look(vllm.url).running:
        await asyncio.sleep(0.01)
        assert time.monotonic() < deadline, "it never left the batch"


async def test_the_stretches_are_all_steps_of_the_looks(vllm: Server) -> None:
    _, looks = await watch(vllm.url, write(vllm, fresh(30), 10))
    rows = list(stretches(looks))
    assert rows[0].first == 1
    assert [row.first for row in rows[1:]] == [row.last + 1 for row in rows[:-1]]
    assert rows[-1].last == 10
    assert sum(row.tokens * (row.last - row.first + 1) for row in rows) == pytest.approx(30 + 10)


async def test_the_last_look_is_after_the_work() -> None:
    """Also where the work ends while a page is on its way, which says then how it was before."""
    steps, on_its_way, ended = [0], threading.Event(), threading.Event()

    class Page(BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self) -> None:
            Page.asked += 1
            text = f'vllm:iteration_tokens_total_count{{engine="0"}} {steps[0]}.0\n'.encode()
            if Page.asked == 2:
                on_its_way.set()
                ended.wait(30)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    async def work() -> None:
        await asyncio.to_thread(on_its_way.wait, 30)
        steps[0] += 1
        ended.set()

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _, looks = await watch(f"http://127.0.0.1:{server.server_port}", work())
        server.shutdown()
    assert [each.steps for each in looks] == [0, 0, 1]


async def test_a_look_that_fails_ends_the_work() -> None:
    asked = 0

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal asked
            asked += 1
            self.send_response(200 if asked == 1 else 500)
            self.end_headers()
            self.wfile.write(b"vllm:num_requests_running 0.0\n")

        def log_message(self, *_: object) -> None:
            pass

    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with pytest.raises(ServebookError, match="/metrics answered with status 500"):
            await watch(f"http://127.0.0.1:{server.server_port}", work())
        server.shutdown()
    await asyncio.wait_for(ended.wait(), 5)


async def test_work_that_no_look_came_before_is_closed() -> None:
    """Else Python would complain, somewhere later, that nobody has awaited it."""

    async def work() -> None:
        pass

    never_begun = work()
    with pytest.raises(ServebookError):
        await watch(f"http://127.0.0.1:{free_port()}", never_begun)
    assert inspect.getcoroutinestate(never_begun) == inspect.CORO_CLOSED


def test_alike_neighbours_are_one_stretch() -> None:
    seen = [
        (0, 0, 0, 0),
        (1, 21, 1, 0),
        (2, 22, 1, 0),
        (2, 22, 1, 1),
        (4, 24, 1, 0),
        (5, 25, 1, 0),
        (7, 29, 2, 1),
        (7, 29, 0, 0),
    ]
    looks = [
        Look(at, steps=100 + steps, tokens=500 + tokens, running=running, waiting=waiting)
        for at, (steps, tokens, running, waiting) in enumerate(seen)
    ]
    assert list(stretches(looks)) == [Stretch(1, 1, 21, 1, 0), Stretch(2, 5, 1, 1, 0), Stretch(6, 7, 2, 2, 1)]
    assert list(stretches(looks[:1])) == []


def test_a_prompt_seen_before_is_found_in_whole_blocks(vllm: Server) -> None:
    cache = cache_of(vllm.url)
    prompt = fresh(2 * cache.block_size + 5)
    found = []
    for ids in (prompt, prompt, [prompt[0] + 1, *prompt[1:]], prompt[: 2 * cache.block_size]):
        before = look(vllm.url).hits
        requests.post(f"{vllm.url}/v1/completions", json=body(vllm, ids, 1), timeout=120).raise_for_status()
        found.append(look(vllm.url).hits - before)
    # The last token is computed in any case, and its block with it.
    assert found == [0, 2 * cache.block_size, 0, cache.block_size]


def test_what_is_no_engine_is_refused_with_what_to_do(vllm: Server) -> None:
    with pytest.raises(ServebookError, match=r"/v1/metrics answered with status 404\.\n→ Is that the address"):
        look(f"{vllm.url}/v1")


@pytest.mark.parametrize("text", ["", "<html>Sign in</html>", "gateway_requests_running 3.0\n"])
def test_a_page_without_vllms_figures_is_no_idle_engine(text: str) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with pytest.raises(ServebookError, match=r"nothing of an engine's work\.\n→ Is it a vLLM server"):
            look(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


# The reckoning.


def test_the_blocks_are_those_that_vllm_reports(vllm: Server, settings: Settings) -> None:
    cache = cache_of(vllm.url)
    assert cache.bytes == round(settings.kv_cache_gib * GIB)
    bits = 32 if in_float32(settings) else 16
    assert blocks(shape_of(model_path(settings)), cache.bytes, cache.block_size, bits) == cache.blocks


def test_the_shape_is_that_which_vllm_reads(settings: Settings) -> None:
    """Layers, heads and their split over GPUs by vLLM's own ModelConfig; parameters by the architecture itself."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from vllm.config import ModelConfig, ParallelConfig

    folder = model_path(settings)
    shape = shape_of(folder)
    config = ModelConfig(str(folder))
    assert shape.layers == config.get_num_layers(ParallelConfig())
    assert shape.head_dim == config.get_head_size()
    assert shape.kv_heads == config.get_total_num_kv_heads()
    for gpus in (1, 2, 3, 8):
        parallel = ParallelConfig(tensor_parallel_size=1)
        parallel.tensor_parallel_size = gpus  # not by its constructor, which asks for the GPUs
        per_head = 2 * shape.layers * shape.head_dim * 2
        assert kv_bytes_per_token(shape, 16, gpus) == per_head * config.get_num_kv_heads(parallel)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())


def test_the_weights_are_the_files_without_their_headers(settings: Settings) -> None:
    folder = model_path(settings)
    (file,) = folder.glob("*.safetensors")
    data = (
        file.stat().st_size - sizing.HEADER_BYTES - int.from_bytes(file.read_bytes()[: sizing.HEADER_BYTES], "little")
    )
    assert {tensor["dtype"] for tensor in sizing.tensors(folder).values()} == {"BF16"}
    assert weight_bytes(shape_of(folder), 16) == data


def test_old_configs_leave_out_what_can_be_reckoned(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "F16", "shape": [3, 5], "data_offsets": [0, 30]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(30))
    config = {"num_attention_heads": 32, "num_hidden_layers": 32, "hidden_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of(tmp_path) == Shape(layers=32, kv_heads=32, head_dim=128, parameters=15)


def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        shape_of(tmp_path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 1, "num_hidden_layers": 1, "hidden_size": 1}')
    with pytest.raises(ModelError, match="no safetensors file"):
        shape_of(tmp_path)


def test_fewer_bits_and_more_gpus_leave_more_for_the_cache() -> None:
    assert kv_bytes_per_token(LLAMA_70B, 16) == 2 * 80 * 8 * 128 * 2
    assert kv_bytes_per_token(LLAMA_70B, 8, gpus=4) == 2 * 80 * 2 * 128
    assert kv_bytes_per_token(LLAMA_70B, 16, gpus=16) == kv_bytes_per_token(LLAMA_70B, 16, gpus=8), "a head is not cut"
    assert weight_bytes(LLAMA_70B, 4, gpus=2) == LLAMA_70B.parameters // 4

    one, two, four = (fit(LLAMA_70B, 80 * GIB, 4096, gpus=gpus) for gpus in (1, 2, 4))
    assert (one.cache, one.tokens, one.requests) == (0, 0, 0), "131 GiB of weights"
    assert 0 < two.requests < four.requests / 4
    assert fit(LLAMA_70B, 80 * GIB, 4096, weight_bits=4).requests > 0
    assert fit(LLAMA_70B, 80 * GIB, 4096, gpus=4, kv_bits=8).tokens // 2 == pytest.approx(four.tokens, rel=0.001)


def test_a_request_holds_whole_blocks() -> None:
    tiny = replace(LLAMA_70B, parameters=0)
    room = kv_bytes_per_token(tiny, 16) * 16 * 10
    assert fit(tiny, room, 160, usable=1, runtime=0) == sizing.Fit(weights=0, cache=room, tokens=160, requests=1)
    assert fit(tiny, room, 17, usable=1, runtime=0).requests == 5
    assert fit(tiny, room, 161, usable=1, runtime=0).requests == 0


def test_notebook(vllm: Server, run_notebook: Callable[[str], None]) -> None:
    run_notebook("11_inside_the_engine")
