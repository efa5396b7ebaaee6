"""Windowed twins on a real runner under the real core: blocks go back while a request runs, and nobody reads them."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from services.scheduler.core.plan import StepPlan, StepResult
from services.scheduler.core.request import Submission
from services.scheduler.core.scheduler import CoreConfig
from services.scheduler.wire import plan_message
from services.worker.execute.runner import Runner
from services.worker.models.decoder import Decoder, load_decoder
from services.worker.wire import plan_from_message
from shared.cache_groups import held_blocks
from shared.checkpoint import open_checkpoint
from shared.sampling import Sampling, Stopping
from tests.builders.core_driver import CoreDriver
from tests.builders.runners import answer_all, make_asked, make_runner
from tests.models.twins import make_twin

GROUPS: dict[str, tuple[int | None, ...]] = {
    "mistral-window": (21,),
    "qwen2-alternating": (None, 13),
    "qwen2-window": (None, 19, 19),
}
BLOCK, CHUNK, NEW_TOKENS = 4, 16, 40


class RealDevice:
    """A runner behind both ends of the wire."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def reset(self) -> None:
        self.runner.reset()

    def arrive(self, plan: StepPlan) -> None:
        """Nobody asks for a grammar here."""
        assert not any(admission.grammar for admission in plan.admissions)

    def run(self, plan: StepPlan) -> StepResult:
        output = self.runner.run(plan_from_message(plan_message(plan).plan, {}))
        return StepResult(step=plan.step, tokens=output.tokens.tolist())


def drive(decoder: Decoder, windows: tuple[int | None, ...], num_blocks: int, *, caching: bool) -> CoreDriver:
    """A driver that checks every invariant and every table, in front of real pages."""
    config = CoreConfig(
        max_model_len=256, max_num_batched_tokens=CHUNK, enable_prefix_caching=caching, max_step_retries=9
    )
    driver = CoreDriver(config, max_in_flight=2)
    driver.add_group("g0", num_blocks=num_blocks, block_size=BLOCK, max_num_seqs=4, windows=windows)
    driver.devices["g0"] = RealDevice(make_runner(decoder, num_blocks=num_blocks, block_size=BLOCK, max_num_seqs=4))
    return driver


@pytest.fixture(scope="module")
def twin(twin_folder: Path):
    @cache
    def made(name: str) -> tuple[Decoder, torch.nn.Module]:
        path = make_twin(name, twin_folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return load_decoder(open_checkpoint(path), torch.float32), model

    return made


@torch.inference_mode()
def expected(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    whole = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return whole[0, len(prompt) :].tolist()


def prompts_of(name: str) -> list[list[int]]:
    """Own endings behind a shared beginning longer than any window; the first comes again at the end."""
    rng = random.Random(name)
    shared = [rng.randrange(2, 384) for _ in range(50)]
    prompts = [shared + [rng.randrange(2, 384) for _ in range(length)] for length in (3, 31, 60, 17)]
    return [*prompts, [rng.randrange(2, 384) for _ in range(9)], prompts[0]]


@pytest.mark.parametrize("name", GROUPS)
def test_twins_answer_as_transformers_with_hits_and_without(name: str, twin):
    """Chunks of 16 tokens, two plans in flight, and blocks for two of four places; failed steps preempt everybody."""
    decoder, model = twin(name)
    windows, prompts = GROUPS[name], prompts_of(name)
    num_blocks = 2 * held_blocks(110 + NEW_TOKENS, windows, BLOCK, CHUNK)
    for caching in (True, False):
        driver = drive(decoder, windows, num_blocks, caching=caching)
        for key, prompt in enumerate([*prompts, *prompts]):
            driver.submit(
                Submission(
                    key=key,
                    token_ids=tuple(prompt),
                    sampling=Sampling(seed=0, temperature=0.0),
                    stopping=Stopping(max_tokens=NEW_TOKENS),
                )
            )
        for turn in range(100):
            while driver.schedule():
                pass
            driver.deliver(error="made to fail" if turn % 40 == 20 else "")
        driver.run()
        driver.assert_idle()
        for key, prompt in enumerate([*prompts, *prompts]):
            assert driver.answer(key) == expected(model, prompt), (key, caching)
        assert (driver.core.counts.prefix_hits > 0) == caching
        assert sum(driver.core.counts.preemptions.values()) > 3


@pytest.mark.parametrize("name", GROUPS)
def test_a_runner_reads_nothing_before_its_windows(name: str, twin):
    """Random batches and chunks; a block that left a window is another's at once."""
    decoder, model = twin(name)
    runner = make_runner(decoder, num_blocks=96, block_size=BLOCK)
    asked = [make_asked(prompt, NEW_TOKENS) for prompt in prompts_of(name)]
    settings = {"block_size": BLOCK, "num_blocks": 96, "windows": GROUPS[name]}
    for each in answer_all(runner, asked, random.Random(name), preempt=0.02, **settings):
        assert each.tokens == expected(model, each.prompt)
