"""Rows of different lengths, directions and helpers that the tests of the engine share."""

import torch

from pvsae.models import Direction, Positions, Rendered, TokenBatch

QUESTIONS = (
    ("You are kind.", "What is a ferry?", "It is a boat that comes back before dark."),
    ("", "Why has the old clock in the kitchen stopped, and who would know?", "Nobody."),
    ("Answer in one short sentence, and never make anything up.", "Who?", "The old clock has a theory about everybody."),
)


def rendered_rows(model):
    """Three rows of prompt and answer, each with system (two of three), user and answer spans."""
    rows = []
    for system, question, answer in QUESTIONS:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        prompt = model.chat.prompt(messages)
        ids = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
        rows.append(model.chat.with_answer_ids(prompt, ids))
    return rows


def prompt_of(row: Rendered) -> Rendered:
    return Rendered(row.ids[: row.n_prompt], row.n_prompt, (row.n_prompt, row.n_prompt), row.spans, "")


def direction(model, seed=0, norm=2.0):
    values = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    return Direction(norm * values / values.norm(), f"random {seed}")


def batch_of(model, rows, side="right"):
    return TokenBatch.build(rows, pad_id=model.pad_id, side=side, device=model.device)


@torch.no_grad()
def logits_of(model, rows, interventions=(), side="right"):
    """Logits at every real token, one [tokens, vocab] a row, from one padded batch."""
    batch = batch_of(model, rows, side)
    with model.hooks(interventions):
        logits = model.forward(batch).logits
    return [logits[i][batch.attention_mask[i].bool()] for i in range(len(rows))]


@torch.no_grad()
def logits_with_cache(model, rows, interventions=()):
    """The same numbers by prefilling left-padded prompts and feeding one answer token a row and step."""
    prompts = [prompt_of(row) for row in rows]
    batch = batch_of(model, prompts, "left")
    found = []
    with model.hooks(interventions):
        out = model.forward(batch, use_cache=True)
        for i in range(len(rows)):
            found.append([out.logits[i][batch.attention_mask[i].bool()]])
        mask = batch.attention_mask
        for step in range(max(len(row.ids) - row.n_prompt for row in rows)):
            ids = [row.ids[min(row.n_prompt + step, len(row.ids) - 1)] for row in rows]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            new = TokenBatch(
                torch.tensor(ids)[:, None], mask, mask.sum(1, keepdim=True) - 1, Positions.decode(len(rows)), left_padded=True
            )
            out = model.forward(new, past=out.past, use_cache=True)
            for i, row in enumerate(rows):
                if row.n_prompt + step < len(row.ids):
                    found[i].append(out.logits[i])
    return [torch.cat(parts) for parts in found]
