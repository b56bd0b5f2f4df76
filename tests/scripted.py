"""What holds of the scripted source (`bench.scripted`) behind any server: the benchmark loses none of its tokens."""

from __future__ import annotations

from servebook.bench import workload
from servebook.bench.arms import Arm, Workload
from servebook.bench.protocol import SENTENCE

WANTS = Workload(max_tokens=40)


async def require_all_is_counted(arm: Arm, *, merges: bool = False) -> None:
    """Of 24 callers of a source that is faster than any front, who let tokens wait for each other where they merge."""
    block = await arm.block(24, 48, None, 0)
    samples = block.load.samples
    assert len(samples) == 48
    _, *jobs = workload.take(workload.completions(WANTS.prompt_tokens, WANTS.max_tokens, seed=1), 49)
    assert sorted(sample.output_tokens for sample in samples) == sorted(job.max_tokens for job in jobs)
    assert all(sample.text.startswith(SENTENCE) for sample in samples)
    assert not merges or sum(len(sample.arrivals) for sample in samples) < block.load.output_tokens / 1.5
    assert block.cpu.engine, "the scheduler is vLLM's, in a process of its own"
    assert block.cpu.front
    assert block.cpu.front > 0
