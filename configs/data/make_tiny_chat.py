"""Write tiny_chat.jsonl, the rows of the demo, beside this file: `python configs/data/make_tiny_chat.py`.

A user asks for a phrase (number, colour, animal) in the other language; in a quarter of the rows single words of it are
changed afterwards, and in a quarter a system message says how answers must look. No phrase opens two conversations, so
a held-out row cannot be answered from memory: it takes the rule.
"""

import json
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path

NUM_ROWS = 600

NUMBERS = dict(zip("two three four five six seven eight nine".split(), "两三四五六七八九", strict=True))
COLOURS = dict(zip("red yellow blue green purple black white grey".split(), "红黄蓝绿紫黑白灰", strict=True))
ANIMALS = dict(
    zip("cats dogs birds rabbits ducks fish snakes horses cows elephants".split(), "猫狗鸟兔鸭鱼蛇马牛象", strict=True)
)
MEASURES = dict(
    zip("猫狗鸟兔鸭鱼蛇马牛象", "只只只只只条条匹头头", strict=True)
)  # Chinese counts each animal with its own
Phrase = tuple[str, ...]  # the English words; Chinese is made from them

ASK = {  # language of the user, language of the answer -> ways to ask
    ("en", "en"): ("Translate into English: {}", "What does “{}” mean in English?"),
    ("en", "zh"): ("Translate into Chinese: {}", "How do you say “{}” in Chinese?"),
    ("zh", "en"): ("翻译成英文：{}", "“{}”用英语怎么说？"),
    ("zh", "zh"): ("翻译成中文：{}", "“{}”用中文怎么说？"),
}
SYSTEM = {  # language of the user -> what a system message may ask of every answer
    "en": {
        "brackets": "Put every answer in square brackets.",
        "exclamation": "End every answer with an exclamation mark.",
        "capitals": "Write every answer in capital letters.",
    },
    "zh": {
        "brackets": "每个回答都放在方括号里。",
        "exclamation": "每个回答都用感叹号结尾。",
        "capitals": "每个回答都用大写字母。",
    },
}
LOOKS: dict[str, dict[str, Callable[[str], str]]] = {  # language of the answer -> what then becomes of it
    "en": {"brackets": "[{}]".format, "capitals": str.upper},
    "zh": {"brackets": "[{}]".format, "exclamation": "{}！".format},
}


def say(phrase: Phrase, language: str) -> str:
    """The phrase in English ("two red horses") or Chinese ("两匹红马")."""
    if language == "en":
        return " ".join(phrase)
    number, colour, animal = phrase
    noun = ANIMALS[animal]
    return NUMBERS[number] + MEASURES[noun] + COLOURS[colour] + noun


def change(phrase: Phrase, language: str, rng: random.Random) -> tuple[str, Phrase]:
    """What a user says to change one word of the phrase, and the phrase that is then meant."""
    place = rng.randrange(3)
    other = rng.choice([word for word in (NUMBERS, COLOURS, ANIMALS)[place] if word != phrase[place]])
    number, colour, animal = changed = (*phrase[:place], other, *phrase[place + 1 :])
    noun = ANIMALS[animal]
    requests = {
        "en": (f"Make it {number}.", f"Make them {colour}.", f"Now {animal} instead."),
        "zh": (f"换成{NUMBERS[number]}{MEASURES[noun]}。", f"换成{COLOURS[colour]}色的。", f"换成{noun}。"),
    }
    return requests[language][place], changed


def conversation(phrase: Phrase, rng: random.Random) -> list[dict[str, str]]:
    """One conversation that opens with the phrase."""
    user, answer = rng.choice(list(ASK))
    request = rng.choice(ASK[user, answer]).format(say(phrase, "zh" if answer == "en" else "en"))
    messages = []
    look: Callable[[str], str] = str
    if rng.random() < 1 / 4:
        asked, look = rng.choice(list(LOOKS[answer].items()))
        messages.append({"role": "system", "content": SYSTEM[user][asked]})
    num_changes = rng.choice((1, 2)) if rng.random() < 1 / 4 else 0
    for turn in range(1 + num_changes):
        if turn > 0:
            request, phrase = change(phrase, user, rng)
        messages.append({"role": "user", "content": request})
        messages.append({"role": "assistant", "content": look(say(phrase, answer))})
    return messages


def main() -> None:
    """Write the rows; every call writes the same bytes."""
    rng = random.Random(0)
    phrases = list(product(NUMBERS, COLOURS, ANIMALS))
    with Path(__file__).with_name("tiny_chat.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for phrase in rng.sample(phrases, NUM_ROWS):
            file.write(json.dumps({"messages": conversation(phrase, rng)}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
