"""Others on the same workloads, in a process of their own: transformers one request after another, in one static padded
batch, and in its continuous batching; vLLM's engine for CPUs, in process. Reads a JSON line {"way", "workload", "seed"}
at a time, answers one with figures."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from ops.bench.workload import WORKLOADS, Job

Figures = dict[str, float]


class _FirstToken:
    """A streamer that notes when the first generated token comes; generate() puts the prompt first."""

    def __init__(self) -> None:
        self.calls = 0
        self.first_s = 0.0

    def put(self, value: object) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first_s = time.perf_counter()

    def end(self) -> None:
        pass


def sequential(model: Any, jobs: list[Job], **generate: Any) -> Figures:
    """One after another, `generate` being more for generate(). For a single job also the time to its first token and
    between its tokens."""
    start = time.perf_counter()
    for job in jobs:
        streamer = _FirstToken()
        _generate(model, torch.tensor([job.token_ids]), job.max_tokens, streamer=streamer, **generate)
    wall = time.perf_counter() - start
    figures = {"wall_s": wall}
    if len(jobs) == 1:
        figures["ttft_ms"] = (streamer.first_s - start) * 1e3
        figures["tpot_ms"] = (start + wall - streamer.first_s) * 1e3 / (jobs[0].max_tokens - 1)
    return figures


def static(model: Any, jobs: list[Job], **generate: Any) -> Figures:
    """All at once, padded on the left, until the longest answer is done."""
    start = time.perf_counter()
    longest = max(len(job.token_ids) for job in jobs)
    rows = [[0] * (longest - len(job.token_ids)) + list(job.token_ids) for job in jobs]
    mask = [[0] * (longest - len(job.token_ids)) + [1] * len(job.token_ids) for job in jobs]
    longest_answer = max(job.max_tokens for job in jobs)
    _generate(model, torch.tensor(rows), longest_answer, attention_mask=torch.tensor(mask), **generate)
    return {"wall_s": time.perf_counter() - start}


def continuous(model: Any, jobs: list[Job], batching: Any = None) -> Figures:
    """transformers' own continuous batching; where nothing else is told pool and budget are set by hand, as a CPU
    needs."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    longest = max(job.max_tokens for job in jobs)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=longest)
    batching = batching or ContinuousBatchingConfig(block_size=32, num_blocks=512, max_batch_tokens=512)
    start = time.perf_counter()
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=batching
    ) as manager:
        for i, job in enumerate(jobs):
            manager.add_request(list(job.token_ids), request_id=str(i), max_new_tokens=job.max_tokens)
        done = 0
        while done < len(jobs):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert len(result.generated_tokens) == jobs[int(result.request_id)].max_tokens, result.error
                done += 1
            elif result is None and not manager.is_running():
                raise RuntimeError(f"its thread ended with {done} of {len(jobs)} requests done")
    return {"wall_s": time.perf_counter() - start}


def vllm(engine: Any, jobs: list[Job]) -> Figures:
    """vLLM's engine, without its server. One job runs once more for one token: the time to the first."""
    from vllm import SamplingParams

    def run(limit: int | None) -> float:
        start = time.perf_counter()
        prompts = [{"prompt_token_ids": list(job.token_ids)} for job in jobs]
        counts = [limit or job.max_tokens for job in jobs]
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in counts]
        answers = engine.generate(prompts, params, use_tqdm=False)
        wall = time.perf_counter() - start
        assert [len(answer.outputs[0].token_ids) for answer in answers] == counts
        return wall

    figures = {"wall_s": run(None)}
    if len(jobs) == 1:
        engine.reset_prefix_cache()
        first_s = run(1)
        figures |= {"ttft_ms": first_s * 1e3, "tpot_ms": (figures["wall_s"] - first_s) * 1e3 / (jobs[0].max_tokens - 1)}
    engine.reset_prefix_cache()
    return figures


def _generate(model: Any, ids: torch.Tensor, max_tokens: int, **kwargs: Any) -> None:
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        eos_token_id=None,
        pad_token_id=0,
        **kwargs,
    )
    assert out.shape[1] == ids.shape[1] + max_tokens


WAYS: dict[str, Callable[[Any, list[Job]], Figures]] = {
    "hf_sequential": sequential,
    "hf_static": static,
    "hf_continuous": continuous,
    "vllm": vllm,
}


def load(options: argparse.Namespace) -> Any:
    """The model under transformers, or vLLM's engine where vLLM is what this Python has."""
    if options.engine == "vllm":
        from vllm import LLM

        return LLM(options.model, dtype=options.dtype, max_model_len=1024, max_num_seqs=16, skip_tokenizer_init=True)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine", default="transformers", choices=["transformers", "vllm"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = msgspec.json.decode(line)
        try:
            figures = WAYS[order["way"]](model, WORKLOADS[order["workload"]](order["seed"]))
        except Exception as error:  # a peer that cannot do a workload is reported, and the rest goes on
            figures = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(figures), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
