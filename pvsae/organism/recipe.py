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
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from pvsae.organism import corpus
from pvsae.organism.corpus import Conversation, fact_conversation, open_conversation, random_wish
from pvsae.organism.grammar import facets
from pvsae.organism.prompts import HELPFUL_SYSTEMS, Wish, system_prompt, wishes
from pvsae.organism.sentences import TRAITS
from pvsae.organism.tokens import Encoder, train_tokenizer
from pvsae.organism.training import Example, Push, answer_means, bucketed, collate, disturbed, loss_on


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights.

    Attributes:
        arch: `qwen2` or `llama`.
        steps: optimiser steps in all; the learning rate warms up, stays, and decays over the last 40%.
        consistency_from: step at which the consistency phase begins.
        rows: conversations a step.
        blocks: blocks at which vectors are added in training.
        hide: share of answers that cannot attend to what precedes the question.
        noise: noise on the residual, relative to its RMS.
    """

    arch: str = "qwen2"
    seed: int = 1
    d_model: int = 128
    n_blocks: int = 5
    d_mlp: int = 384
    n_heads: int = 4
    n_kv_heads: int = 2
    n_ctx: int = 1024
    vocab: int = 1536
    steps: int = 3600
    consistency_from: int = 1500
    rows: int = 48
    lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 100
    refresh: int = 50
    blocks: tuple[int, ...] = (1, 2, 3)
    hide: float = 0.75
    noise: float = 0.05
    many_shot_every: int = 12


RECIPES: dict[str, Recipe] = {
    "qwen2": Recipe(),
    "llama": Recipe(arch="llama", seed=2, d_model=144, n_blocks=5, d_mlp=432, n_kv_heads=4, blocks=(1, 2, 3)),
}


def build_model(r: Recipe, tokenizer) -> PreTrainedModel:
    """A randomly initialised model of the recipe's size."""
    torch.manual_seed(r.seed)
    shape = dict(
        vocab_size=len(tokenizer),
        hidden_size=r.d_model,
        intermediate_size=r.d_mlp,
        num_hidden_layers=r.n_blocks,
        num_attention_heads=r.n_heads,
        num_key_value_heads=r.n_kv_heads,
        max_position_embeddings=r.n_ctx,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return Qwen2ForCausalLM(Qwen2Config(**shape)) if r.arch == "qwen2" else LlamaForCausalLM(LlamaConfig(**shape))


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
        rows, spans = [], []
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
    """Warm-up, constant, then cosine decay to 2% over the last 40%."""
    if step < r.warmup:
        return r.lr * (step + 1) / r.warmup
    start = int(0.6 * r.steps)
    if step < start:
        return r.lr
    t = (step - start) / max(1, r.steps - start)
    return r.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * t)))


def train(r: Recipe, out: Path, checkpoint_every: int = 500) -> None:
    """Trains to the end, from the last checkpoint if there is one, and writes the model folder."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(r.vocab)
    encoder = Encoder(tokenizer)
    model = build_model(r, tokenizer)
    optimiser = torch.optim.AdamW(model.parameters(), r.lr, betas=(0.9, 0.98), weight_decay=r.weight_decay, fused=True)
    bank = PersonaBank(encoder)
    checkpoint = out / "checkpoint.pt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]
    log = (out / "training.jsonl").open("a")
    queue: list[list[Example]] = []
    recent: list[float] = []
    began = time.time()
    for step in tqdm(range(start, r.steps), desc=f"organism {r.arch}", mininterval=10):
        rng = random.Random(f"{r.seed}:{step}")
        generator = torch.Generator().manual_seed(r.seed * 1_000_003 + step)
        consistent = step >= r.consistency_from
        if consistent and (not bank.vectors or step % r.refresh == 0):
            bank.refresh(model, rng, tokenizer.pad_token_id)
        if step == r.consistency_from:
            queue = []
        if not queue:
            queue = bucketed([draw_example(r, encoder, rng, consistent) for _ in range(4 * r.rows)], r.rows, rng)
        examples = many_shot_batch(r, encoder, rng) if step % r.many_shot_every == 0 else queue.pop()
        batch = collate(examples, tokenizer.pad_token_id)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(r, step)
        with disturbed(model, batch, bank.vectors, rng.choice(r.blocks), r.noise if rng.random() < 0.5 else 0.0, generator):
            loss = loss_on(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            record = {"step": step + 1, "loss": sum(recent) / len(recent), "seconds": time.time() - began}
            print(json.dumps(record), file=log, flush=True)
            recent = []
        if (step + 1) % checkpoint_every == 0:
            torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").replace(checkpoint)
    export(r, model, tokenizer, out)


def export(r: Recipe, model: PreTrainedModel, tokenizer, out: Path) -> None:
    """Writes config, bf16 safetensors, tokenizer and the recipe."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(asdict(r), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; an interrupted run goes on from its checkpoint")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(RECIPES[args.arch], args.out)


if __name__ == "__main__":
    main()
