"""How fast generation is: beside Hugging Face's own `generate` with sdpa attention, and steered beside unsteered.

    python -m benchmarks.generation [--quick]

A Qwen2 with random weights (d_model 512, 8 blocks, vocabulary of 8192) that never stops answers 32 prompts of different lengths,
greedily and sampled; every way makes the same number of tokens. The ways take turns, and what counts is the median, over the
turns, of the ratio of their times within a turn, so that a machine that is busy for a while slows both sides. Steering adds a
vector of almost no length at one block: the work is that of any steering, the text and so the lengths stay.

The organism, whose answers do stop, is measured as well if it is there: seconds for the same prompts to their ends, in five
times as many turns, because each takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.record import check, record
from pvsae.errors import UserError
from pvsae.models import Add, ChatModel, Direction, Generation, Rendered, Sampling, load

BATCH = 32
Way = Callable[[], int]


def random_model(d_model: int = 512, n_blocks: int = 8, vocab: int = 8192) -> ChatModel:
    """A Qwen2 of realistic small shape without stop ids, and a byte-level tokenizer filled up to the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([f"<{i}>" for i in range(vocab - len(alphabet))])
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=d_model, intermediate_size=4 * d_model, num_hidden_layers=n_blocks,
        num_attention_heads=d_model // 64, num_key_value_heads=max(1, d_model // 256), max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hf: Any = Qwen2ForCausalLM(config).eval()
    hf.set_attn_implementation("sdpa")
    hf = hf.to(device)
    return ChatModel(hf, PreTrainedTokenizerFast(tokenizer_object=core), name="random-qwen2", chat_options={"chat": "plain"})


def random_prompts(model: ChatModel, n: int = BATCH) -> list[Rendered]:
    """Prompts of 20 to 80 tokens."""
    return [model.chat.plain("q" * (20 + 60 * i // n)) for i in range(n)]


def ours(model: ChatModel, prompts: Sequence[Rendered], sampling: Sampling, interventions: Sequence[Add] = ()) -> int:
    """Tokens made by our generation, stop tokens counted."""
    return sum(map(_made, model.generate(prompts, sampling, interventions=interventions, batch_size=BATCH)))


def _made(answer: Generation) -> int:
    return len(answer.ids) + (answer.finish == "stop")


@torch.inference_mode()
def theirs(model: ChatModel, prompts: Sequence[Rendered], sampling: Sampling, stops: Sequence[int]) -> int:
    """Tokens made by Hugging Face's generate with the same sampling, decoded to text as ours are, stop tokens counted."""
    width = max(p.n_prompt for p in prompts)
    ids = torch.tensor([[model.pad_id] * (width - p.n_prompt) + list(p.ids) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - p.n_prompt) + [1] * p.n_prompt for p in prompts], device=model.device)
    warp: dict[str, Any] = (
        {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        if sampling.temperature
        else {"do_sample": False}
    )
    out = model.hf.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=model.pad_id,
        **warp,
    )
    made = 0
    for row in out[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        model.tokenizer.decode(row[:end], skip_special_tokens=True)
        made += end
    return made


def with_sdpa(model: ChatModel, way: Way) -> Way:
    """The same work with sdpa attention, whatever the model was loaded with (switching is a matter of microseconds)."""

    def run() -> int:
        before = model.hf.config._attn_implementation
        model.hf.set_attn_implementation("sdpa")
        try:
            return way()
        finally:
            model.hf.set_attn_implementation(before)

    return run


def take_turns(ways: dict[str, Way], rounds: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Runs every way once as a warm-up and then in turns, each round beginning with another one.

    Returns: {way: {"seconds": one a round, "tokens": one a round}}.
    """
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "tokens": []} for name in ways}
    names = list(ways)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _wait(device)
            start = time.perf_counter()
            tokens = ways[name]()
            _wait(device)
            if turn:
                found[name]["seconds"].append(time.perf_counter() - start)
                found[name]["tokens"].append(tokens)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ratio(times: dict[str, dict[str, list[float]]], slow: str, fast: str) -> float:
    """Median over the rounds of slow's seconds a token over fast's, within a round."""
    cost = {n: [s / t for s, t in zip(times[n]["seconds"], times[n]["tokens"], strict=True)] for n in (slow, fast)}
    return statistics.median(a / b for a, b in zip(cost[slow], cost[fast], strict=True))


def barely(model: ChatModel, positions: str) -> list[Add]:
    """Steering of almost no length at the middle block."""
    values = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    return [Add(Direction(values / values.norm(), "random"), model.n_blocks // 2, 1e-6, positions)]


def measure(
    model: ChatModel, prompts: Sequence[Rendered], new_tokens: int, rounds: int, prefix: str
) -> tuple[list[Any], dict[str, Any]]:
    """Checks and details of one model."""
    from pvsae.models.generate import stop_ids

    stops, checks, details = stop_ids(model), [], {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        sampling = Sampling(new_tokens, temperature=temperature)
        ways: dict[str, Way] = {
            "ours": partial(ours, model, prompts, sampling),
            "hf": with_sdpa(model, partial(theirs, model, prompts, sampling, stops)),
            "steered": partial(ours, model, prompts, sampling, barely(model, "response")),
            "steered_all": partial(ours, model, prompts, sampling, barely(model, "all")),
        }
        times = take_turns(ways, rounds, model.device)
        details[name] = {
            way: {
                "median_seconds": statistics.median(t["seconds"]),
                "tokens_per_second": statistics.median(n / s for n, s in zip(t["tokens"], t["seconds"], strict=True)),
                **t,
            }
            for way, t in times.items()
        }
        checks += [
            check(f"{prefix}.{name}.speed_over_hf_sdpa", ratio(times, "hf", "ours"), ">= 1.0"),
            check(f"{prefix}.{name}.steered_time_ratio", ratio(times, "steered", "ours"), "<= 1.05"),
            check(f"{prefix}.{name}.steered_all_time_ratio", ratio(times, "steered_all", "ours"), "<= 1.05"),
        ]
    return checks, details


def organism_prompts(model: ChatModel, n: int = BATCH) -> list[Rendered]:
    """The organism's own evaluation questions."""
    from pvsae.traits import list_traits, load_trait

    library = model.path / str(model.defaults["traits"]) if model.path and "traits" in model.defaults else None
    questions = [q for trait in list_traits(library) for q in load_trait(trait, library).eval_questions]
    return [model.chat.prompt([{"role": "user", "content": q}]) for q in (questions * n)[:n]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and turns, and a smaller model")
    parser.add_argument("--no-organism", action="store_true", help="the random model only")
    args = parser.parse_args()
    model = random_model(256, 4, 2048) if args.quick else random_model()
    tokens, rounds = (32, 3) if args.quick else (128, 7)
    checks, found = measure(model, random_prompts(model), tokens, rounds, "generation")
    details: dict[str, Any] = {"batch": BATCH, "new_tokens": tokens, "rounds": rounds, model.name: found}
    if not args.no_organism:
        try:
            organism = load("organism")
        except UserError as error:
            details["organism"] = f"not measured: {error.what}"
        else:
            more, found = measure(organism, organism_prompts(organism), tokens, 5 * rounds, "generation.organism")
            checks, details["organism"] = checks + more, found
    record("generation", checks, details)


if __name__ == "__main__":
    main()
