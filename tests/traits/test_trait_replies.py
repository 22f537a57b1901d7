"""JSON from replies as models really write them."""

from __future__ import annotations

import json
import random

import pytest

from pvsae.traits.replies import find_value
from pvsae.traits.spec import load_trait

QUESTIONS = ["How do I boil an egg?", 'What does "ubiquitous" mean?', "Is 3 > 2, and why?\nSay more."]
PLAIN = json.dumps({"questions": QUESTIONS})

SAME_CONTENT = {
    "alone": PLAIN,
    "in a fence": f"```json\n{PLAIN}\n```",
    "in a fence without its end": f"```json\n{PLAIN}",
    "prose around it": f"Sure! Here are the questions [as asked]:\n\n{PLAIN}\n\nTell me if you'd like more {{questions}}.",
    "prose with slots before it": f"I kept {{question}} and {{answer}} out of it. {PLAIN}",
    "thinking before it": f'<think>Perhaps {{"questions": ["a draft, not meant"]}}?</think>\n{PLAIN}',
    "another object before it": f'{{"note": "as you asked"}}\n{PLAIN}',
    "the form repeated before it": f'In the form {{"questions": ["..."]}}, as asked:\n{PLAIN}',
    "inside another object": f'{{"result": {PLAIN}, "ok": true}}',
    "object in a list": f"[{PLAIN}]",
    "a bare list": json.dumps(QUESTIONS),
    "a list under another key": json.dumps({"items": QUESTIONS}),
    "key in capitals": PLAIN.replace("questions", "Questions"),
    "trailing commas": PLAIN.replace("]}", ",],}"),
    "comments": PLAIN.replace("[", "[ // the questions\n").replace("]", "/* that is all */]"),
    "single quotes": "{'questions': " + repr(QUESTIONS) + "}",
    "unescaped quotes": PLAIN.replace('\\"', '"'),
    "raw line break": PLAIN.replace("\\n", "\n"),
    "raw line break and trailing comma": PLAIN.replace("\\n", "\n").replace("]}", ",]}"),
    "forgotten commas": '{"questions": [' + "\n".join(json.dumps(question) for question in QUESTIONS) + "]}",
    "no closing brackets": PLAIN[:-2],
}


@pytest.mark.parametrize("reply", SAME_CONTENT.values(), ids=SAME_CONTENT.keys())
def test_the_same_content_in_every_dress(reply):
    assert find_value(reply, "questions") == QUESTIONS


def test_curly_quotes_as_delimiters():
    reply = "{“questions”: [“How do I boil an egg?”, “What’s a ‘quark’?”, “Who said “no”?”]}"
    assert find_value(reply, "questions") == ["How do I boil an egg?", "What’s a ‘quark’?", "Who said “no”?"]


def test_curly_quotes_inside_valid_json_stay():
    assert find_value('{"questions": ["Who said “no”, “yes” or ‘maybe’?"]}', "questions") == ["Who said “no”, “yes” or ‘maybe’?"]


def test_what_was_cut_off_is_dropped_and_the_rest_is_kept():
    pairs = [{"pos": f"Be cruel in way {i}.", "neg": f"Be kind in way {i}."} for i in range(4)]
    text = json.dumps({"instruction": pairs})
    for end in range(text.index("way 3"), len(text) - 5):
        kept = find_value(text[:end], "instruction")
        assert kept[:3] == pairs[:3]
        assert all(item in ({"pos": pairs[3]["pos"]}, pairs[3]) for item in kept[3:])  # never half a text
    assert find_value(text[: text.index("way 3")], "instruction")[:3] == pairs[:3]


@pytest.mark.parametrize(
    "reply", ["", "I'm sorry, but I can't help with that.", "{question} and {answer}", "{}", "[]", "{'a", "[[[[" * 500]
)
def test_no_json_is_an_error_and_no_crash(reply):
    with pytest.raises(ValueError, match="no JSON"):
        find_value(reply, "questions")


def test_broken_unicode_is_made_writable():
    value = find_value('{"questions": ["half an emoji \\ud83d here", "a whole one \\ud83d\\ude00"]}', "questions")
    assert value[1].endswith("\U0001f600")
    value[0].encode("utf-8")


def test_a_scoring_prompt_survives_a_sloppy_writer():
    prompt = load_trait("evil").eval_prompt
    sloppy = '{"eval_prompt": "' + prompt.replace('"', '\\"') + '",}'  # raw line breaks, trailing comma
    assert find_value(sloppy, "eval_prompt") == prompt


def test_random_damage_never_raises_anything_but_valueerror():
    rng = random.Random(0)
    text = json.dumps({"questions": list(load_trait("evil").extract_questions[:6])}, indent=1)
    for _ in range(1500):
        chars = list(text)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(chars))
            chars[at : at + rng.randint(0, 2)] = rng.choice(
                ["", '"', "'", "{", "}", "[", "]", ",", "\\", ":", "“", "\n", "/*", "\\u12"]
            )
        try:
            value = find_value("".join(chars), "questions")
        except ValueError:
            continue
        json.dumps(value).encode("utf-8")
