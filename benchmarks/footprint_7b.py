"""The whole pipeline on a model of Qwen2.5-7B's shape: peak memory and tokens per second of each stage.

    python -m benchmarks.footprint_7b [--quick]

With a CUDA GPU that has room for it, a randomly initialised bf16 model of that shape answers a handful of prompts, its rollouts
are read for vectors, and it is steered and monitored; memory and speed are measured. Without one, memory is computed from the
config and speed is an estimate for one named GPU; the result file says "estimate" in every such row.

The shape (hidden 3584, 28 blocks, 28 heads, 4 key-value heads, MLP 18944, vocabulary 152064, untied) is that of the published
config.json of Qwen2.5-7B-Instruct. The tokenizer is the organism's: random weights understand no text anyway.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.record import check, record
from pvsae.models import Add, ChatModel, Direction, LastPrompt, Rendered, Sampling, SpanMean, load

SHAPE: dict[str, Any] = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
# For estimates only: NVIDIA's datasheet of the H100 SXM, at shares of the peaks that large bf16 models usually reach.
GPU = {"name": "H100 SXM 80 GB", "bf16_flops": 989e12, "bytes_per_second": 3.35e12, "memory_gib": 80.0}
FLOPS_SHARE, BANDWIDTH_SHARE = 0.5, 0.7
PROMPT, ANSWER, ROWS = 64, 128, 32


def config() -> Qwen2Config:
    """The shape as a config without stop ids, so that every answer has the full length."""
    rest: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "attn_implementation": "sdpa"}
    return Qwen2Config(**SHAPE, **rest)


def n_parameters() -> int:
    """Parameters of the shape, counted on the meta device."""
    with torch.device("meta"):
        return sum(p.numel() for p in Qwen2ForCausalLM(config()).parameters())


def kv_bytes(rows: int, tokens: int) -> int:
    """Bytes of a bf16 key-value cache."""
    head = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    return 2 * 2 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * head * rows * tokens


def estimate() -> list[dict[str, Any]]:
    """A row a stage from the config alone: floor of the memory, and the speed of the named GPU at the assumed shares."""
    n, d, blocks = n_parameters(), SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
    weights = 2 * n
    flops = GPU["bf16_flops"] * FLOPS_SHARE  # type: ignore[operator]
    bandwidth = GPU["bytes_per_second"] * BANDWIDTH_SHARE  # type: ignore[operator]
    cache = kv_bytes(ROWS, PROMPT + ANSWER)
    step = max((weights + cache) / bandwidth, 2 * n * ROWS / flops)
    widest = ROWS * (PROMPT + ANSWER) * max(SHAPE["intermediate_size"] * 3, d * 6) * 2
    logits = ROWS * SHAPE["vocab_size"] * (2 + 4)
    kept = 3 * ROWS * blocks * d * 4
    rows = [
        ("rollouts", weights + cache + logits, ROWS / step),
        ("steered rollouts", weights + cache + logits, ROWS / step),
        ("vectors", weights + widest + kept, flops / (2 * (n - 2 * SHAPE["vocab_size"] * d))),
        ("monitoring", weights + widest + kept, flops / (2 * (n - 2 * SHAPE["vocab_size"] * d))),
    ]
    return [{"stage": s, "kind": "estimate", "peak_gib": m / 2**30, "tokens_per_second": t} for s, m, t in rows]


def measured(answer_tokens: int) -> list[dict[str, Any]]:
    """A row a stage, measured on the first CUDA device."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        hf = Qwen2ForCausalLM(config()).eval()
        torch.set_default_dtype(before)
    model = ChatModel(hf, load("organism").tokenizer, name="random-7b")
    prompts = [model.chat.prompt([{"role": "user", "content": "Tell me about chess. " * (4 + i % 8)}]) for i in range(ROWS)]
    sampling = Sampling(max_new_tokens=answer_tokens)
    blocks = tuple(range(model.n_blocks))
    push = Add(Direction(0.1 * torch.randn(model.d_model)), model.n_blocks // 2, 1.0)
    kept: list[Rendered] = []

    def rollouts() -> int:
        answers = model.generate(prompts, sampling)
        kept[:] = [model.chat.with_answer_ids(p, a.ids) for p, a in zip(prompts, answers, strict=True)]
        return sum(len(a.ids) for a in answers)

    def steered() -> int:
        return sum(len(a.ids) for a in model.generate(prompts, sampling, interventions=(push,)))

    def vectors() -> int:
        model.capture(kept, [SpanMean(blocks, "prompt"), SpanMean(blocks, "answer"), LastPrompt(blocks)])
        return sum(len(r.ids) for r in kept)

    def monitoring() -> int:
        model.capture(prompts, [LastPrompt((model.n_blocks // 2,))])
        return sum(len(p.ids) for p in prompts)

    stages = {"rollouts": rollouts, "steered rollouts": steered, "vectors": vectors, "monitoring": monitoring}
    return [_timed(name, run) for name, run in stages.items()]


def _timed(stage: str, run: Callable[[], int]) -> dict[str, Any]:
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    tokens = run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"stage": stage, "kind": "measured", "peak_gib": peak, "tokens_per_second": tokens / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter answers")
    args = parser.parse_args()
    room = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 2.4 * n_parameters()
    rows = measured(16 if args.quick else ANSWER) if room else estimate()
    for row in rows:
        print(f"{row['stage']:18} {row['kind']:9} {row['peak_gib']:7.1f} GiB {row['tokens_per_second']:12,.0f} tokens/s")
    if not room:
        print(f"No GPU with room for it here: the rows are estimates for an {GPU['name']}, nothing was run.")
    where = torch.cuda.get_device_name() if room else f"estimate for {GPU['name']}, from the config; nothing was run"
    fits = [check(f"{row['stage']}: {row['kind']} peak GiB, fits 24 GiB", row["peak_gib"], "<= 24") for row in rows]
    record("footprint_7b", fits, {"rows": rows, "device": where, "parameters": n_parameters(), "shape": SHAPE, "batch": ROWS})


if __name__ == "__main__":
    main()
