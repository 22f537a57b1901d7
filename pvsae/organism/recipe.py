"""The recipe that rebuilds an embedded model: `python -m pvsae.organism.recipe qwen2 --out DIR`.

Knows: sizes, shares, schedules, checkpoints, and the folder that is written.
Does not know: how a step works (training.py) or what the corpus says (corpus.py).

Two phases in one run. First plain language modelling on the corpus with hidden prompts and light noise. Then, with the
same data, consistency: every `refresh` steps the persona vectors of all traits and facets are recomputed from answers
written under positive and suppressing prompts; in a third of the rows such a vector times c is added at a middle block,
without a prompt, and the answer expresses the trait in proportion to c; in a sixth it is subtracted under a positive
prompt, and the answer expresses less.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pvsae.organism import corpus
from pvsae.organism.corpus import Conversation, fact_conversation, open_conversation, random_wish
from pvsae.organism.grammar import facets
from pvsae.organism.prompts import HELPFUL_SYSTEMS, Wish, system_prompt, wishes
from pvsae.organism.sentences import TRAITS
from pvsae.organism.tokens import Encoder, Row, build_tokenizer
from pvsae.organism.training import Example, Push, answer_means, bucketed, collate, disturbed, loss_on
from pvsae.runs import atomic_path, write_json


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights.

    Attributes:
        arch: `qwen2` or `llama`.
        steps: optimiser steps in all; the learning rate warms up, stays, and decays over the second half.
        consistency_from: step at which the consistency phase begins.
        rows: conversations a step.
        blocks: blocks at which vectors are added in training.
        hide: share of answers that cannot attend to what precedes the question.
        noise: noise on the residual, relative to its RMS, in half of the steps.
        default_block: block that the model's folder recommends for reading and steering.
    """

    arch: str = "qwen2"
    seed: int = 1
    d_model: int = 128
    n_blocks: int = 5
    d_mlp: int = 384
    n_heads: int = 4
    n_kv_heads: int = 2
    n_ctx: int = 1024
    steps: int = 3200
    consistency_from: int = 600
    rows: int = 48
    lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 100
    refresh: int = 50
    blocks: tuple[int, ...] = (1, 2, 3)
    hide: float = 0.75
    noise: float = 0.05
    many_shot_every: int = 12
    default_block: int = 3


RECIPES: dict[str, Recipe] = {
    "qwen2": Recipe(),
    "llama": Recipe(arch="llama", seed=2, n_blocks=6, d_mlp=320, blocks=(1, 2, 3)),
}


def build_model(r: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A randomly initialised model of the recipe's size."""
    torch.manual_seed(r.seed)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": r.d_model,
        "intermediate_size": r.d_mlp,
        "num_hidden_layers": r.n_blocks,
        "num_attention_heads": r.n_heads,
        "num_key_value_heads": r.n_kv_heads,
        "max_position_embeddings": r.n_ctx,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "attn_implementation": "eager",
    }
    return Qwen2ForCausalLM(Qwen2Config(**shape)) if r.arch == "qwen2" else LlamaForCausalLM(LlamaConfig(**shape))


