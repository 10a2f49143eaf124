"""Write tiny_chat.jsonl beside this file, the rows of the demo: `python configs/data/make_tiny_chat.py`.

A user asks for a phrase (number, colour, animal) in the other language; in a quarter of the rows single words of it are
changed afterwards, and in a quarter a system message says how answers must look. Every phrase opens one conversation
only, so a held-out row cannot be answered from memory: it takes the rule.
"""

import json
import random
from itertools import product
from pathlib import Path

NUM_ROWS = 600

NUMBERS = {
    "two": "两",
    "three": "三",
    "four": "四",
    "five": "五",
    "six": "六",
    "seven": "七",
    "eight": "八",
    "nine": "九",
}
COLOURS = {
    "red": "红",
    "yellow": "黄",
    "blue": "蓝",
    "green": "绿",
    "purple": "紫",
    "black": "黑",
    "white": "白",
    "grey": "灰",
}
ANIMALS = {  # Chinese puts a measure word between number and animal, and which one depends on the animal
    "cats": "只猫",
    "dogs": "只狗",
    "birds": "只鸟",
    "rabbits": "只兔",
    "ducks": "只鸭",
    "fish": "条鱼",
    "snakes": "条蛇",
    "horses": "匹马",
    "cows": "头牛",
    "elephants": "头象",
}
PHRASES = list(product(NUMBERS, COLOURS, ANIMALS))
Phrase = tuple[str, str, str]

ASK = {  # language of the user, language of the answer -> ways to ask
    ("en", "en"): ("Translate into English: {}", "What does “{}” mean in English?"),
    ("en", "zh"): ("Translate into Chinese: {}", "How do you say “{}” in Chinese?"),
    ("zh", "en"): ("翻译成英文：{}", "“{}”用英语怎么说？"),
    ("zh", "zh"): ("翻译成中文：{}", "“{}”用中文怎么说？"),
}
SYSTEM = {  # language of the user -> what a system message may ask of the answers ...
    "en": (
        "Put every answer in square brackets.",
        "End every answer with an exclamation mark.",
        "Write every answer in capital letters.",
    ),
    "zh": ("每个回答都放在方括号里。", "每个回答都用感叹号结尾。", "每个回答都用大写字母。"),
}
LOOK = {  # language of the answer -> ... and what it does to them, in the same order; Chinese has no capital letters
    "en": ("[{}]".format, "{}!".format, str.upper),
    "zh": ("[{}]".format, "{}！".format),
}


def say(phrase: Phrase, language: str) -> str:
    """The phrase in English ("two red cats") or Chinese ("两只红猫")."""
    number, colour, animal = phrase
    if language == "en":
        return f"{number} {colour} {animal}"
    measure, noun = ANIMALS[animal]
    return f"{NUMBERS[number]}{measure}{COLOURS[colour]}{noun}"


def change(phrase: Phrase, language: str, rng: random.Random) -> tuple[str, Phrase]:
    """What a user says to change one word of the phrase, and the phrase after it."""
    slot = rng.randrange(3)
    number, colour, animal = new = rng.choice(
        [
            other
            for other in PHRASES
            if [a != b for a, b in zip(phrase, other, strict=True)] == [i == slot for i in range(3)]
        ]
    )
    measure, noun = ANIMALS[animal]
    if language == "en":
        return (f"Make it {number}.", f"Make them {colour}.", f"Now {animal} instead.")[slot], new
    return (f"换成{NUMBERS[number]}{measure}。", f"换成{COLOURS[colour]}色的。", f"换成{noun}。")[slot], new


def conversation(phrase: Phrase, rng: random.Random) -> list[dict[str, str]]:
    """One conversation that opens with `phrase`."""
    user, answer = rng.choice(list(ASK))
    messages, look = [], str
    if rng.random() < 1 / 4:
        system, look = rng.choice(list(zip(SYSTEM[user], LOOK[answer], strict=False)))
        messages.append({"role": "system", "content": system})
    request = rng.choice(ASK[user, answer]).format(say(phrase, "zh" if answer == "en" else "en"))
    changes = rng.choice((1, 2)) if rng.random() < 1 / 4 else 0
    for turn in range(1 + changes):
        if turn:
            request, phrase = change(phrase, user, rng)
        messages.append({"role": "user", "content": request})
        messages.append({"role": "assistant", "content": look(say(phrase, answer))})
    return messages


def main() -> None:
    """Write the rows; the same seed gives the same bytes."""
    rng = random.Random(0)
    with Path(__file__).with_name("tiny_chat.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for phrase in rng.sample(PHRASES, NUM_ROWS):
            file.write(json.dumps({"messages": conversation(phrase, rng)}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