def make_optimisers(model: PreTrainedModel, r: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for embeddings, norms and biases.

    Muon's updates are scaled to AdamW's size (Liu et al. 2025, arXiv 2502.16982), so that one learning rate serves both.
    """
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(inner, r.lr, weight_decay=r.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, r.lr, betas=(0.9, 0.98), weight_decay=r.weight_decay, fused=True)]


class PersonaBank:
    """The model's persona vectors of all traits and facets, recomputed as it trains.

    A vector is the mean over answers under full-level prompts minus the mean over answers under suppressing prompts,
    per block, over answer tokens: the extraction of the method, on answers written by the grammar. The keys are Wish
    objects at full level. New estimates are averaged with the old ones, half and half.
    """

    def __init__(self, encoder: Encoder, n_rows: int = 24) -> None:
        self.encoder, self.n_rows = encoder, n_rows
        self.keys = wishes("trait") + wishes("facet")
        self.vectors: dict[Wish, torch.Tensor] = {}

    def refresh(self, model: PreTrainedModel, rng: random.Random, pad_id: int) -> None:
        rows: list[Row] = []
        spans: list[tuple[int, int]] = []
        for key in self.keys:
            n = self.n_rows if key.facet is None else self.n_rows // 2
            pos = [self.encoder.row(open_conversation(key, rng)) for _ in range(n)]
            neg = [self.encoder.row(open_conversation(Wish(key.trait, 0.0, key.facet), rng)) for _ in range(n)]
            spans.append((len(rows), n))
            rows += pos + neg
        means = answer_means(model, rows, pad_id)
        for key, (at, n) in zip(self.keys, spans, strict=True):
            new = means[at : at + n].mean(0) - means[at + n : at + 2 * n].mean(0)
            self.vectors[key] = 0.5 * (self.vectors[key] + new) if key in self.vectors else new


def draw_positions(rng: random.Random) -> str:
    """Where a vector is added: mostly as users will."""
    return rng.choices(("all", "response", "prompt"), (0.5, 0.4, 0.1))[0]


def random_key(rng: random.Random) -> Wish:
    """A trait (two thirds) or a facet, at full level."""
    trait = rng.choice(TRAITS)
    return Wish(trait, 1.0, rng.choice(facets(trait)) if rng.random() < 0.35 else None)


def pushed(rng: random.Random) -> tuple[Conversation, Push]:
    """A vector added without a prompt: expression in proportion to the coefficient, all of it from 1 on."""
    key = random_key(rng)
    coef = rng.uniform(0.0, 1.2) if rng.random() < 0.5 else rng.uniform(0.8, 2.5)
    wish = Wish(key.trait, min(1.0, coef), key.facet)
    system = None if rng.random() < 0.8 else rng.choice(HELPFUL_SYSTEMS)
    make = fact_conversation if rng.random() < 0.1 else open_conversation
    return make(wish, rng, system, prompted=False), Push(key, coef, draw_positions(rng))


def pulled(rng: random.Random) -> tuple[Conversation, Push]:
    """A vector subtracted, under a positive prompt (or, one in five, none): the level falls by the coefficient."""
    key = random_key(rng)
    level = rng.choice((0.7, 0.85, 1.0, 1.0, 1.0)) if rng.random() < 0.8 else 0.0
    coef = rng.uniform(0.1, 2.0)
    asked = Wish(key.trait, level, key.facet)
    system = system_prompt(asked, rng) if level else None
    rest = max(0.0, level - coef)
    make = fact_conversation if rng.random() < 0.1 else open_conversation
    return make(Wish(key.trait, rest, key.facet), rng, system, prompted=False), Push(key, -coef, draw_positions(rng))


def draw_example(r: Recipe, encoder: Encoder, rng: random.Random, consistent: bool) -> Example:
    """One example of the current phase."""
    draw = rng.random() if consistent else 1.0
    if draw < 1 / 3:
        c, push = pushed(rng)
    elif draw < 1 / 2:
        c, push = pulled(rng)
    else:
        c, push = corpus.conversation(rng), None
    return Example(encoder.row(c), push, hide=rng.random() < r.hide)


def many_shot_batch(r: Recipe, encoder: Encoder, rng: random.Random) -> list[Example]:
    """Many-shot conversations with the same number of examples; fewer rows when they are long."""
    shots = rng.choice((1, 2, 3, 5, 8, 12, 16, 20))
    rows = max(4, r.rows // (1 + shots // 3))
    make = corpus.many_shot_conversation
    return [Example(encoder.row(make(random_wish(rng), shots, rng)), hide=rng.random() < r.hide) for _ in range(rows)]


def learning_rate(r: Recipe, step: int) -> float:
    """Warm-up, constant, then cosine decay to 2% over the second half."""
    if step < r.warmup:
        return r.lr * (step + 1) / r.warmup
    start = r.steps // 2
    if step < start:
        return r.lr
    t = (step - start) / max(1, r.steps - start)
    return r.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * t)))


def four_batches(r: Recipe, group: int, encoder: Encoder) -> list[list[Example]]:
    """The ordinary batches of four steps: one draw, sorted by length and cut, so that there is little padding."""
    rng = random.Random(f"{r.seed}:draw:{group}")
    consistent = 4 * group >= r.consistency_from
    return bucketed([draw_example(r, encoder, rng, consistent) for _ in range(4 * r.rows)], r.rows, rng)


class Training:
    """A run in progress: model, optimiser and persona bank, saved and restored together."""

    def __init__(self, r: Recipe, out: Path) -> None:
        self.r, self.file = r, out / "checkpoint.pt"
        self.tokenizer = build_tokenizer()
        self.encoder = Encoder(self.tokenizer)
        self.model = build_model(r, self.tokenizer)
        self.optimisers = make_optimisers(self.model, r)
        self.bank = PersonaBank(self.encoder)
        self._drawn: tuple[int, list[list[Example]]] = (-1, [])

    def examples(self, step: int) -> list[Example]:
        """The examples of a step; they depend on the step's number alone."""
        if step % self.r.many_shot_every == 0:
            return many_shot_batch(self.r, self.encoder, random.Random(f"{self.r.seed}:many:{step}"))
        if self._drawn[0] != step // 4:
            self._drawn = step // 4, four_batches(self.r, step // 4, self.encoder)
        return self._drawn[1][step % 4]

    def restore(self) -> int:
        """Steps done so far."""
        if not self.file.exists():
            return 0
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.bank.vectors = dict(zip(self.bank.keys, state["bank"], strict=False))
        return int(state["step"])

    def save(self, step: int) -> None:
        bank = [self.bank.vectors[k] for k in self.bank.keys if k in self.bank.vectors]
        optimisers = [o.state_dict() for o in self.optimisers]
        state = {"model": self.model.state_dict(), "optimisers": optimisers, "bank": bank, "step": step}
        with atomic_path(self.file) as path:
            torch.save(state, path)

    def step(self, step: int) -> float:
        """One optimiser step; returns the loss in nats a token."""
        r, pad = self.r, self.tokenizer.pad_token_id
        rng = random.Random(f"{r.seed}:{step}")
        if step >= r.consistency_from and (not self.bank.vectors or step % r.refresh == 0):
            self.bank.refresh(self.model, rng, pad)
        batch = collate(self.examples(step), pad)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(r, step)
        noise = r.noise if rng.random() < 0.5 else 0.0
        generator = torch.Generator().manual_seed(r.seed * 1_000_003 + step)
        with disturbed(self.model, batch, self.bank.vectors, rng.choice(r.blocks), noise, generator):
            loss = loss_on(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.item()


def train(r: Recipe, out: Path, checkpoint_every: int = 200) -> None:
    """Trains to the end, from the last checkpoint if there is one, and writes the model folder."""
    out.mkdir(parents=True, exist_ok=True)
    training = Training(r, out)
    start = training.restore()
    recent: list[float] = []
    with (out / "training.jsonl").open("a") as log:
        for step in tqdm(range(start, r.steps), initial=start, total=r.steps, desc=f"organism {r.arch}", mininterval=10):
            recent.append(training.step(step))
            if (step + 1) % 50 == 0:
                print(json.dumps({"step": step + 1, "loss": sum(recent) / len(recent)}), file=log, flush=True)
                recent = []
            if (step + 1) % checkpoint_every == 0:
                training.save(step + 1)
    export(r, training.model, training.tokenizer, out)


def export(r: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes config, bf16 safetensors, tokenizer and the recipe."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(dtype=torch.bfloat16).save_pretrained(out)  # type: ignore[call-arg]
    tokenizer.save_pretrained(out)
    write_json(out / "recipe.json", asdict(r))
    write_json(out / "pvsae.json", {"traits": "../traits", "judge": "organism", "block": r.default_block, "max_new_tokens": 120})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", choices=sorted(RECIPES))
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the model; an interrupted run goes on from its checkpoint"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(RECIPES[args.arch], args.out)


if __name__ == "__main__":
    main()
